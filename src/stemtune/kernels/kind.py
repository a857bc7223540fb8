"""The kind of device that a tensor is on; in a simulation, the one that it stands for."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_simulated: ContextVar[str | None] = ContextVar("simulated", default=None)


@contextmanager
def standing_for(kind: str) -> Generator[None]:
    """Within it tensors have no numbers, and stand for those on such a device."""
    token = _simulated.set(kind)
    try:
        yield
    finally:
        _simulated.reset(token)


def is_simulated() -> bool:
    """Whether there are no numbers."""
    return _simulated.get() is not None


def kind_of(x: Tensor) -> str:
    """`cpu`, `cuda` or `mps`."""
    return _simulated.get() or x.device.type
