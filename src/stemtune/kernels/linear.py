"""A matrix product by the fastest exact kernel at hand.

torch multiplies fp32 matrices on a CPU with MKL, which keeps its best code for the processors of
one maker. oneDNN comes with the same torch, computes the same sums in the same precision, and was
1.1 to 1.4 times as fast on a Zen 4. Half precision goes through oneDNN anyway.
"""

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stemtune.kernels.kind import kind_of

FEW_ROWS = 32  # below, the call itself is what takes the time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows [N, in] by a weight [out, in] to [N, out]. Keeps nothing for a backward pass."""
    if _suits_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def frozen_linear(x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """[..., in] to [..., out], in the dtype of the weight; no gradient for weight and bias.

    Args:
        weight: makes [out, in], in each pass anew: nothing keeps it.
    """
    return _FrozenLinear.apply(x, weight, bias)  # pyright: ignore


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            dense = weight()
            y = linear(as_rows(x, dense.dtype), dense, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            dense = ctx.weight()
            to_x = linear(as_rows(grads[0], dense.dtype), dense.t())
        return to_x.view(*grads[0].shape[:-1], to_x.shape[-1]).to(ctx.dtype), None, None


def as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., n] as [N, n]."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


def has_fast_linear(x: Tensor) -> bool:
    """Whether `linear` has a faster kernel for large fp32 matrices than torch itself, where such a
    tensor is."""
    return kind_of(x) == "cpu" and _onednn_is_exact()


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Dense fp32 matrices on a CPU. With other strides oneDNN falls back to a reference kernel that
    takes a thousand times as long."""
    return (
        x.dtype == weight.dtype == torch.float32
        and kind_of(x) == "cpu"
        and x.shape[0] >= FEW_ROWS
        and x.is_contiguous()
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and _onednn_is_exact()
    )


@cache
def _onednn_is_exact() -> bool:
    """Whether the operator, which torch's own compiler calls and nobody promises, is there and
    gives what `F.linear` gives."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not (x86 and torch.backends.mkldnn.is_available()):
        return False
    x = torch.linspace(-1, 1, FEW_ROWS * 48).view(FEW_ROWS, 48)
    weight = torch.linspace(-1, 1, 24 * 48).view(48, 24).t()
    bias = torch.linspace(0, 1, 24)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    exact = F.linear(x.double(), weight.double(), bias.double())
    return bool((found - exact).abs().max() < 1e-5)
