"""What the log-probabilities of a micro-batch belong to.

Shapes: T targets, S sequences, P pairs of a better and a worse one.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from stemtune.tree.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Layout:
    """Which sequence each target belongs to, and which sequence is preferred to which.

    Attributes:
        sequence: [T] the sequence of each target, in order.
        weight: [T] fp32: how much each counts in a sum over targets.
        record: [S] the record of each sequence.
        chosen: [S] whether it is wanted: preferred to another one, or labelled as good.
        pairs: [P, 2] a better and a worse sequence of one record.
        baseline: what KTO compares with: see `stemtune.objectives.kto`.
    """

    sequence: Tensor
    weight: Tensor
    record: Tensor
    chosen: Tensor
    pairs: Tensor
    baseline: Tensor | None = None

    @cached_property
    def length(self) -> Tensor:
        """[S] how many targets each sequence has."""
        return torch.bincount(self.sequence, minlength=len(self.record))

    @cached_property
    def best(self) -> Tensor:
        """[S] wanted, and none is preferred to it."""
        beaten = torch.zeros_like(self.chosen)
        beaten[self.pairs[:, 1]] = True
        return self.chosen & ~beaten

    def sums(self, values: Tensor) -> Tensor:
        """[S] sums of [T] values over each sequence."""
        return values.new_zeros(len(self.record)).index_add(0, self.sequence, values)

    def means(self, values: Tensor) -> Tensor:
        """[S] means of [T] values over each sequence."""
        return self.sums(values) / self.length.clamp(min=1)


def layout_of(
    sequences: Seq[Sequence], device: torch.device | str = "cpu", baseline: Tensor | None = None
) -> Layout:
    """The layout of some sequences. Pairs are those of which both are there."""
    counts = [sequence.num_targets for sequence in sequences]
    number = torch.arange(len(sequences))
    weight = torch.tensor([sequence.weight for sequence in sequences], dtype=torch.float32)
    repeats = torch.tensor(counts, dtype=torch.int64)
    return Layout(
        sequence=number.repeat_interleave(repeats).to(device),
        weight=weight.repeat_interleave(repeats).to(device),
        record=torch.tensor([s.record for s in sequences], dtype=torch.int64).to(device),
        chosen=torch.tensor([s.role == "chosen" for s in sequences], dtype=torch.bool).to(device),
        pairs=torch.tensor(pairs_of(sequences), dtype=torch.int64).reshape(-1, 2).to(device),
        baseline=baseline,
    )


def pairs_of(sequences: Seq[Sequence]) -> list[tuple[int, int]]:
    """Places of a better and a worse sequence, from what each says it is preferred to."""
    place = {(s.record, s.answer): number for number, s in enumerate(sequences)}
    return [
        (number, place[s.record, worse])
        for number, s in enumerate(sequences)
        for worse in s.preferred_to
        if (s.record, worse) in place
    ]


@dataclass(frozen=True)
class Totals:
    """What the losses of a step are divided by: known before any of it is run.

    Attributes:
        targets: the weight of all targets.
        best: how many targets the best answers have.
        pairs: pairs of a better and a worse answer.
        answers: answers, whether wanted or not.
        rankings: records that have pairs.
    """

    targets: float
    best: float
    pairs: float
    answers: float
    rankings: float

    def __add__(self, other: "Totals") -> "Totals":
        names = [field.name for field in fields(self)]
        return Totals(**{name: getattr(self, name) + getattr(other, name) for name in names})


def totals_of(sequences: Seq[Sequence]) -> Totals:
    """The totals of a step's sequences."""
    layout = layout_of(sequences)
    ranked = layout.record[layout.pairs[:, 0]]
    return Totals(
        targets=sum(sequence.weight * sequence.num_targets for sequence in sequences),
        best=float(layout.length[layout.best].sum()),
        pairs=float(len(layout.pairs)),
        answers=float(len(sequences)),
        rankings=float(len(torch.unique(ranked))),
    )
