"""A step's gradient: its micro-batches through the model, one after another."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from stemtune.data.prepare import Part
from stemtune.figures import preferences_of
from stemtune.guards import suspects
from stemtune.lower import LowerStates
from stemtune.metrics import Metrics
from stemtune.model.activations import OffloadedActivations
from stemtune.objectives import Term, Totals, layout_of, loss_of, totals_of
from stemtune.plan.pack import count_distinct
from stemtune.reference import StoredReference
from stemtune.score import Scorer, autocast, in_order
from stemtune.tree.build import build_tree
from stemtune.tree.logprobs import target_logprobs
from stemtune.tree.sequence import Sequence

OTHER_DROPOUT = 2**40 + 15  # from one process's seed to the next one's


@dataclass(frozen=True)
class Step:
    """What a step, or a micro-batch of it, is run with.

    Attributes:
        totals: of the whole step: what its losses are divided by.
        references: for each sequence the reference's log-probabilities.
        baseline: KTO's, of the whole step.
    """

    sequences: list[Sequence]
    totals: Totals
    references: list[Tensor] | None
    baseline: Tensor | None

    def of(self, batch: list[int]) -> "Step":
        """A micro-batch."""
        theirs = self.references
        return replace(
            self,
            sequences=[self.sequences[index] for index in batch],
            references=None if theirs is None else [theirs[index] for index in batch],
        )


@dataclass(frozen=True)
class Outcome:
    """What a step came to.

    Attributes:
        loss: its mean.
        distinct: tokens that were computed.
        told: the objectives' figures.
        logps: for each sequence the log-probabilities of its targets.
    """

    step: Step
    loss: float
    distinct: int
    told: Metrics
    logps: list[Tensor]

    @property
    def suspects(self) -> list[int]:
        """Records to name if the loss or the gradient is no number."""
        return suspects(self.step.sequences, self.logps)


@dataclass(frozen=True)
class Share:
    """What a process found of a step, in its own micro-batches; see `Outcome`.

    Attributes:
        logps: by index of the sequence.
    """

    loss: float
    distinct: int
    told: dict[str, float]
    logps: dict[int, Tensor]


def _added_up(shares: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, value in chain(*(share.items() for share in shares)):
        total[name] = total.get(name, 0.0) + value
    return total


class StepRunner:
    """Turns the records of a step into the gradient of its loss.

    Attributes:
        stored: the reference's log-probabilities, where they are stored.
        lower: what the blocks below the adapter give, where that is kept.
    """

    def __init__(
        self,
        scorer: Scorer,
        part: Part,
        terms: list[Term],
        accelerator: Accelerator,
        optimizer: Any,
        *,
        activation_offload: bool = False,
    ) -> None:
        self.activation_offload = activation_offload
        self.scorer, self.part, self.terms = scorer, part, terms
        self.accelerator, self.optimizer = accelerator, optimizer
        self.model = scorer.model
        self.stored: StoredReference | None = None
        self.lower: LowerStates | None = None

    def gather(self, records: Seq[int]) -> Step:
        """What a step needs besides the trained model: known before any of it is run."""
        sequences = self.part.of(records)
        return Step(
            sequences,
            totals_of(sequences),
            self.references(self.part, records),
            self.scorer.baseline(sequences),
        )

    def references(self, part: Part, records: Seq[int]) -> list[Tensor] | None:
        """For each sequence the reference's log-probabilities; None where no objective has one."""
        if self.stored is None:
            return self.scorer.reference(part.of(records))
        return self.stored.of(part, records)

    def rehearse(self, steps: Seq[Seq[int]]) -> None:
        """Run the largest micro-batch of some steps for nothing but the memory it takes: what does
        not fit is found before the first step, and halves the micro-batches of all. A GPU's
        allocator finds room for smaller ones in what it has taken for the largest, not for a larger
        one in that of smaller ones.

        Args:
            steps: the records of each.
        """
        step = self.gather(max(steps, key=self._most_at_once))
        self.model.train()  # activations are checkpointed in training alone

        def largest() -> None:
            self.optimizer.zero_grad()
            self._backward(self.loss(step.of(self.scorer.largest(step.sequences)))[0])

        self.scorer.while_it_fits(step.sequences, largest)
        self.optimizer.zero_grad()

    def accumulate(self, step: Step, seed: int) -> Outcome:
        """The step's gradient, micro-batch by micro-batch, summed over the processes. Out of
        memory, the whole step is done again in smaller micro-batches.

        Args:
            seed: of its dropout, which so depends neither on what ran before nor on a resume. Each
                process draws its own.
        """
        ranks = self.scorer.ranks

        def mine() -> Share:
            self.optimizer.zero_grad()
            torch.manual_seed(seed + ranks.rank * OTHER_DROPOUT)
            return self._run_micro_batches(step)

        share = self.scorer.while_it_fits(step.sequences, mine)
        ranks.add_gradients(p for p in self.model.parameters() if p.requires_grad)
        shares = ranks.gather(share)
        logps = in_order(share.logps for share in shares)
        told = _added_up(share.told for share in shares)
        if self.scorer.compares:
            theirs = None if step.references is None else torch.cat(step.references)
            sources = [self.part.sources[sequence.record] for sequence in step.sequences]
            told |= preferences_of(step.sequences, torch.cat(logps), theirs, self.terms, sources)
        loss, distinct = (
            sum(of) for of in zip(*((s.loss, s.distinct) for s in shares), strict=True)
        )
        return Outcome(step, loss, int(distinct), told, logps)

    def _run_micro_batches(self, step: Step) -> Share:
        """Those of this process."""
        self.model.train()
        total, distinct = 0.0, 0
        told: dict[str, float] = {}
        logps: dict[int, Tensor] = {}
        for batch in self.scorer.micro_batches(step.sequences):
            part = step.of(batch)
            loss, found, more = self.loss(part)
            self._backward(loss)
            total += float(loss.detach())
            told = _added_up([told, {name: float(value) for name, value in more.items()}])
            counts = [sequence.num_targets for sequence in part.sequences]
            for index, mine in zip(batch, found.detach().cpu().split(counts), strict=True):
                logps[index] = mine
            distinct += self._computed(part.sequences)
        return Share(total, distinct, told, logps)

    def _activations(self) -> AbstractContextManager[None]:
        """Where they wait for the backward pass."""
        if not self.activation_offload:
            return nullcontext()
        return OffloadedActivations(self.model, torch.device("cpu"))

    def _backward(self, loss: Tensor) -> None:
        if loss.requires_grad:
            self.accelerator.backward(loss)

    def _most_at_once(self, records: Seq[int]) -> int:
        """Tokens of the largest micro-batch of a step."""
        sequences = self.part.of(records)
        return self._computed([sequences[index] for index in self.scorer.largest(sequences)])

    def _computed(self, sequences: list[Sequence]) -> int:
        """Tokens of a micro-batch that go through the model."""
        if self.scorer.backend == "padded":
            return sum(map(len, sequences))
        return count_distinct(sequences)

    def loss(self, step: Step) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What a micro-batch adds to its step's loss, its log-probabilities [T], and what its
        objectives tell."""
        tree = build_tree(step.sequences)
        below = None if self.lower is None else self.lower.of(tree)
        with autocast(self.model), self._activations():
            logps = target_logprobs(self.model, tree, self.scorer.backend, below=below)
        layout = layout_of(step.sequences, logps.device, step.baseline)
        theirs = None if step.references is None else torch.cat(step.references).to(logps.device)
        loss, told = loss_of(self.terms, logps, theirs, layout, step.totals)
        return loss, logps, told
