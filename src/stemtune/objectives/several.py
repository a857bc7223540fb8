"""Objectives over more than pairs: rankings of several answers, and answers without a partner."""

from typing import Any

import torch
from torch import Tensor

from stemtune.objectives.layout import Layout
from stemtune.objectives.supervised import Outcome


def plackett_luce(
    logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any
) -> Outcome:
    """-Σ_k log( exp(β·h(y_k)) / Σ_{j≥k} exp(β·h(y_j)) ), summed over rankings; the answers y_1,
    y_2, … stand from best to worst, and h(y) = log π(y|x) - log ρ(y|x). With two it is DPO.

    Source:
        Rafailov et al. 2023, Direct Preference Optimization, arXiv 2305.18290, appendix A.3.
    """
    assert reference_logps is not None
    rewards = config.beta * layout.sums(logps - reference_logps)
    # In a whole ranking an answer is preferred to each that stands behind it.
    behind = torch.bincount(layout.pairs[:, 0], minlength=len(layout.record))
    loss = logps.new_zeros(())
    for record in torch.unique(layout.record[layout.pairs[:, 0]]).tolist():
        answers = torch.nonzero(layout.record == record).squeeze(1)
        ranked = rewards[answers[torch.argsort(behind[answers], descending=True, stable=True)]]
        rest = torch.logcumsumexp(ranked.flip(0), 0).flip(0)
        loss = loss + (rest - ranked)[:-1].sum()
    return loss, {}


def kto(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """w⁺·(1 - σ(β·(h(y) - z))) for a good answer, w⁻·(1 - σ(β·(z - h(y)))) for a bad one, summed
    over answers; h(y) = log π(y|x) - log ρ(y|x).

    z is how far the policy has moved: the mean of h over answers beside other prompts, not below 0,
    and without a gradient. It is that of a whole step: see `stemtune.objectives.mismatched`.

    Source:
        Ethayarajh et al. 2024, KTO, arXiv 2402.01306, eq. 7 and 8.
    """
    assert reference_logps is not None and layout.baseline is not None
    h = layout.sums(logps - reference_logps) - layout.baseline.to(logps.device)
    good = config.desirable_weight * (1 - torch.sigmoid(config.beta * h))
    bad = config.undesirable_weight * (1 - torch.sigmoid(-config.beta * h))
    return torch.where(layout.chosen, good, bad).sum(), {}
