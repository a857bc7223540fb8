"""What `auto` comes to for a model and its data: the tree's back end, the micro-batch's size."""

import logging
from collections.abc import Sequence as Seq
from typing import Any

from peft import PeftModel

from stemtune.config import Config
from stemtune.model.load import commit_of
from stemtune.model.memory import auto_micro_batch_tokens
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
    if backend == "padded":
        return backend
    with autocast(model):
        verdict = self_check(model, sequences, backend)
    if verdict.passed:
        log.info(
            "self-check: tree and separate sequences differ by %.1e at most (allowed: %.1e)",
            verdict.difference,
            verdict.bound,
        )
        return backend
    log.warning(
        "the tree is not exact on this model (%s): training runs padded, nothing is shared",
        verdict.reason or f"differs by {verdict.difference:.1e}, allowed {verdict.bound:.1e}",
    )
    return "padded"


def micro_batch_tokens(model: PeftModel, wanted: Any, longest: Sequence, backend: str) -> int:
    """`train.micro_batch_tokens`, measured if it is `auto`."""
    if wanted != "auto":
        return wanted
    with autocast(model):
        budget = auto_micro_batch_tokens(model, longest, base_model(model).device, backend)
    log.info("micro-batches of up to %d tokens", budget)
    return budget


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
