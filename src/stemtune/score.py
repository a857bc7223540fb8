"""Log-probabilities under the model's own dtype, without a gradient."""

import logging
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from stemtune.config import Config
from stemtune.data.prepare import Part
from stemtune.errors import OutOfMemoryError
from stemtune.model.adapter import starting_point
from stemtune.model.memory import memory_errors
from stemtune.objectives.mismatched import baseline, mismatched
from stemtune.plan.pack import MicroBatch, pack
from stemtune.tree.build import build_tree
from stemtune.tree.logprobs import base_model, target_logprobs
from stemtune.tree.sequence import Sequence

log = logging.getLogger(__name__)
AT_ONCE = 1024  # records whose sequences are in memory together


def autocast(model: nn.Module) -> Any:
    """Autocast to the dtype of a base in half precision: its adapter is fp32, its products are
    not. Does nothing for a base in fp32."""
    base = base_model(model)
    half = base.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(base.device.type, base.dtype if half else None, enabled=half)


class Scorer:
    """A model, in which micro-batches it is run, and what it gives without a gradient.

    Attributes:
        compares: whether the answers of a record are compared, and so run together.
        has_reference: whether an objective compares with the model that training started from.
        budget: distinct tokens of a micro-batch; halved where memory runs out.
    """

    def __init__(self, model: PeftModel, config: Config, backend: str, budget: int) -> None:
        self.model, self.backend, self.budget = model, backend, budget
        self.answers = config.answers
        self.compares = config.answers != "best"
        self.has_reference = config.has_reference

    def micro_batches(self, sequences: Seq[Sequence]) -> list[MicroBatch]:
        """Which sequences run together."""
        shared = self.backend != "padded"
        return pack(sequences, self.budget, shared=shared, together=self.compares)[0]

    def halve_budget(self, sequences: Seq[Sequence]) -> None:
        """After a micro-batch of these sequences ran out of memory.

        Raises:
            OutOfMemoryError: each ran alone already.
        """
        batches = self.micro_batches(sequences)
        records = [len({sequences[index].record for index in batch}) for batch in batches]
        if all(n == 1 for n in (records if self.compares else map(len, batches))):
            longest = max(len(sequence) for sequence in sequences)
            what = f"out of memory with a single sequence of at most {longest} tokens"
            if self.compares:
                what = f"out of memory with the answers to one prompt, of at most {longest} tokens"
            hint = "set train.activation_checkpointing: true, or lower data.max_length"
            raise OutOfMemoryError(what, where="train", hint=hint) from None
        torch.cuda.empty_cache()
        self.budget //= 2
        log.warning("out of memory: micro-batches of %d tokens from now on", self.budget)

    def logps(self, sequences: Seq[Sequence], *, adapter: bool = True) -> list[Tensor]:
        """For each sequence the log-probabilities of its targets, fp32 on the CPU, without dropout,
        in the trees that training would run.

        Args:
            adapter: false for the base alone.
        """
        while True:
            try:
                with memory_errors(), nullcontext() if adapter else self.model.disable_adapter():
                    return self._logps(sequences)
            except torch.OutOfMemoryError:
                self.halve_budget(sequences)

    def _logps(self, sequences: Seq[Sequence]) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(sequences)
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), autocast(self.model):
                for batch in self.micro_batches(sequences):
                    tree = build_tree([sequences[index] for index in batch])
                    counts = [sequences[index].num_targets for index in batch]
                    logps = target_logprobs(self.model, tree, self.backend).cpu()
                    for index, part in zip(batch, torch.split(logps, counts), strict=True):
                        found[index] = part.clone()
        finally:
            self.model.train(training)
        return found

    def reference(self, sequences: Seq[Sequence]) -> list[Tensor] | None:
        """The same under the model that training started from; None where no objective needs it."""
        if not self.has_reference:
            return None
        with starting_point(self.model):
            return self.logps(sequences)

    def baseline(self, sequences: Seq[Sequence]) -> Tensor | None:
        """KTO's, of the sequences of a step; None for other objectives."""
        if self.answers != "labelled":
            return None
        others = mismatched(sequences)
        return baseline(self.logps(others), self.reference(others) or [])

    def part_logps(self, part: Part, *, adapter: bool = True) -> list[Tensor]:
        """Those of all sequences of a part, some records at a time."""
        found: list[Tensor] = []
        for start in range(0, len(part), AT_ONCE):
            records = range(start, min(start + AT_ONCE, len(part)))
            found += self.logps(part.of(records), adapter=adapter)
        return found
