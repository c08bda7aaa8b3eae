"""A CUDA stream for what is done beside the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


def await_gpu() -> None:
    """Wait until the current device has done what it was asked to; for clocks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class SideStream:
    """Lets another thread use a GPU without queueing behind the kernels that this thread goes on to start."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def after_now(self, device: torch.device, work: Callable[[], _Result]) -> Callable[[], _Result]:
        """``work``, to be called in any thread, so that its kernels follow those that this thread has started so far.

        It ends when its kernels have ended, so that any stream may use its tensors. Their memory is used again by
        later works on this device only, which begin after what this thread will have started by then. On the CPU it
        is ``work`` itself.
        """
        if device.type != "cuda":
            return work
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))

        def on_the_side() -> _Result:
            torch.cuda.set_device(device)  # a thread begins with the first one, and would make a context there
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                result = work()
            stream.synchronize()
            return result

        return on_the_side
