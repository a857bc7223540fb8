"""Dropout by a seed: what is drawn, and that nothing but the seed decides it."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stemtune.kernels.dropout import ROOM, Dropout, next_seed
from stemtune.kernels.kind import standing_for
from stemtune.kernels.lora import lora_linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """[..., n]"""
    rows = x.reshape(-1, x.shape[-1])
    parts = [mask.of(rows[part]).clone() for part, mask in dropout.parts(rows)]
    return torch.cat(parts).view(x.shape)


def stays_of(x: Tensor, dropout: Dropout) -> Tensor:
    """[..., n], ones and zeros."""
    return dropped(torch.ones_like(x), dropout)


@pytest.fixture(params=["cpu", "cuda"])
def kind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways run on a CPU."""
    with standing_for(request.param):
        yield


def stays(rate: float, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return stays_of(torch.ones(shape), Dropout.of(rate, seed))


@pytest.mark.usefixtures("kind")
def test_rates_are_kept() -> None:
    """What is dropped of a million is within five standard deviations of what is expected."""
    for rate in (0.0001, 0.05, 0.1, 0.5, 0.9):
        dropout = Dropout.of(rate, 7)
        assert dropout.rate == pytest.approx(rate, abs=2**-17)
        dropped = 10**6 - float(stays(rate, (1000, 1000), 7).sum())
        deviation = math.sqrt(10**6 * dropout.rate * (1 - dropout.rate))
        assert abs(dropped - 10**6 * dropout.rate) < 5 * deviation
        assert dropout.scale == 1 / (1 - dropout.rate)
    assert Dropout.of(0.99999999, 7).rate < 1


@pytest.mark.usefixtures("kind")
def test_values_are_dropped_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours, rows, the four values of one draw, the chunks, and other seeds."""
    monkeypatch.setattr("stemtune.kernels.dropout.ROOM_ON_GPU", ROOM)
    shape = (64, 2 * ROOM // 64)
    drops = 1 - stays(0.3, shape, 3)
    flat = drops.flatten()
    lags = [1, 2, 3, 4, 8, drops.shape[1], ROOM]
    pairs = [(flat[:-lag], flat[lag:]) for lag in lags]
    pairs.append((flat, 1 - stays(0.3, shape, 4).flatten()))
    for one, other in pairs:
        correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(one.numel())
    for count in (drops.mean(0), drops.mean(1)):
        bound = 6 * math.sqrt(0.3 * 0.7 / (drops.numel() / count.numel()))
        assert float((count - 0.3).abs().max()) < bound


@pytest.mark.usefixtures("kind")
@DTYPES
def test_the_seed_alone_decides(dtype: torch.dtype) -> None:
    x = torch.randn(37, 19, dtype=dtype)
    found = dropped(x, Dropout.of(0.4, 11))
    expected = torch.where(stays(0.4, (37, 19), 11) == 1, x, torch.zeros((), dtype=dtype))
    assert torch.equal(found, expected) and found.dtype == dtype
    assert not torch.equal(found, dropped(x, Dropout.of(0.4, 12)))


def test_infinite_values_can_be_dropped() -> None:
    x = torch.full((8, 8), torch.inf)
    assert set(dropped(x, Dropout.of(0.5, 1)).flatten().tolist()) == {0.0, torch.inf}


def test_seeds_are_torchs_next_number() -> None:
    state = torch.random.get_rng_state()
    first, second = next_seed(), next_seed()
    torch.random.set_rng_state(state)
    assert (next_seed(), next_seed()) == (first, second)
    assert first != second


def written_out(x: Tensor, mask: Tensor, *weights: Any, scale: float, rate: float) -> Tensor:
    weight, a, b = weights
    return x @ weight.T + scale * ((x * mask / (1 - rate)) @ a.T) @ b.T


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_a_layer_is_the_formula(rate: float) -> None:
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*s) for s in [(50, 24), (16, 24), (4, 24), (16, 4)])
    dropout = Dropout.of(rate, 5)
    trained = [t.requires_grad_() for t in (x, a, b)]
    y = lora_linear(x, dropout, lambda: weight, None, a, b, 2.0)
    above = torch.randn(50, 16)
    grads = torch.autograd.grad(y, trained, above)
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    mask = stays(rate, (50, 24), 5).double()
    wanted = written_out(exact[0], mask, weight.double(), *exact[1:], scale=2.0, rate=dropout.rate)
    expected = torch.autograd.grad(wanted, exact, above.double())
    for found, true in zip([y, *grads], [wanted, *expected], strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-4)


def test_computed_once_more_it_is_the_same() -> None:
    """Activation checkpointing draws the seed again."""
    weight, a, b = torch.randn(16, 24), torch.randn(4, 24), torch.randn(16, 4)

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x, Dropout.of(0.3, next_seed()), lambda: weight, None, a, b, 2.0)

    grads = []
    for again in (False, True):
        x = torch.ones(30, 24, requires_grad=True)
        torch.manual_seed(9)
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        assert isinstance(y, Tensor)
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*grads)
