"""Attention of segments over their paths: value and gradients against the formula in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stemtune.kernels import segments as module
from stemtune.kernels.segments import SegmentPath, segments_attention
from tests.trees import largest_error, relative_error

SCALE = 0.3
WIDTH = 8
# A root of six tokens; two branches of it; a branch of the first one; a second root.
FOREST = [
    SegmentPath(0, 6, [(0, 6)]),
    SegmentPath(6, 9, [(0, 9)]),
    SegmentPath(9, 13, [(0, 13)]),
    SegmentPath(13, 14, [(0, 9), (13, 14)]),
    SegmentPath(14, 21, [(0, 6), (14, 21)]),
    SegmentPath(21, 26, [(21, 26)]),
]
TOKENS = 26


def states(kv_heads: int, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    """q [4, N, 8], k and v [K, N, 8], float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, TOKENS, WIDTH)] + [(kv_heads, TOKENS, WIDTH)] * 2
    q, k, v = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    return [size * q, k, v]


def formula(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cap: float | None = None
) -> Tensor:
    """A head and a token at a time, by autograd."""
    rows: list[Tensor] = []
    for head in range(q.shape[0]):
        kv_head = head * k.shape[0] // q.shape[0]
        for segment in FOREST:
            path = [index for part in segment.path for index in range(*part)]
            for token in range(segment.start, segment.end):
                seen = path[: path.index(token) + 1][-(window or len(path)) :]
                scores = SCALE * k[kv_head, seen] @ q[head, token]
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                rows.append(torch.softmax(scores, dim=0) @ v[kv_head, seen])
    return torch.stack(rows).view(*q.shape[:2], v.shape[-1])


def gradients(
    attend: Callable[..., Tensor], inputs: list[Tensor], above: Tensor
) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = attend(*leaves)
    return result.detach(), list(torch.autograd.grad(result, leaves, above))


@pytest.mark.parametrize("rows", [1, 3, 8, 768])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 7, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_value_and_gradients(
    kv_heads: int, window: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_ROWS", rows)
    above = states(kv_heads, seed=1)[0]
    inputs = states(kv_heads)
    found = gradients(
        lambda q, k, v: segments_attention(q, k, v, FOREST, SCALE, window), inputs, above
    )
    expected = gradients(lambda q, k, v: formula(q, k, v, window), inputs, above)
    assert largest_error(found[0], expected[0]) < 1e-12
    assert all(largest_error(a, b) < 1e-12 for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("rows", [3, 768])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cap", [0.5, 2.0, 50.0])
def test_capped_scores(
    cap: float, window: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_ROWS", rows)
    inputs, above = states(2, size=3.0), states(2, seed=1)[0]
    found = gradients(
        lambda q, k, v: segments_attention(q, k, v, FOREST, SCALE, window, cap), inputs, above
    )
    expected = gradients(lambda q, k, v: formula(q, k, v, window, cap), inputs, above)
    assert largest_error(found[0], expected[0]) < 1e-12
    assert all(largest_error(a, b) < 1e-12 for a, b in zip(found[1], expected[1], strict=True))
    assert largest_error(found[0], formula(*inputs, window)) > 1e-3


@pytest.mark.parametrize("width", [1, 5, 12])
def test_values_of_another_width(width: int) -> None:
    q, k, _ = states(2)
    generator = torch.Generator().manual_seed(3)
    v, above = (
        torch.randn(heads, TOKENS, width, generator=generator, dtype=torch.float64)
        for heads in (2, 4)
    )
    found = gradients(
        lambda q, k, v: segments_attention(q, k, v, FOREST, SCALE, 5), [q, k, v], above
    )
    expected = gradients(lambda q, k, v: formula(q, k, v, 5), [q, k, v], above)
    assert largest_error(found[0], expected[0]) < 1e-12
    assert all(largest_error(a, b) < 1e-12 for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("window", [None, 3])
def test_large_scores(window: int | None) -> None:
    """In the thousands: their exponentials alone would overflow."""
    inputs, above = states(2, size=1e4), states(2, seed=1)[0]
    found = gradients(
        lambda q, k, v: segments_attention(q, k, v, FOREST, SCALE, window), inputs, above
    )
    expected = gradients(lambda q, k, v: formula(q, k, v, window), inputs, above)
    assert largest_error(found[0], expected[0]) < 1e-9
    # Where one key has all the weight, a gradient is a difference of equal numbers, times 1e4.
    assert all(largest_error(a, b) < 1e-8 for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_precision(dtype: torch.dtype, bound: float) -> None:
    inputs = [tensor.to(dtype) for tensor in states(2)]
    above = states(2, seed=1)[0].to(dtype)
    found = gradients(
        lambda q, k, v: segments_attention(q, k, v, FOREST, SCALE, None), inputs, above
    )
    exact = [tensor.double() for tensor in inputs]
    expected = gradients(lambda q, k, v: formula(q, k, v, None), exact, above.double())
    assert found[0].dtype == dtype and {g.dtype for g in found[1]} == {dtype}
    assert relative_error(found[0].double(), expected[0]) < bound
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        assert relative_error(gradient.double(), wanted) < bound


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("smallest", [1, 60, 10**9], ids=["each", "large ones", "none"])
def test_heads_one_by_one(
    smallest: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed head by head, in fp32 where that is faster, comes to the same."""
    monkeypatch.setattr(module, "ALONE", smallest)
    monkeypatch.setattr(module, "has_fast_linear", lambda _: True)
    products = count_calls(monkeypatch, "linear")
    inputs, above = [x.float() for x in states(2)], states(2, seed=1)[0].float()
    found = gradients(
        lambda q, k, v: segments_attention(q, k, v, FOREST, SCALE, window), inputs, above
    )
    exact = [tensor.double() for tensor in inputs]
    expected = gradients(lambda q, k, v: formula(q, k, v, window), exact, above.double())
    assert relative_error(found[0].double(), expected[0]) < 1e-6
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        assert relative_error(gradient.double(), wanted) < 1e-6
    # Two heads, five products (two forward, three backward) of a segment in one block.
    large = sum(2 * (s.end - s.start) * s.length >= smallest for s in FOREST)
    assert products[0] == 2 * 5 * large and large == {1: 6, 60: 3, 10**9: 0}[smallest]


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    calls, real = [0], getattr(module, name)

    def counted(*inputs: Any) -> Any:
        calls[0] += 1
        return real(*inputs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_keeps_nothing_quadratic() -> None:
    """What lies between the passes grows with the tokens: two times the tokens, two times that."""
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.untyped_storage().nbytes()
        return tensor

    for tokens in (64, 128):
        kept.append(0)
        q, k, v = (torch.zeros(4, tokens, WIDTH, requires_grad=True) for _ in range(3))
        whole = [SegmentPath(0, tokens, [(0, tokens)])]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            segments_attention(q, k, v, whole, SCALE, None)
    assert kept[1] == 2 * kept[0]
