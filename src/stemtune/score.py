"""Log-probabilities under the model's own dtype, without a gradient."""

import logging
from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from stemtune.config import Config
from stemtune.data.prepare import Part
from stemtune.errors import OutOfMemoryError
from stemtune.model.adapter import starting_point
from stemtune.model.memory import memory_errors
from stemtune.objectives.mismatched import baseline, mismatched
from stemtune.plan.pack import MicroBatch, computed_tokens, pack
from stemtune.ranks import ALONE, Ranks
from stemtune.tree.build import build_tree
from stemtune.tree.logprobs import base_model, target_logprobs
from stemtune.tree.sequence import Sequence

log = logging.getLogger(__name__)
AT_ONCE = 1024  # records whose sequences are in memory together
T = TypeVar("T")


def autocast(model: nn.Module) -> Any:
    """Autocast to the dtype of a base in half precision: its adapter is fp32, its products are
    not. Does nothing for a base in fp32."""
    base = base_model(model)
    half = base.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(base.device.type, base.dtype if half else None, enabled=half)


def in_order(shares: Iterable[dict[int, Tensor]]) -> list[Tensor]:
    """What each process found, by index of the sequence, put together."""
    found: dict[int, Tensor] = {}
    for share in shares:
        found |= share
    return [found[index] for index in range(len(found))]


class Scorer:
    """A model, in which micro-batches it is run, and what it gives without a gradient.

    Attributes:
        compares: whether the answers of a record are compared, and so run together.
        has_reference: whether an objective compares with the model that training started from.
        budget: distinct tokens of a micro-batch; halved where memory runs out.
        ranks: the processes that share the work.
    """

    def __init__(
        self,
        model: PeftModel,
        config: Config,
        backend: str,
        budget: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.backend, self.budget, self.ranks = model, backend, budget, ranks
        self.answers = config.answers
        self.compares = config.answers != "best"
        self.has_reference = config.has_reference
        self._ask: Callable[[], None] | None = None

    @contextmanager
    def asking(self, ask: Callable[[], None]) -> Generator[None]:
        """Within it `ask` is called now and then, and may raise to stop: after each micro-batch, or
        where processes have to meet for it, after each piece of a part."""
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def micro_batches(self, sequences: Seq[Sequence]) -> list[MicroBatch]:
        """Which sequences run together, of those that are this process's to run."""
        return self._dealt_out(sequences)[self.ranks.rank]

    def largest(self, sequences: Seq[Sequence]) -> MicroBatch:
        """The micro-batch that takes most."""
        return self._dealt_out(sequences)[0][0]

    def turns(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """Which sequences the processes run at the same time, a micro-batch each."""
        return [[*chain(*turn)] for turn in zip_longest(*self._dealt_out(sequences), fillvalue=[])]

    def tokens(self, sequences: Seq[Sequence]) -> int:
        """How many are computed in all micro-batches, without running one."""
        shared = self.backend != "padded"
        batches = chain(*self._dealt_out(sequences))
        return sum(computed_tokens([sequences[i] for i in batch], shared) for batch in batches)

    def _dealt_out(self, sequences: Seq[Sequence]) -> list[list[MicroBatch]]:
        """The micro-batches of each process."""
        return pack(
            sequences,
            self.budget,
            shared=self.backend != "padded",
            together=self.compares,
            world_size=self.ranks.size,
        )

    def while_it_fits(self, sequences: Seq[Sequence], run: Callable[[], T]) -> T:
        """What `run` gives; where memory runs out, on whichever process, all of them run it again
        in smaller micro-batches.

        Args:
            sequences: what is run.

        Raises:
            OutOfMemoryError: each ran alone already.
        """
        while True:
            found: list[T] = []
            try:
                with memory_errors():
                    found.append(run())
            except torch.OutOfMemoryError:
                pass
            if not self.ranks.any(not found):
                return found[0]
            self._halve_budget(sequences)

    def _halve_budget(self, sequences: Seq[Sequence]) -> None:
        batches = list(chain(*self._dealt_out(sequences)))
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
        with nullcontext() if adapter else self.model.disable_adapter():
            mine = self.while_it_fits(sequences, lambda: self._logps(sequences))
        return in_order(self.ranks.gather(mine))

    def _logps(self, sequences: Seq[Sequence]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
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
                    if self._ask is not None and self.ranks.size == 1:
                        self._ask()
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
            if self._ask is not None:
                self._ask()
        return found
