"""The contestants. Each is made ready outside of the timed part and then does optimizer steps.

A step is one whole optimizer step of the same work: forward and backward of all samples, the mean
negative log-likelihood over all their targets, and one AdamW step (fused, no weight decay, no
clipping). It returns the loss before the update and the seconds it took. For bfloat16 every
contestant has the frozen base in bfloat16, the adapter in fp32, and autocast around its forward
pass: without autocast PEFT would compute the adapter in fp32, which is slower.
"""

import contextlib
import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from workload import Sample, Work, batches, separate_work, shared_work, split_by_distinct

import stemtune as st

LEARNING_RATE = 1e-4
IGNORED = -100

Step = Callable[[Sequence[Sample]], tuple[float, float]]
Maker = Callable[[Any, Any, int], Step]


def stemtune_tree(model: Any, _tokenizer: Any, budget: int, backend: str = "auto") -> Step:
    """The tree, by stemtune's public functions, or its `padded` path. Splitting into micro-batches
    and building the trees is part of the step, and of its time."""
    optimizer = _adamw(model)

    def step(samples: Sequence[Sample]) -> tuple[float, float]:
        start = time.perf_counter()
        total = sum(sum(sample.is_target) for sample in samples)
        loss = 0.0
        for part in split_by_distinct(samples, budget):
            tree = st.build_tree([st.Sequence(s.input_ids, s.is_target) for s in part])
            with autocast(model):
                share = -st.target_logprobs(model, tree, backend).sum() / total
            share.backward()
            loss += share.item()
        optimizer.step()
        optimizer.zero_grad()
        return loss, time.perf_counter() - start

    return step


def stemtune_alone(model: Any, tokenizer: Any, _budget: int) -> Step:
    """Each sample as a tree of its own: the execution without the sharing."""
    return stemtune_tree(model, tokenizer, 1)


def hand(model: Any, _tokenizer: Any, _budget: int, batch: int = 1) -> Step:
    """A plain loop, as good as one gets without sharing: `batch` samples at a time through the
    decoder, hidden states gathered at the sources, the head on those alone, softmax in fp32."""
    optimizer = _adamw(model)

    def step(samples: Sequence[Sample]) -> tuple[float, float]:
        start = time.perf_counter()
        total = sum(sum(sample.is_target) for sample in samples)
        loss = 0.0
        for rows in batches(samples, batch):
            with autocast(model):
                share = padded_nll(model, rows) / total
            share.backward()
            loss += share.item()
        optimizer.step()
        optimizer.zero_grad()
        return loss, time.perf_counter() - start

    return step


def hand_batch4(model: Any, tokenizer: Any, budget: int) -> Step:
    """The plain loop with four samples at a time: shows that batch 1 is its best on a CPU."""
    return hand(model, tokenizer, budget, batch=4)


def padded_nll(model: Any, rows: Sequence[Sample]) -> Tensor:
    """The summed loss of one batch, padded on the right. No attention mask is given: under causal
    attention nothing scored sees what is to its right, and SDPA's causal kernel is the fast one."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for at, row in enumerate(rows):
        ids[at, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[at, : len(row.input_ids)] = torch.tensor(_labels(row))
    base = model.get_base_model()
    hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    labels = labels[:, 1:]
    scored = labels != IGNORED
    logits = base.get_output_embeddings()(hidden[:, :-1][scored])
    return F.cross_entropy(logits.float(), labels[scored], reduction="sum")


def trl(model: Any, tokenizer: Any, _budget: int, head_on_targets: bool = False) -> Step:
    """TRL's SFTTrainer at its best on a CPU: batch 1, one accumulation step a sample, SDPA, no
    activation checkpointing (its default recomputes), no truncation, no logging, no packing.

    Each step is a whole `train()` with `max_steps=1`, timed from `on_step_begin` to `on_step_end`:
    TRL's own loop, not one written around its parts. In that time are its forward and backward
    passes, its metrics, its optimizer step and zeroing of gradients. Not in it: making the
    dataset and the loader, collating (batches are fetched before `on_step_begin`), preparing the
    model, which a real run does once. The optimizer is made by the first `train()` and kept.
    """
    module = importlib.import_module("trl")  # late: nobody else should pay for TRL, or need it
    config = module.SFTConfig(**trl_settings(model), dataset_kwargs={"skip_prepare_dataset": True})
    clock = _step_clock()
    trainer = module.SFTTrainer(
        model=model,
        args=config,
        train_dataset=_dataset([Sample([0, 0], [False, True])]),  # each step puts its own in
        processing_class=tokenizer,
        callbacks=[clock],
    )
    _silence(trainer)

    def step(samples: Sequence[Sample]) -> tuple[float, float]:
        trainer.train_dataset = _dataset(samples)
        trainer.args.gradient_accumulation_steps = len(samples)
        with _fused_head_on_targets() if head_on_targets else contextlib.nullcontext():
            result = trainer.train()
        return float(result.training_loss), clock.seconds

    return step


def trl_settings(model: Any) -> dict[str, Any]:
    """What its trainers for supervised data and for preferences are given alike."""
    return {
        "output_dir": str(Path(tempfile.gettempdir()) / "stemtune-bench-trl"),
        "per_device_train_batch_size": 1,
        "max_steps": 1,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": _is_half(model),
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch_fused",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trl_head(model: Any, tokenizer: Any, budget: int) -> Step:
    """TRL with its fused head on targets alone, what it does on CUDA. On a CPU it scores every
    position; this is what TRL would be with one line changed, and the fairer opponent."""
    return trl(model, tokenizer, budget, head_on_targets=True)


def autocast(model: Any) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast for a model whose base is held in it, else nothing."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=_is_half(model))


def _is_half(model: Any) -> bool:
    return model.get_base_model().dtype == torch.bfloat16


def _adamw(model: Any) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def _labels(sample: Sample) -> list[int]:
    return [
        token if target else IGNORED
        for token, target in zip(sample.input_ids, sample.is_target, strict=True)
    ]


def _dataset(samples: Sequence[Sample]) -> Any:
    rows = [{"input_ids": sample.input_ids, "labels": _labels(sample)} for sample in samples]
    return importlib.import_module("datasets").Dataset.from_list(rows)


def _step_clock() -> Any:
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        """The seconds of the last optimizer step."""

        seconds = 0.0

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self._start = time.perf_counter()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self._start

    return StepClock()


def _silence(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _fused_head_on_targets() -> Any:
    """TRL asks `_use_triton` in two places. In `trainer.utils` the answer decides whether only
    targets are scored: there it becomes yes. In `kernels.chunked_logprob` it chooses Triton
    kernels: there it stays no, and the same sums are done in torch."""
    utils = importlib.import_module("trl.trainer.utils")
    return mock.patch.object(utils, "_use_triton", return_value=True)


PEERS: dict[str, Maker] = {
    "trl": trl,
    "trl_head": trl_head,
    "hand": hand,
    "hand_batch4": hand_batch4,
}
CONTESTANTS: dict[str, Maker] = {
    "stemtune": stemtune_tree,
    "stemtune_alone": stemtune_alone,
    **PEERS,
}


def work_of(name: str, samples: Sequence[Sample], budget: int) -> Work:
    """What contestant `name` computes in a step of these samples."""
    if name == "stemtune":
        parts = [shared_work(part) for part in split_by_distinct(samples, budget)]
        return sum(parts, Work(0, 0, 0))
    if name == "trl":
        return separate_work(samples, head_everywhere=True)
    return separate_work(samples, batch=4 if name == "hand_batch4" else 1)
