"""When to stop: a signal or a deadline asks for it at the next step, a second signal at once."""

import logging
import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread
from types import FrameType

import psutil

log = logging.getLogger(__name__)
ECHO = 2.0


def _echo() -> float:
    """Seconds in which the same signal may come again: who signals all processes of a run, as
    systemd and Slurm do, signals torchrun as well, which hands it on to them."""
    return ECHO if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0.0


@contextmanager
def held() -> Generator[None]:
    """Within it Ctrl-C waits for the end. Torch calls Python out of C++ that must not fail, as it
    does for tensors without numbers: an exception there aborts the process."""
    before = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or before is None:
        yield
        return
    came = list[int]()
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


class StopRequest:
    """Whether the run should end before its last step: Ctrl-C, SIGTERM from a scheduler, or no time
    left for another step.

    Args:
        time_limit: seconds since this process began; None for no limit.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.requested = False
        self._signalled: float | None = None
        self._ends: float | None = None
        if time_limit is not None:  # from here on by a clock that nobody sets
            age = time.time() - psutil.Process().create_time()
            self._ends = time.monotonic() + time_limit - age

    @contextmanager
    def listening(self) -> Generator[None]:
        """Handle SIGINT and SIGTERM meanwhile. Signals reach only a main thread."""
        if current_thread() is not main_thread():
            yield
            return
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled is not None:
            if time.monotonic() - self._signalled > _echo():
                raise KeyboardInterrupt
            return
        self._signalled, self.requested = time.monotonic(), True
        name = signal.Signals(number).name
        # Not by a logger: the signal may have come in the middle of a logger's own writing.
        said = f"{name}: stopping after this step, with a checkpoint; again to stop at once\n"
        with suppress(OSError):
            os.write(2, said.encode())

    def look_at_clock(self, needed: float) -> None:
        """Ask for a stop if there is no time left for what comes next.

        Args:
            needed: seconds that the next step, with saving behind it, may take.
        """
        if self._ends is None or self.requested:
            return
        left = self._ends - time.monotonic()
        if left < needed:
            self.requested = True
            log.warning("%.0f s are left of train.time_limit: stopping with a checkpoint", left)
