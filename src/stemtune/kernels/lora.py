"""A frozen linear layer with a low-rank update, forward and backward.

Written as separate operations, LoRA makes a matrix as large as the layer's output, scales it and
adds it; backward the same again. Here the update is added by the matrix product itself.

Shapes: N tokens, r the rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stemtune.kernels.linear import as_rows, linear


def lora_linear(
    x: Tensor,
    dropped: Tensor | None,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    """The layer x Wᵀ + bias + scale · (d Aᵀ) Bᵀ, in the dtype of W; no gradient for W and bias.

    Args:
        x: [..., in].
        dropped: [..., in], d: x after dropout; None where that is x itself.
        weight: gives [out, in], W, frozen; called in each pass, so that a weight which is held in
            few bits is dense for the moment of a product alone.
        bias: [out], frozen.
        a: [r, in]. b: [out, r].

    Source:
        Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685, equation 3. With U = scale · ∂y B:
        ∂x = ∂y W, ∂d = U A, ∂A = Uᵀ d, ∂B = scale · ∂yᵀ (d Aᵀ).
    """
    return _LoraLinear.apply(x, dropped, weight, bias, a, b, scale)  # pyright: ignore


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dense = weight()
            rows = as_rows(x, dense.dtype)
            inner = rows if dropped is None else as_rows(dropped, dense.dtype)
            a_, b_ = a.to(dense.dtype), _scaled(b, scale, dense.dtype)
            low = linear(inner, a_)
            y = linear(rows, dense, bias).addmm_(low, b_.t())
        ctx.save_for_backward(inner, low, a_, b_)
        ctx.weight, ctx.scale, ctx.has_dropout = weight, scale, dropped is not None
        ctx.dtypes = (x.dtype, a.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, low, a, b = ctx.saved_tensors
        x_dtype, a_dtype = ctx.dtypes
        shape = (*grads[0].shape[:-1], a.shape[1])
        with torch.autocast(grads[0].device.type, enabled=False):
            above = as_rows(grads[0], a.dtype)
            update = torch.mm(above, b)
            to_a = _product(update.t(), inner, a_dtype)
            to_b = _product(above.t(), low, a_dtype).mul_(ctx.scale)
            to_x = to_dropped = None
            if ctx.needs_input_grad[0]:
                to_x = linear(above, ctx.weight().t())
                if not ctx.has_dropout:
                    to_x.addmm_(update, a)
                to_x = to_x.view(shape).to(x_dtype)
            if ctx.has_dropout and ctx.needs_input_grad[1]:
                to_dropped = torch.mm(update, a).view(shape).to(x_dtype)
        return to_x, to_dropped, None, None, to_a, to_b, None


def _scaled(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Times a number, rounded once, in one pass."""
    return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in the dtype of its weight. A GPU's product can give more bits than it takes."""
    if left.is_cuda and left.dtype != dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)
