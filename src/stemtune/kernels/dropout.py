"""Dropout that is a function of a seed: nothing of it is kept for the backward pass.

Some rows at a time are drawn, dropped and multiplied, so that what lives meanwhile is small.

On a CPU torch would draw for each value by itself, which takes 6 ns and made a third of a step.
Here one draw of 64 bits serves four values, so that a rate is a multiple of 2⁻¹⁶; and a core's
cache has the rows meanwhile, always in the same memory: taken anew for each layer, it would leave
a hole among the activations that are kept.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from stemtune.kernels.kind import is_simulated, kind_of

LEVELS = 2**16
ROOM = 2**18  # values at a time on a CPU
ROOM_ON_GPU = 2**24
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as a value


@dataclass(frozen=True)
class Mask:
    """Which values of a tensor stay.

    Attributes:
        stays: of its shape: booleans, or integers with all bits set or none; None for all.
        room: where to write what `of` gives; None for new memory.
    """

    stays: Tensor | None
    room: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """The tensor, zero where it is dropped. It may be written over by the next call."""
        if self.stays is None:
            return x
        if self.room is None:
            return torch.where(self.stays, x, 0.0)
        bits = torch.bitwise_and(x.view(self.stays.dtype), self.stays, out=self.room)
        return bits.view(x.dtype)


@dataclass(frozen=True)
class Dropout:
    """What is dropped of a tensor.

    Attributes:
        levels: how many of the 2¹⁶ that a value can draw drop it.
        seed: 63 bits; None where there are no numbers, in a simulation.
    """

    levels: int
    seed: int | None

    @classmethod
    def of(cls, rate: float, seed: int | None) -> "Dropout":
        """At the nearest rate there is, below 1."""
        return cls(min(round(rate * LEVELS), LEVELS - 1), seed)

    @property
    def rate(self) -> float:
        """How likely a value is dropped."""
        return self.levels / LEVELS

    @property
    def scale(self) -> float:
        """What the values that stay are multiplied by, for the expectation to be theirs."""
        return 1 / (1 - self.rate)

    def parts(self, rows: Tensor) -> Iterator[tuple[slice, Mask]]:
        """Some rows of [N, n] after others, each with its mask: the same ones each time."""
        if kind_of(rows) != "cpu":
            yield from self._on_gpu(rows)
        elif self.seed is None:  # what it would take has been taken before
            yield slice(None), Mask(None, None)
        else:
            yield from self._on_cpu(rows, self.seed)

    def _on_gpu(self, rows: Tensor) -> Iterator[tuple[slice, Mask]]:
        generator = None
        if self.seed is not None and not rows.is_meta:
            generator = _generator(rows.device).manual_seed(self.seed)
        for part in _slices(rows, ROOM_ON_GPU):
            stays = torch.empty_like(rows[part], dtype=torch.bool)
            yield part, Mask(stays.bernoulli_(1 - self.rate, generator=generator), None)

    def _on_cpu(self, rows: Tensor, seed: int) -> Iterator[tuple[slice, Mask]]:
        width = rows.shape[1]
        stream, levels = np.random.SFC64(seed), np.uint16(self.levels)
        rooms = _rooms(threading.get_ident(), INTEGERS[rows.element_size()], max(ROOM, width))
        for part in _slices(rows, ROOM):
            size = (part.stop - part.start) * width
            stays, room = (flat[:size].view(-1, width) for flat in rooms)
            drawn = stream.random_raw(-(-size // 4)).view(np.uint16)[:size]
            np.negative((drawn >= levels).view(np.int8), out=stays.view(-1).numpy())
            yield part, Mask(stays, room)


def _slices(rows: Tensor, room: int) -> Iterator[slice]:
    """As many rows at a time as have so many values, at least one."""
    count, width = rows.shape
    most = max(1, room // width)
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))


def next_seed() -> int | None:
    """The next number of torch's generator, with which seeds are saved and restored; none in a
    simulation. It is the CPU's also for a GPU: nothing waits for it."""
    if is_simulated():
        return None
    return int(torch.randint(2**63 - 1, (), device="cpu"))


@cache
def _rooms(_thread: int, kind: torch.dtype, size: int) -> tuple[Tensor, Tensor]:
    return torch.empty(size, dtype=kind), torch.empty(size, dtype=kind)


@cache
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)
