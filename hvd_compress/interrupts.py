"""Ctrl-C while other ranks wait for this one."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def interrupted_at_its_end() -> Iterator[None]:
    """A context in which Ctrl-C waits until the ranks are in step again; a second one interrupts at once.

    It is for the main thread, and for Python's own handler of SIGINT: others are left as they are.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    has_come = False

    def take_note(number: int, frame: FrameType | None) -> None:
        nonlocal has_come
        if has_come:
            raise KeyboardInterrupt
        has_come = True
        logger.warning("Ctrl-C comes after what the ranks do together just now; a second one at once")

    signal.signal(signal.SIGINT, take_note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if has_come:
            raise KeyboardInterrupt
