"""Rows of a tensor by number, each as often as it is asked for."""

from typing import Any

import torch
from torch import Tensor


def gather(states: Tensor, rows: Tensor) -> Tensor:
    """states[rows], [M, ...] of [N, ...]. The gradient of a row that is there several times is
    added up in fp32 at least; indexing would add up in half precision, after sorting the rows.

    Args:
        rows: [M].
    """
    return _Gather.apply(states, rows)  # pyright: ignore


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = states.shape[0]
        return states[rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        total = grads[0].new_zeros((ctx.count, *grads[0].shape[1:]), dtype=wide)
        return total.index_add_(0, rows, grads[0].to(wide)).to(grads[0].dtype), None
