"""A worker's side: one optimizer step at a time, at the driver's word.

The driver writes a line to stdin for each step, and reads a line of JSON for each. What a tool
itself prints goes to stderr.
"""

import json
import os
import sys
import time
from typing import Any


class Driver:
    """The process at the other end of stdin and stdout."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def wait(self) -> None:
        """Until it is this worker's turn; the process ends when there are no more."""
        if not sys.stdin.readline():
            os._exit(0)  # past all that a trainer does at its end

    def reply(self, **figures: Any) -> None:
        """One line."""
        self._replies.write(json.dumps(figures) + "\n")


def pace(driver: Driver) -> Any:
    """A callback of transformers' Trainer that takes turns: seconds from the start of an optimizer
    step (its batches are collated by then) to its end, and the loss that is logged of it."""
    from transformers import TrainerCallback

    class Pace(TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            driver.wait()
            self.start = time.perf_counter()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.start

        def on_log(self, *_args: Any, logs: dict[str, Any], **_kwargs: Any) -> None:
            if "loss" in logs:
                driver.reply(loss=float(logs["loss"]), seconds=self.seconds)

    return Pace
