"""Figures of scored records: means over all of them, and over those of each source."""

import math
from collections.abc import Sequence as Seq
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from stemtune.data.prepare import Part
from stemtune.objectives import Term, layout_of, loss_of, totals_of
from stemtune.objectives.rewards import preference_metrics
from stemtune.score import Scorer
from stemtune.tree.sequence import Sequence

Figures = dict[str, float]


def losses_by_record(part: Part, logps: Seq[Tensor]) -> list[list[float]]:
    """For each record the loss of each of its targets.

    Args:
        logps: of all sequences of the part, in order.
    """
    rest = iter(logps)
    return [
        [-logp for mine in islice(rest, len(record)) for logp in mine.tolist()]
        for record in part.sequences
    ]


def supervised_figures(part: Part, losses: Seq[Seq[float]]) -> Figures:
    """Mean loss over targets.

    Args:
        losses: for each record the loss of each of its targets.

    Returns:
        `loss`, `perplexity`, `targets`, and of several sources `loss/NAME`; empty without targets.
    """
    every = [loss for record in losses for loss in record]
    if not every:
        return {}
    mean = math.fsum(every) / len(every)
    figures = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "targets": len(every)}
    for name, mine in _by_source(part.sources).items():
        own = [loss for number in mine for loss in losses[number]]
        if own:
            figures[f"loss/{name}"] = math.fsum(own) / len(own)
    return figures


def preference_figures(
    part: Part,
    logps: Seq[Tensor],
    references: Seq[Tensor] | None,
    baseline: Tensor | None,
    terms: list[Term],
) -> Figures:
    """Mean loss of the objectives, and what the policy prefers.

    Args:
        part: its sequences are answers.
        logps: for each answer the log-probabilities of its targets.
        references: the same under the reference. Without them, an objective that has a reference
            has no loss, and rewards are those of a policy alone: beta times log-probability.
        baseline: see `stemtune.objectives.several.kto`.

    Returns:
        `loss`, and the names of `preferences_of`.
    """
    sequences = part.flat
    ours = torch.cat(list(logps))
    theirs = None if references is None else torch.cat(list(references))
    figures: Figures = {}
    if theirs is not None or not any(term.config.has_reference for term in terms):
        layout = layout_of(sequences, baseline=baseline)
        loss, told = loss_of(terms, ours, theirs, layout, totals_of(sequences))
        figures = {"loss": float(loss), **{name: float(value) for name, value in told.items()}}
    sources = [part.sources[sequence.record] for sequence in sequences]
    return {**figures, **preferences_of(sequences, ours, theirs, terms, sources)}


def preferences_of(
    sequences: Seq[Sequence],
    logps: Tensor,
    references: Tensor | None,
    terms: list[Term],
    sources: Seq[str],
) -> Figures:
    """`preference_metrics` of some answers; of several sources also `rewards_accuracy` and
    `rewards_margin` as `…/NAME`.

    Args:
        logps, references: [T] of all answers, in order.
        sources: what the source of each answer is called.
    """
    layout = layout_of(sequences)
    # The first objective that compares answers says what a reward is.
    config = next(term.config for term in terms if term.config.type != "sft")
    figures = preference_metrics(logps, references, layout, config)
    for name, mine in _by_source(sources).items():
        own = torch.zeros(len(sequences), dtype=torch.bool)
        own[mine] = True
        found = preference_metrics(logps, references, layout, config, own)
        for kind in ("rewards_accuracy", "rewards_margin"):
            if kind in found:
                figures[f"{kind}/{name}"] = found[kind]
    return figures


def held_out_figures(
    part: Part,
    scorer: Scorer,
    terms: list[Term],
    logps: Seq[Tensor],
    references: Seq[Tensor] | None,
) -> Figures:
    """`supervised_figures`, or `preference_figures` where answers are compared.

    Args:
        logps, references: of all sequences of the part, in order.
    """
    if not scorer.compares:
        return supervised_figures(part, losses_by_record(part, logps))
    baseline = None if references is None else scorer.baseline(part.flat)
    return preference_figures(part, logps, references, baseline, terms)


def _by_source(sources: Seq[str]) -> dict[str, list[int]]:
    """Which records each source has, by its file's name; nothing where there is only one."""
    members: dict[str, list[int]] = {}
    for number, source in enumerate(sources):
        members.setdefault(source, []).append(number)
    if len(members) < 2:
        return {}
    short = [Path(source).name for source in members]
    names = short if len(set(short)) == len(short) else list(members)
    return dict(zip(names, members.values(), strict=True))
