"""The processes that share a run: each step's micro-batches are dealt out among them.

All of them know the data, the plan and the whole adapter; what a step's gradient is made of is
added up, and every process then does the same. The first one alone writes.
"""

import atexit
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch import distributed as dist

from stemtune.errors import OutOfMemoryError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of its run.

    Attributes:
        rank: its number; 0 for the one that writes.
        size: how many there are.
        on_this_machine: how many of them share its memory and cores.
    """

    rank: int = 0
    size: int = 1
    on_this_machine: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What each process has, in their order, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so for one of them."""
        return any(self.gather(flag))

    def same(self, value: T) -> T:
        """What the first process has."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Until all of them are here."""
        self.gather(None)

    def after_first(self, work: Callable[[], T]) -> T:
        """Do it on the first process, then on the others: they find what it has kept."""
        found = work() if self.is_first else None
        self.wait()
        return work() if found is None else found

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Give each process the sum of all gradients. Where no process has one, there is none."""
        if self.size == 1:
            return
        parameters = list(parameters)
        anywhere = self.gather([parameter.grad is not None for parameter in parameters])
        reached = [
            p for p, has in zip(parameters, zip(*anywhere, strict=True), strict=True) if any(has)
        ]
        for parameter in reached:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in reached if parameter.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _together():
            dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, summed in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(summed.view_as(gradient))


ALONE = Ranks()


def join(device: torch.device) -> Ranks:
    """Meet the other processes of the run, if a launcher such as torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    state = PartialState(cpu=device.type == "cpu")
    atexit.register(state.destroy_process_group)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(state.process_index, state.num_processes, here)


@contextmanager
def _together() -> Generator[None]:
    """Around what all processes do at once.

    Raises:
        OutOfMemoryError: one of them is gone, for which that is the usual reason.
    """
    try:
        yield
    except RuntimeError as error:
        hint = "its own words stand above; if there are none, the system may have ended it"
        hint += " for want of memory; --resume goes on from the newest checkpoint"
        raise OutOfMemoryError("another process of this run is gone", hint=hint) from error
