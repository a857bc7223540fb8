"""Objectives: target log-probabilities in, loss and metrics out. Pure functions of tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stemtune.objectives.layout import Layout, Totals, layout_of, totals_of
from stemtune.objectives.pairwise import apo_down, apo_zero, cpo, dpo, hinge, ipo, orpo, simpo
from stemtune.objectives.several import kto, plackett_luce
from stemtune.objectives.supervised import best_answers, sft

__all__ = [
    "OBJECTIVES",
    "Layout",
    "Objective",
    "Term",
    "Totals",
    "layout_of",
    "loss_of",
    "sft",
    "terms_of",
    "totals_of",
]

Objective = Callable[[Tensor, "Tensor | None", Layout, Any], tuple[Tensor, dict[str, Tensor]]]
"""`objective(logps, reference_logps, layout, config) -> (loss_sum, metrics)`.

`logps` and `reference_logps` are fp32 [T] (the reference is None where none is needed); `loss_sum`
is a sum over the micro-batch (of targets, of pairs, …), not yet divided by what the step has of
them, which the trainer knows from the plan; metrics are sums as well, and are divided by the same
number.
"""

OBJECTIVES: dict[str, tuple[Objective, str]] = {
    "sft": (sft, "targets"),
    "dpo": (dpo, "pairs"),
    "ipo": (ipo, "pairs"),
    "hinge": (hinge, "pairs"),
    "apo_zero": (apo_zero, "pairs"),
    "apo_down": (apo_down, "pairs"),
    "simpo": (simpo, "pairs"),
    "orpo": (orpo, "pairs"),
    "cpo": (cpo, "pairs"),
    "plackett_luce": (plackett_luce, "rankings"),
    "kto": (kto, "answers"),
}
"""By name: the function, and which of a step's `Totals` its sum is divided by."""


@dataclass(frozen=True)
class Term:
    """A part of the loss.

    Attributes:
        per: the field of `Totals` that its sum is divided by.
        config: what the function is handed.
    """

    function: Objective
    per: str
    weight: float
    config: Any


def terms_of(objectives: list[Any], replacement: Objective | None = None) -> list[Term]:
    """The terms of the objectives of a run file.

    Args:
        replacement: a user's own function, instead of the first one's.
    """
    compared = any(config.type != "sft" for config in objectives)
    terms: list[Term] = []
    for number, config in enumerate(objectives):
        function, per = OBJECTIVES[config.type]
        if config.type == "sft" and compared:  # among answers that are compared: the best ones'
            function, per = best_answers, "best"
        if number == 0 and replacement is not None:
            function = replacement
        terms.append(Term(function, per, config.weight, config))
        if added := getattr(config, "sft_weight", 0.0):
            terms.append(Term(best_answers, "best", config.weight * added, config))
    return terms


def loss_of(
    terms: list[Term],
    logps: Tensor,
    reference_logps: Tensor | None,
    layout: Layout,
    totals: Totals,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of a step's loss, and of what its objectives tell."""
    loss = torch.zeros((), device=logps.device)
    metrics: dict[str, Tensor] = {}
    for term in terms:
        total = getattr(totals, term.per)
        if not total:
            continue
        loss_sum, told = term.function(logps, reference_logps, layout, term.config)
        loss = loss + term.weight * (loss_sum / total)
        metrics |= {name: value.detach() / total for name, value in told.items()}
    return loss, metrics
