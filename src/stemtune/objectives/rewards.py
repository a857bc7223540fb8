"""What a policy prefers: rewards, margins and accuracies of scored answers."""

from typing import Any

import torch
from torch import Tensor

from stemtune.objectives.layout import Layout


def rewards_of(
    logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any
) -> Tensor:
    """[S] the reward that an objective implies for each answer: β·Σ (log π - log ρ), and without a
    reference β·log π; over the answer's length where the objective takes a mean."""
    values = logps if reference_logps is None else logps - reference_logps
    mean = config.type in ("ipo", "simpo", "orpo") or getattr(config, "length", "sum") == "mean"
    return config.beta * (layout.means(values) if mean else layout.sums(values))


def preference_metrics(
    logps: Tensor,
    reference_logps: Tensor | None,
    layout: Layout,
    config: Any,
    of: Tensor | None = None,
) -> dict[str, float]:
    """Means over answers and pairs.

    Args:
        config: the objective whose rewards are meant.
        of: [S] the answers that count; all, if not given.

    Returns:
        `rewards_chosen`, `rewards_rejected` and `logps_chosen`, `logps_rejected`: over answers.
        `rewards_margin`, `length_difference` (in tokens, better less worse), `rewards_accuracy` and
        `logps_accuracy` (by log-probability alone: also for a base without adapter) and
        `mean_logps_accuracy` (the same over the answers' length): over pairs; a tie counts half.
        `kl`: an estimate of the policy's divergence from the reference, by token, on these answers
        (Schulman 2020: r - 1 - log r, with r = ρ/π). What there is nothing of is left out.
    """
    logps, reference_logps = logps.detach(), _detached(reference_logps)
    of = torch.ones_like(layout.chosen) if of is None else of
    rewards = rewards_of(logps, reference_logps, layout, config)
    sums = layout.sums(logps)
    chosen, rejected = layout.chosen & of, ~layout.chosen & of
    pairs = layout.pairs[of[layout.pairs[:, 0]]]
    length = layout.length.float()
    values: dict[str, Tensor] = {
        "rewards_chosen": rewards[chosen],
        "rewards_rejected": rewards[rejected],
        "rewards_margin": _difference(rewards, pairs),
        "rewards_accuracy": _wins(rewards, pairs),
        "logps_chosen": sums[chosen],
        "logps_rejected": sums[rejected],
        "logps_accuracy": _wins(sums, pairs),
        "mean_logps_accuracy": _wins(sums / length.clamp(min=1), pairs),
        "length_difference": _difference(length, pairs),
    }
    if reference_logps is not None:
        # A token that has become impossible must not make the mean infinite.
        log_r = (reference_logps - logps)[of[layout.sequence]].clamp(max=80.0)
        values["kl"] = torch.expm1(log_r) - log_r
    return {name: float(found.mean()) for name, found in values.items() if found.numel()}


def _detached(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach()


def _difference(values: Tensor, pairs: Tensor) -> Tensor:
    return values[pairs[:, 0]] - values[pairs[:, 1]]


def _wins(values: Tensor, pairs: Tensor) -> Tensor:
    """[P] 1 where the better answer has more, ½ where both have the same."""
    return (torch.sign(_difference(values, pairs)) + 1) / 2
