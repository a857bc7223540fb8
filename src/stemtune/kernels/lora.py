"""A frozen linear layer with a low-rank update, forward and backward.

Written as separate operations, LoRA makes a matrix as large as the layer's output, scales it and
adds it; backward the same again. Here the update is added by the matrix product itself.

Shapes: N tokens, r the rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stemtune.kernels.dropout import Dropout
from stemtune.kernels.linear import as_rows, linear


def lora_linear(
    x: Tensor,
    dropout: Dropout | None,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    """The layer x Wᵀ + bias + scale · (d Aᵀ) Bᵀ, in the dtype of W; no gradient for W and bias.

    Args:
        x: [..., in].
        dropout: makes d of x; d is x itself without.
        weight: gives [out, in], W, frozen; called in each pass, so that a weight which is held in
            few bits is dense for the moment of a product alone.
        bias: [out], frozen.
        a: [r, in]. b: [out, r].

    Source:
        Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685, equation 3. With U = scale · ∂y B:
        ∂x = ∂y W + mask · (U A), ∂A = Uᵀ d, ∂B = scale · ∂yᵀ (d Aᵀ). Dropout's own scale is a
        factor of `scale`, and d is x where it is not 0.
    """
    if dropout is not None:
        scale *= dropout.scale
    return _LoraLinear.apply(x, dropout, weight, bias, a, b, scale)  # pyright: ignore


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropout: Dropout | None,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dense = weight()
            rows = as_rows(x, dense.dtype)
            a_, b_ = a.to(dense.dtype), _scaled(b, scale, dense.dtype)
            low = _low(rows, dropout, a_)
            y = linear(rows, dense, bias).addmm_(low, b_.t())
        # Not what dropout made of them: layers of the same input keep it together.
        ctx.save_for_backward(rows, low, a_, b_)
        ctx.weight, ctx.scale, ctx.dropout = weight, scale, dropout
        ctx.dtypes = (x.dtype, a.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        x_dtype, a_dtype = ctx.dtypes
        with torch.autocast(grads[0].device.type, enabled=False):
            above = as_rows(grads[0], a.dtype)
            update = torch.mm(above, b)
            to_b = _product(above.t(), low, a_dtype).mul_(ctx.scale)
            to_x = linear(above, ctx.weight().t()) if ctx.needs_input_grad[0] else None
            if ctx.dropout is None:
                to_a = _product(update.t(), rows, a_dtype)
                if to_x is not None:
                    to_x.addmm_(update, a)
            else:
                to_a = torch.zeros(a.shape, dtype=a_dtype, device=a.device)
                for part, mask in ctx.dropout.parts(rows):
                    to_a += _product(update[part].t(), mask.of(rows[part]), a_dtype)
                    if to_x is not None:
                        to_x[part] += mask.of(torch.mm(update[part], a))
            if to_x is not None:
                to_x = to_x.view(*grads[0].shape[:-1], a.shape[1]).to(x_dtype)
        return to_x, None, None, None, to_a, to_b, None


def _low(rows: Tensor, dropout: Dropout | None, a: Tensor) -> Tensor:
    """The product d Aᵀ, [N, r]."""
    if dropout is None:
        return linear(rows, a)
    low = rows.new_empty(rows.shape[0], a.shape[0])
    for part, mask in dropout.parts(rows):
        low[part] = linear(mask.of(rows[part]), a)
    return low


def _scaled(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Times a number, rounded once, in one pass."""
    return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in the dtype of its weight. A GPU's product can give more bits than it takes."""
    if left.is_cuda and left.dtype != dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)
