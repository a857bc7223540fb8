"""The frozen head's value and its hand-written gradient, against log_softmax in float64."""

import pytest
import torch
from torch import Tensor

from stemtune.kernels import head
from stemtune.kernels.head import head_logprobs
from tests.trees import largest_error, relative_error

VOCAB = 11
ROWS = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 6, 6])  # the last source has three targets
TOKENS = torch.tensor([3, 4, 3, 0, 10, 5, 5, 1, 2, 3])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ weight.double().T + (0 if bias is None else bias.double())
    return torch.log_softmax(logits, dim=-1)[ROWS, TOKENS]


@pytest.mark.parametrize("block", [(1, 1), (3, 4), (7, 5), (2, 100), (2048, 4096)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_frozen_head(
    size: float, biased: bool, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks; and with logits in the hundreds, whose exponentials would overflow."""
    monkeypatch.setitem(head.BLOCKS, "cpu", block)
    hidden, weight = size * random(7, 5, seed=0), random(VOCAB, 5, seed=1)
    bias = random(VOCAB, seed=2) if biased else None
    above = random(ROWS.numel(), seed=3)

    own = hidden.clone().requires_grad_()
    scores = head_logprobs(own, weight, bias, ROWS, TOKENS)
    scores.backward(above)

    exact = hidden.double().requires_grad_()
    expected = formula(exact, weight, bias)
    expected.backward(above.double())
    assert relative_error(scores, expected) < 1e-6
    assert relative_error(own.grad, exact.grad) < 1e-6


@pytest.mark.parametrize("block", [(3, 4), (2048, 4096)])
def test_without_a_gradient(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.BLOCKS, "cpu", block)
    hidden, weight = random(7, 5, seed=0), random(VOCAB, 5, seed=1)
    scores = head_logprobs(hidden, weight, None, ROWS, TOKENS)
    assert largest_error(scores, formula(hidden.double(), weight, None)) < 1e-5


def test_the_order_of_pairs_is_free() -> None:
    hidden, weight = random(7, 5, seed=0), random(VOCAB, 5, seed=1)
    back = torch.arange(ROWS.numel() - 1, -1, -1)
    scores = head_logprobs(hidden, weight, None, ROWS[back], TOKENS[back])
    assert largest_error(scores, formula(hidden.double(), weight, None)[back]) < 1e-5


def test_half_precision_normalises_in_fp32() -> None:
    """A token that is almost sure: its log-probability is near 0, and never above."""
    weight = torch.zeros(VOCAB, 5)
    weight[3] = 30.0
    hidden = torch.ones(7, 5)
    scores = head_logprobs(hidden.bfloat16(), weight.bfloat16(), None, ROWS, TOKENS)
    assert scores.dtype == torch.float32
    expected = formula(hidden.double(), weight, None)
    assert largest_error(scores, expected) < 1e-5
    assert scores.max() <= 0
