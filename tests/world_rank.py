"""One rank of :class:`world.World`: runs the functions that the directory given as argument asks for."""

import faulthandler
import importlib
import pickle
import sys
import time
import traceback
from pathlib import Path


def main(directory: Path, owner: int) -> None:
    import horovod.torch as hvd

    hvd.init()
    number = 0
    while True:
        job = directory / f"job-{number}"
        while not job.exists():
            if (directory / "stop").exists() or not Path(f"/proc/{owner}").exists():  # the tests were killed
                return
            time.sleep(0.005)
        module, name, arguments, limit = pickle.loads(job.read_bytes())
        faulthandler.dump_traceback_later(limit * 0.9)  # where a hanging rank hangs
        try:
            outcome = (True, getattr(importlib.import_module(module), name)(*arguments))
        except BaseException:
            outcome = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        reply = directory / f"reply-{number}-{hvd.rank()}"
        draft = reply.with_name(reply.name + ".draft")
        draft.write_bytes(pickle.dumps(outcome))
        draft.rename(reply)
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
