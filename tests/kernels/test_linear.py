"""The matrix product, against float64."""

import pytest
import torch
from torch import Tensor

from stemtune.kernels import linear as module
from stemtune.kernels.linear import linear
from tests.trees import relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_it_is_the_product(
    rows: int, biased: bool, transposed: bool, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without oneDNN, whatever the number of rows and the weight's order in memory."""
    monkeypatch.setattr(module, "_onednn_is_exact", lambda: there and ONEDNN)
    x, bias = random(rows, 48), random(24, seed=1) if biased else None
    weight = random(48, 24, seed=2).t() if transposed else random(24, 48, seed=2)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert relative_error(linear(x, weight, bias), exact) < 1e-6


ONEDNN = module._onednn_is_exact()


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (random(64, 96)[:, ::2], random(24, 48)),
        (random(48, 64).t(), random(24, 48)),
        (random(64, 48), random(24, 96)[:, ::2]),
        (random(64, 48), random(48, 24)[:, :10].t()),
        (random(64, 48).double(), random(24, 48).double()),
        (random(64, 48).bfloat16(), random(24, 48).bfloat16()),
        (random(8, 48), random(24, 48)),
    ],
)
def test_what_onednn_would_be_slow_at_is_not_given_to_it(x: Tensor, weight: Tensor) -> None:
    assert not module._suits_onednn(x, weight)
    exact = x.double() @ weight.double().t()
    bound = 1e-2 if x.dtype == torch.bfloat16 else 1e-6
    assert relative_error(linear(x, weight).double(), exact) < bound


def test_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another torch may have none, or one that wants other arguments."""
    module._onednn_is_exact.cache_clear()
    try:
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x: x, raising=False)
        assert not module._onednn_is_exact()
        exact = random(64, 48).double() @ random(24, 48, seed=1).double().t()
        assert relative_error(linear(random(64, 48), random(24, 48, seed=1)), exact) < 1e-6
    finally:
        module._onednn_is_exact.cache_clear()
