"""What `auto` comes to for a model and its data: the tree's back end, the micro-batch's size."""

import logging
from collections.abc import Sequence as Seq
from typing import Any

from peft import PeftModel

from stemtune.checkpoint import Checkpoint
from stemtune.config import Config
from stemtune.data.prepare import Part
from stemtune.estimate import Estimate, NoEstimateError, with_dtype
from stemtune.fit import FALLBACK, SMALLEST, Fit, Workload
from stemtune.model.load import choose_device, commit_of
from stemtune.model.memory import free_memory, used_memory
from stemtune.ranks import ALONE, Ranks
from stemtune.score import autocast
from stemtune.tree.attention import choose_backend
from stemtune.tree.logprobs import base_model
from stemtune.tree.selfcheck import self_check
from stemtune.tree.sequence import Sequence

log = logging.getLogger(__name__)


def checked_backend(model: PeftModel, wanted: str, sequences: Seq[Sequence]) -> str:
    """The tree's back end, or `padded` where the tree is not exact on this model.

    Args:
        wanted: `model.attention`.
        sequences: of the first step; some of them are compared.
    """
    base = base_model(model)
    backend = choose_backend(wanted, base.device, base.dtype, base.config)
    others = ["segments"] if wanted == "auto" and backend != "segments" else []
    for way in [backend, *others]:  # not every GPU runs the fastest one
        if way == "padded" or _is_exact(model, sequences, way):
            return way
    log.warning("training runs padded, nothing is shared")
    return "padded"


def _is_exact(model: PeftModel, sequences: Seq[Sequence], backend: str) -> bool:
    with autocast(model):
        verdict = self_check(model, sequences, backend)
    if verdict.passed:
        log.info(
            "self-check: tree and separate sequences differ by %.1e at most (allowed: %.1e)",
            verdict.difference,
            verdict.bound,
        )
    else:
        log.warning(
            "the tree is not exact on this model, by %s (%s)",
            backend,
            verdict.reason or f"differs by {verdict.difference:.1e}, allowed {verdict.bound:.1e}",
        )
    return verdict.passed


class MemoryPlan:
    """What a run is going to take of the memory that is free now, before weights load.

    Attributes:
        config: with the dtype that `auto` comes to.
        facts: for `run.json`, in bytes: `free` and `used` before, `estimate` by part.
    """

    def __init__(
        self, config: Config, part: Part, plan: Seq[Seq[int]], ranks: Ranks = ALONE
    ) -> None:
        device = choose_device(config.model.device)
        self.ranks = ranks
        self.config = ranks.same(with_dtype(config, device))
        self.free = min(ranks.gather(free_memory(device)))
        if device.type == "cpu":
            self.free //= ranks.on_this_machine
        self.facts: dict[str, Any] = {"free": self.free, "used": used_memory(device)}
        self._fit = Fit(Workload(part, plan, config), device, self.free)

    def micro_batch_tokens(
        self, saved: Checkpoint | None = None, *, backend: str | None = None
    ) -> int:
        """`train.micro_batch_tokens`, or where it is `auto`, the largest micro-batches that fit.
        What the run takes with them is said.

        Args:
            saved: what it goes on from: other micro-batches would draw other dropout.
            backend: of the tree, once it is known.
        """
        wanted = self.config.train.micro_batch_tokens
        backend = backend or self.config.model.attention
        if saved is not None:
            backend = saved.state["backend"]
            wanted = saved.state["budget"] if wanted == "auto" else wanted
        model = self.config.model.model_copy(update={"attention": backend})
        config = self.config.model_copy(update={"model": model})
        try:
            if wanted == "auto":
                wanted = self._fit.largest_budget(config) or SMALLEST
            self._tell(self._fit.estimate(config, wanted))
        except NoEstimateError as error:
            log.info("memory: no estimate for this base (%s)", error)
            self.facts["estimate"] = None
            wanted = FALLBACK if wanted == "auto" else wanted
        return self.ranks.same(wanted)

    def _tell(self, found: Estimate) -> None:
        if self.facts.get("estimate") == found.to_json():
            return
        self.facts["estimate"] = found.to_json()
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found.parts.items())
        log.info(
            "memory: about %.2f GB of %.2f GB that are free, in micro-batches of %d tokens (%s)",
            found.total / 1e9,
            self.free / 1e9,
            found.tokens,
            parts,
        )
        if found.total > self.free:
            log.warning("this does not seem to fit: `stemtune check` says what to change")


def resolved(config: Config, model: PeftModel, backend: str, budget: int) -> Config:
    """The run file with what `auto` came to."""
    base = base_model(model)
    chosen = {
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "attention": backend,
        "revision": commit_of(config.model),
    }
    adapter: dict[str, Any] = {}
    if config.adapter.init_from is not None:
        lora: Any = model.peft_config["default"]
        names = lora.target_modules  # a pattern, or names
        names = names if isinstance(names, str) else sorted(names)
        adapter = {"r": lora.r, "alpha": lora.lora_alpha, "target_modules": names}
    return config.model_copy(
        update={
            "adapter": config.adapter.model_copy(update=adapter),
            "model": config.model.model_copy(update=chosen),
            "train": config.train.model_copy(update={"micro_batch_tokens": budget}),
        }
    )
