"""KTO's baseline: answers beside prompts that they do not answer."""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from stemtune.tree.sequence import Ids, Sequence


def mismatched(sequences: Seq[Sequence]) -> list[Sequence]:
    """Each record's prompt with the answers of the record before it; the first one's with those of
    the last. Records that have the same prompt give none."""
    records: dict[int, list[Sequence]] = {}
    for sequence in (s for s in sequences if s.num_targets):
        records.setdefault(sequence.record, []).append(sequence)
    groups = list(records.values())
    if not groups:
        return []
    made: list[Sequence] = []
    for group, before in zip(groups, [groups[-1], *groups[:-1]], strict=True):
        prompt = _prompt(group[0])
        made += [
            Sequence(
                np.concatenate([prompt, answer.input_ids[len(_prompt(answer)) :]]),
                np.concatenate(
                    [np.zeros(len(prompt), np.bool_), answer.is_target[len(_prompt(answer)) :]]
                ),
                record=group[0].record,
            )
            for answer in before
            if not np.array_equal(_prompt(answer), prompt)
        ]
    return made


def _prompt(sequence: Sequence) -> Ids:
    """The ids before the first target: a thought that is not trained is among them."""
    return sequence.input_ids[: int(np.argmax(sequence.is_target))]


def baseline(logps: Seq[Tensor], reference_logps: Seq[Tensor]) -> Tensor:
    """KTO's z: the mean over sequences of Σ (log π - log ρ), not below 0."""
    if not logps:
        return torch.zeros(())
    moved = [(ours - theirs).sum() for ours, theirs in zip(logps, reference_logps, strict=True)]
    return torch.stack(moved).mean().clamp(min=0).detach()
