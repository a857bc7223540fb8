"""Ways to hold less between the forward pass and the backward pass: compute it again, or have it
wait in main memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

SMALL = 2**14  # bytes: of smaller tensors there is nothing to win


def checkpoint_activations(base: Any) -> None:
    """Keep the inputs of blocks alone, and compute the rest of them once more."""
    # As transformers 5.23 calls it; 5.17 has the other name alone.
    enable = getattr(base, "activation_checkpointing_enable", None)
    (enable or base.gradient_checkpointing_enable)()


@dataclass(frozen=True)
class Away:
    """A tensor that waits elsewhere."""

    home: torch.device
    waits: Tensor


class OffloadedActivations(saved_tensors_hooks):
    """Within it, what operations save for the backward pass leaves the device, and comes back when
    it is asked for. Weights, which are there anyway, stay where they are (torch's own
    `save_on_cpu` copies the head with every micro-batch), and what several layers save, such as
    their common input, is copied once.

    Args:
        model: whose weights and buffers stay.
        to: main memory; in a simulation, where nothing is.
    """

    def __init__(self, model: nn.Module, to: torch.device) -> None:
        super().__init__(self._leave, self._come_back)
        self._to = to
        self._pinned = to.type == "cpu" and torch.cuda.is_available()
        self._stays: Any = WeakIdKeyDictionary()
        for tensor in [*model.parameters(), *model.buffers()]:
            self._stays[tensor.untyped_storage()] = True
        self._away: Any = WeakIdKeyDictionary()

    def _leave(self, tensor: Tensor) -> Tensor | Away:
        storage = tensor.untyped_storage()
        if storage in self._stays or tensor.nbytes < SMALL or tensor.device == self._to:
            return tensor
        away = self._away.setdefault(storage, {})
        version = tensor._version  # pyright: ignore[reportPrivateUsage]  # torch's notes name it
        key = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version)
        if key not in away:
            waits = torch.empty_like(tensor, device=self._to, pin_memory=self._pinned)
            away[key] = waits.copy_(tensor, non_blocking=self._pinned)
        return Away(tensor.device, away[key])

    def _come_back(self, saved: Tensor | Away) -> Tensor:
        if not isinstance(saved, Away):
            return saved
        return saved.waits.to(saved.home, non_blocking=self._pinned)
