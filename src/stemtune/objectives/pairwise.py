"""Objectives that compare answers to one prompt.

Each is a function of log-probabilities [T], those of the reference [T] or None, and the layout; it
returns a sum over pairs, which the trainer divides by the step's number of pairs. Written here are
the formulas for one pair: y⁺ the better answer and y⁻ the worse, π the policy, ρ the reference,
h(y) = log π(y|x) - log ρ(y|x), σ the logistic function.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stemtune.objectives.layout import Layout
from stemtune.objectives.supervised import Outcome


def dpo(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """-log σ(β·(h(y⁺) - h(y⁻))), and its variants, which combine.

    Sources:
        Rafailov et al. 2023, Direct Preference Optimization, arXiv 2305.18290. With
        `label_smoothing` ε, each pair may be the wrong way round: -(1-ε)·log σ(z) - ε·log σ(-z)
        (Mitchell 2023, a note on DPO with noisy preferences); with `robust` the estimate that this
        noise leaves unbiased, (-(1-ε)·log σ(z) + ε·log σ(-z)) / (1-2ε) (Chowdhury et al. 2024,
        arXiv 2403.00409). `length: mean` divides h(y) by the answer's length (Meng et al. 2024,
        arXiv 2405.14734, eq. 4 with a reference; length-normalised DPO of Tülu 3, arXiv
        2411.15124). `ld_alpha` weighs what an answer has beyond the length of the other one (Liu
        et al. 2024, arXiv 2409.06411). `divergence` replaces h by f'(π/ρ) (Wang et al. 2023,
        arXiv 2309.16240).
    """
    assert reference_logps is not None
    ratios = _pair_sums(logps - reference_logps, layout, config.ld_alpha)
    scores = _divergence(ratios, config)
    if config.length == "mean":
        scores = scores / layout.length[layout.pairs].clamp(min=1)
    z = config.beta * (scores[:, 0] - scores[:, 1])
    smoothing = config.label_smoothing
    if config.robust:
        loss = (smoothing * logsigmoid(-z) - (1 - smoothing) * logsigmoid(z)) / (1 - 2 * smoothing)
    else:
        loss = -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)
    return loss.sum(), {}


def _pair_sums(values: Tensor, layout: Layout, ld_alpha: float) -> Tensor:
    """[P, 2] sums over both answers of each pair; what one has beyond the length of the other
    counts `ld_alpha` times."""
    if ld_alpha == 1.0:
        return layout.sums(values)[layout.pairs]
    parts = torch.split(values, layout.length.tolist())
    rows = [
        torch.stack([part[:both].sum() + ld_alpha * part[both:].sum() for part in (better, worse)])
        for better, worse in ((parts[a], parts[b]) for a, b in layout.pairs.tolist())
        for both in (min(len(better), len(worse)),)
    ]
    return torch.stack(rows) if rows else values.new_zeros(0, 2)


def _divergence(ratios: Tensor, config: Any) -> Tensor:
    """f'(u) of u = π/ρ, given log u, and with f'(1) = 0. Beyond exp(80) fp32 overflows."""
    match config.divergence:
        case "forward_kl":
            return -torch.expm1((-ratios).clamp(max=80.0))
        case "js":
            return math.log(2) + logsigmoid(ratios)
        case "alpha":
            # (1 - u^-α) / α, which is log u for α → 0.
            power = (-config.divergence_alpha * ratios).clamp(max=80.0)
            return -torch.expm1(power) / config.divergence_alpha
        case _:
            return ratios


def ipo(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """(h̄(y⁺) - h̄(y⁻) - 1/(2β))², where h̄ is h over the answer's length.

    Source:
        Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human
        Preferences, arXiv 2310.12036, eq. 17. The mean over tokens, not the sum, is what its
        authors used.
    """
    assert reference_logps is not None
    means = layout.means(logps - reference_logps)[layout.pairs]
    return ((means[:, 0] - means[:, 1] - 1 / (2 * config.beta)) ** 2).sum(), {}


def hinge(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """max(0, 1 - β·(h(y⁺) - h(y⁻))).

    Source:
        Zhao et al. 2023, SLiC-HF, arXiv 2305.10425, in the form of Liu et al. 2023,
        arXiv 2309.06657.
    """
    assert reference_logps is not None
    ratios = layout.sums(logps - reference_logps)[layout.pairs]
    return torch.relu(1 - config.beta * (ratios[:, 0] - ratios[:, 1])).sum(), {}


def apo_zero(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """1 - σ(β·h(y⁺)) + σ(β·h(y⁻)): better answers become likelier than the model's own, worse ones
    less likely.

    Source:
        D'Oosterlinck et al. 2024, Anchored Preference Optimization, arXiv 2408.06266, eq. 7.
    """
    assert reference_logps is not None
    h = config.beta * layout.sums(logps - reference_logps)[layout.pairs]
    return (1 - torch.sigmoid(h[:, 0]) + torch.sigmoid(h[:, 1])).sum(), {}


def apo_down(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """σ(β·h(y⁺)) + 1 - σ(β·(h(y⁺) - h(y⁻))): for better answers worse than the model's own.

    Source:
        D'Oosterlinck et al. 2024, Anchored Preference Optimization, arXiv 2408.06266, eq. 8.
    """
    assert reference_logps is not None
    h = config.beta * layout.sums(logps - reference_logps)[layout.pairs]
    return (torch.sigmoid(h[:, 0]) + 1 - torch.sigmoid(h[:, 0] - h[:, 1])).sum(), {}


def simpo(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """-log σ(β·(l̄(y⁺) - l̄(y⁻)) - γ), where l̄ is log π over the answer's length. No reference.

    Source:
        Meng et al. 2024, SimPO, arXiv 2405.14734, eq. 6.
    """
    means = layout.means(logps)[layout.pairs]
    z = config.beta * (means[:, 0] - means[:, 1]) - config.gamma
    smoothing = config.label_smoothing
    return (-(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)).sum(), {}


def orpo(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """-β·log σ(log odds(y⁺) - log odds(y⁻)), with odds p/(1-p) of p = exp(l̄). No reference; the
    likelihood of y⁺ is a term of its own (`sft_weight`).

    Source:
        Hong et al. 2024, ORPO, arXiv 2403.07691, eq. 6 and 7 (β is its λ).
    """
    means = layout.means(logps)[layout.pairs]
    odds = means - _log1mexp(means)
    return -config.beta * logsigmoid(odds[:, 0] - odds[:, 1]).sum(), {}


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 (Mächler 2012, Accurately computing log(1 - exp(-|a|)));
    an x of less than the type's epsilon counts as that."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    # Each side is given what it can stand: the gradient of the one not taken would be NaN.
    close = torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, -1.0))))
    far = torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, -1.0), x)))
    return torch.where(near, close, far)


def cpo(logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any) -> Outcome:
    """-log σ(β·(log π(y⁺) - log π(y⁻))). No reference; the likelihood of y⁺ is a term of its own
    (`sft_weight`).

    Source:
        Xu et al. 2024, Contrastive Preference Optimization, arXiv 2401.08417, eq. 3 to 5.
    """
    sums = layout.sums(logps)[layout.pairs]
    z = config.beta * (sums[:, 0] - sums[:, 1])
    smoothing = config.label_smoothing
    return (-(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)).sum(), {}
