"""Objectives against their formulas in float64."""

import math
import random

import pytest
import torch

from stemtune.objectives import Layout, sft


def layout_of(sequence: list[int], weights: list[float], device: torch.device) -> Layout:
    """Targets of sequences that are not compared."""
    count = max(sequence) + 1
    return Layout(
        torch.tensor(sequence, device=device),
        torch.tensor(weights, device=device),
        torch.arange(count),
        torch.zeros(count, dtype=torch.bool),
        torch.zeros(0, 2, dtype=torch.int64),
    )


def by_formula(logps: list[float], weights: list[float]) -> float:
    return math.fsum(-weight * logp for logp, weight in zip(logps, weights, strict=True))


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_sft_is_the_weighted_negative_log_likelihood(size: int) -> None:
    rng = random.Random(size)
    logps = [-rng.expovariate(0.5) for _ in range(size)]
    weights = [rng.choice([0.0, 0.5, 1.0, 3.0]) for _ in range(size)]
    layout = layout_of([i % 3 for i in range(size)], weights, torch.device("cpu"))
    loss, metrics = sft(torch.tensor(logps), None, layout, None)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert float(loss) == pytest.approx(by_formula(logps, weights), rel=1e-5, abs=1e-6)
    assert metrics == {}


def test_sft_by_hand() -> None:
    """Two targets of probability 1/2, and one of 1/4 that counts twice: 6 ln 2."""
    layout = layout_of([0, 0, 1], [1.0, 1.0, 2.0], torch.device("cpu"))
    logps = torch.tensor([0.5, 0.5, 0.25]).log()
    assert float(sft(logps, None, layout, None)[0]) == pytest.approx(6 * math.log(2))


def test_the_gradient_of_sft_is_minus_the_weights() -> None:
    weights = [1.0, 0.0, 0.25]
    logps = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    sft(logps, None, layout_of([0, 1, 1], weights, torch.device("cpu")), None)[0].backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [-weight for weight in weights]


def test_the_loss_of_a_step_is_the_sum_of_its_micro_batches() -> None:
    cpu = torch.device("cpu")
    logps, weights, sequence = [-1.0, -2.0, -3.0, -4.0], [1.0, 2.0, 1.0, 0.5], [0, 0, 1, 2]
    whole = sft(torch.tensor(logps), None, layout_of(sequence, weights, cpu), None)[0]
    parts = [
        sft(torch.tensor(logps[cut]), None, layout_of(sequence[cut], weights[cut], cpu), None)[0]
        for cut in (slice(1), slice(1, 3), slice(3, 4))
    ]
    assert float(whole) == float(sum(parts)) == 1 + 4 + 3 + 2
