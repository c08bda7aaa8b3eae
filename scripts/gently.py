#!/usr/bin/env python3
"""Run a command so that Ctrl-C and SIGTERM ask it to save its state, in place of ending it at once.

    python3 scripts/gently.py mpirun -np 8 .venv/bin/python examples/imagenet_resnet50.py --output runs/first

Open MPI's mpirun kills its ranks within a second of either signal, which is too little to save a model. It passes
SIGUSR2 on, so that is what the command gets here from the first signal; the second one ends it as always. Programs
that do not know SIGUSR2 end at the first one. SIGUSR1 and SIGUSR2 themselves are passed on, and what is ignored, as
SIGHUP is behind ``nohup``, still is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType


def run(command: list[str]) -> int:
    """Run it; its exit status, as a shell gives it."""
    asked = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        what = "ending" if asked else "asking the ranks to save and to leave; once more ends them at once"
        print(f"{signal.Signals(number).name}: {what}", file=sys.stderr, flush=True)
        process.send_signal(number if asked else signal.SIGUSR2)
        asked = True

    # Out of the terminal's foreground group, to which Ctrl-C goes.
    process = subprocess.Popen(command, preexec_fn=os.setpgrp, stdin=subprocess.DEVNULL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda passed_on, frame: process.send_signal(passed_on))
    status = process.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    try:
        sys.exit(run(sys.argv[1:]))
    except FileNotFoundError as error:
        sys.exit(f"gently.py: {error.filename}: no such program")
