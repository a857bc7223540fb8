"""A decoder's blocks, some of them passed over: what those below a block give can be given instead.

Shapes: N packed tokens, D hidden width.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Below:
    """What the blocks below block `first` give: its input, [N, D]."""

    first: int
    states: Tensor


class _Passed(nn.Module):
    """In a block's place: gives what it was told, or what it got."""

    def __init__(self, block: nn.Module, states: Tensor | None) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)  # decoders choose a mask by it
        self.states, self.seen = states, None

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """[1, N, D] to the same."""
        self.seen = hidden_states
        return hidden_states if self.states is None else self.states


def has_blocks(base: Any) -> bool:
    """Whether the decoder keeps its blocks where transformers' decoders do."""
    return isinstance(getattr(base.get_decoder(), "layers", None), nn.ModuleList)


@contextmanager
def given(base: Any, below: Below | None) -> Generator[None]:
    """Within it the blocks below `below.first` are not run: it gets the states as its input."""
    if below is None:
        yield
        return
    with _replaced(base, range(below.first), below.states[None]):
        yield


@contextmanager
def stopped(base: Any, first: int) -> Generator[nn.Module]:
    """Within it the blocks from `first` on are not run; `seen` of what it yields is the input that
    block `first` would have got, [1, N, D]."""
    blocks = base.get_decoder().layers
    with _replaced(base, range(first, len(blocks)), None):
        yield blocks[first]


@contextmanager
def _replaced(base: Any, numbers: range, states: Tensor | None) -> Generator[None]:
    blocks = base.get_decoder().layers
    own = {number: blocks[number] for number in numbers}
    for number, block in own.items():
        blocks[number] = _Passed(block, states)
    try:
        yield
    finally:
        for number, block in own.items():
            blocks[number] = block
