"""What fits into a device's memory: the largest micro-batch, and what to change."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch

from stemtune.config import Config
from stemtune.data.prepare import Part
from stemtune.estimate import Estimate, Estimator
from stemtune.plan.pack import count_distinct, pack
from stemtune.tree.build import Tree, build_tree
from stemtune.tree.logprobs import base_model
from stemtune.tree.sequence import Sequence
from stemtune.tree.support import why_no_tree

SMALLEST = 512  # distinct tokens of a micro-batch
LARGEST = {"cpu": 8192, "cuda": 65536, "mps": 8192}  # past these a larger tree is not faster
SAFE = 0.9  # of a memory: an estimate may be a tenth too low
FALLBACK = 2048  # distinct tokens of a micro-batch where there is no estimate
LOOKED_AT = 20  # steps, besides the one with the longest records
OFFLOAD = "model.offload_layers"
Settings = dict[str, Any]  # by name, as on the command line


def heavy_steps(part: Part, plan: Seq[Seq[int]], config: Config) -> list[Seq[int]]:
    """The records of steps one of which may take most memory: those of the longest records, of
    which no step need be made, and of the first steps."""
    return [part.longest_records(config.train.batch_size), *plan[:LOOKED_AT]]


class Workload:
    """The steps that may take most.

    Args:
        part: what is trained on.
        plan: the records of each step.
    """

    def __init__(self, part: Part, plan: Seq[Seq[int]], config: Config) -> None:
        self.steps = [part.of(records) for records in heavy_steps(part, plan, config)]
        self.together = config.answers != "best"
        self._found: dict[tuple[int, bool, int], Tree] = {}

    @property
    def tokens(self) -> int:
        """No step has more, if it shares anything."""
        return sum(map(len, self.steps[0]))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.steps[0]))

    def largest(self, budget: int, *, shared: bool, max_length: int) -> Tree:
        """The largest micro-batch.

        Args:
            budget: `train.micro_batch_tokens`.
            shared: whether sequences share a tree.
            max_length: of a longer sequence only the end counts.
        """
        key = (budget, shared, min(max_length, self.longest))
        if key not in self._found:
            steps = [[_end_of(one, max_length) for one in step] for step in self.steps]
            largest = (self._largest(step, budget, shared) for step in steps)
            self._found[key] = build_tree(max(largest, key=count_distinct))
        return self._found[key]

    def _largest(self, step: list[Sequence], budget: int, shared: bool) -> list[Sequence]:
        batches = pack(step, budget, shared=shared, together=self.together)[0]
        return [step[index] for index in batches[0]]  # the largest comes first


def _end_of(sequence: Sequence, length: int) -> Sequence:
    if len(sequence) <= length:
        return sequence
    is_target = sequence.is_target[-length:].copy()
    is_target[0] = False
    return Sequence(sequence.input_ids[-length:], is_target, record=sequence.record)


@dataclass(frozen=True)
class Change:
    """Settings of the run file, and the bytes that training would take with them."""

    settings: Settings
    total: int


class Fit:
    """Which settings fit into a memory, with a tenth to spare. Run files name their dtype: see
    `with_dtype`.

    Args:
        device: whose memory it is.
        memory: bytes.
    """

    def __init__(self, work: Workload, device: torch.device, memory: int) -> None:
        self.work, self.device, self.memory = work, device, SAFE * memory
        self._estimator = Estimator(device)

    def estimate(self, config: Config, budget: int) -> Estimate:
        """Of a run in micro-batches of so many tokens.

        Raises:
            NoEstimateError, ModelError, ConfigError: see `Estimator.of`.
        """
        shared = self._estimator.backend(config) != "padded"
        tree = self.work.largest(budget, shared=shared, max_length=config.data.max_length)
        return self._estimator.of(config, tree)

    def why_padded(self, config: Config) -> str:
        """Why nothing is shared on this base; empty if a tree can be."""
        return why_no_tree(base_model(self._estimator.simulation(config).model))

    def largest_budget(self, config: Config) -> int | None:
        """The most tokens of a micro-batch that fit, a multiple of `SMALLEST`, and no more than a
        step has; None if the fewest are too many.

        Raises:
            NoEstimateError, ModelError, ConfigError: see `Estimator.of`.
        """
        high = -(-min(LARGEST[self.device.type], self.work.tokens) // SMALLEST)
        if self._fits(config, high * SMALLEST):
            return high * SMALLEST
        low = 0  # fits, as far as is known; high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(config, middle * SMALLEST) else (low, middle)
        return low * SMALLEST or None

    def _fits(self, config: Config, budget: int = SMALLEST) -> bool:
        return self.estimate(config, budget).total <= self.memory

    def advise(self, config: Config, budget: int) -> list[Change]:
        """What makes a run fit that does not: single settings, cheapest in time first; if none is
        enough, one after another, each line with those before it, until it fits. Empty if it never
        does. Weights are offloaded where all else that does not change what is learned is not
        enough.

        Args:
            budget: its micro-batches.

        Raises:
            NoEstimateError, ModelError, ConfigError: see `Estimator.of`.
        """
        alone = self._smaller_batches(config, {})
        for name, value in self._changes(config):
            if name == OFFLOAD:  # the others together take less time
                continue
            change = self._changed(config, {name: value}, budget)
            if change.total <= self.memory:
                alone.append(change)
        return alone or self._together(config, budget)

    def _changes(self, config: Config) -> Iterator[tuple[str, Any]]:
        """Settings that take less memory, cheapest in time first; the last two change what is
        learned."""
        on_gpu, train = self.device.type == "cuda", config.train
        if on_gpu and not train.optimizer.endswith("8bit"):
            yield "train.optimizer", "adamw_8bit"
        if config.model.dtype == "float32":
            yield "model.dtype", "bfloat16"
        pissa = config.adapter.init_weights == "pissa"  # it writes into the base
        if not (pissa or config.model.quantization or config.model.offload_layers):
            yield "model.quantization", "nf4"
        if not train.activation_checkpointing:
            yield "train.activation_checkpointing", True
        if on_gpu and not train.activation_offload:
            yield "train.activation_offload", True
        blocks = self._estimator.simulation(config).blocks
        may_offload = on_gpu and not (pissa or config.model.quantization)
        if may_offload and (config.model.offload_layers or 0) < blocks:
            yield OFFLOAD, blocks
        if config.adapter.init_from is None and config.adapter.layers is None and blocks > 1:
            yield "adapter.layers", blocks // 2
        if self.work.longest > SMALLEST:
            yield "data.max_length", self.work.longest // 2

    def _changed(self, config: Config, settings: Settings, budget: int) -> Change:
        return Change(settings, self.estimate(_with(config, settings), budget).total)

    def _smaller_batches(self, config: Config, settings: Settings) -> list[Change]:
        changed = _with(config, settings)
        budget = self.largest_budget(changed)
        if budget is None:
            return []
        total = self.estimate(changed, budget).total
        return [Change({**settings, "train.micro_batch_tokens": budget}, total)]

    def _together(self, config: Config, budget: int) -> list[Change]:
        chosen: Settings = {}
        for name, value in self._changes(config):
            chosen[name] = value
            if name == OFFLOAD:  # the two exclude each other
                chosen.pop("model.quantization", None)
            if self._fits(_with(config, chosen)):
                break
        else:
            return []
        for name in list(chosen)[-2::-1]:  # what was not enough may not be needed either
            fewer = {key: value for key, value in chosen.items() if key != name}
            if self._fits(_with(config, fewer)):
                chosen = fewer
        names = list(chosen)
        steps = [{name: chosen[name] for name in names[:end]} for end in range(1, len(names) + 1)]
        found = [self._changed(config, settings, budget) for settings in steps]
        return [*found, *self._smaller_batches(config, chosen)]


def _with(config: Config, settings: Settings) -> Config:
    for name, value in settings.items():
        section, key = name.split(".")
        changed = getattr(config, section).model_copy(update={key: value})
        config = config.model_copy(update={section: changed})
    return config
