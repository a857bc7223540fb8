"""How many bytes a computation holds at once, without computing it.

Its tensors are fake ones of torch's: they have a shape, a dtype and a device, and nothing in them.
Each operation says what it would give; what it gives is counted for as long as it lives.
"""

import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from stemtune.kernels.linear import FEW_ROWS, linear

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Within it the storages that operations make are counted, each once, until it is freed; but
    for those on the meta device, which stand for memory elsewhere.

    Attributes:
        now: bytes that live.
        peak: bytes that lived at the most.
        marks: bytes that lived when the first operation after each `mark` began.
    """

    def __init__(self, not_counted: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.marks: list[int] = []
        self._marked = False
        self._made_by: Any = WeakIdKeyDictionary()
        for tensor in not_counted:
            self._made_by[tensor.untyped_storage()] = (None, None)

    def mark(self) -> None:
        """Note what lives once the function that calls has returned, and nothing of it waits there
        as an argument or a result any more."""
        self._marked = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What an operation gives; where that would depend on numbers, a guess."""
        if self._marked:
            self.marks.append(self.now)
            self._marked = False
        if func is aten.nonzero.default:  # at the most everything: few bytes, wherever we ask
            result = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        elif func is aten.equal.default:  # what one operation made: the head's product, as it is
            return self._maker(args[0]) is self._maker(args[1])
        elif func is aten._unique2.default:  # likewise: nothing twice
            values = args[0].new_empty(args[0].numel())
            result = values, args[0].new_empty(args[0].shape, dtype=torch.long), values.new_empty(0)
        elif func is aten._grouped_mm.default and (args[0].ndim, args[1].ndim) == (2, 3):
            # Rows by their experts' matrices: torch knows the shape, but in bfloat16 alone.
            result = args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor, func)
        return result

    def _maker(self, tensor: Tensor) -> Any:
        return self._made_by[tensor.untyped_storage()][0]

    def _count(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        if storage in self._made_by or tensor.is_meta:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size

        self._made_by[storage] = (func, weakref.ref(storage, freed))
        self.now += size
        self.peak = max(self.peak, self.now)


def without_numbers(model: nn.Module) -> FakeTensorMode:
    """What to be within for tensors to be fake ones, on the CPU.

    Args:
        model: on the meta device; its weights are fake from then on.
    """
    # What it can't tell raises; torch would print where, too.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    linear(torch.zeros(FEW_ROWS, 1), torch.zeros(1, 1))  # its look at oneDNN takes numbers
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
    return mode
