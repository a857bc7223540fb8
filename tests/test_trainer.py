"""A run from start to end: what is refused, what goes wrong, what is left behind."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import stemtune as st
from stemtune import checkpoint, rundir, score
from stemtune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    DivergedError,
    ModelError,
    OutOfMemoryError,
    OutputBusyError,
)
from stemtune.objectives import Layout, terms_of, totals_of
from tests.runs import (
    IGNORED,
    Spy,
    adapter_of,
    checkpoint_names,
    dialogue_rows,
    make_config,
    metrics_of,
    run_info,
    steps_of,
    write_rows,
)
from tests.trees import largest_error, one_by_one

pytestmark = IGNORED
SHORT = ["train.max_steps=4", "train.batch_size=4"]
EVALUATED = ["data.eval_fraction=0.2"]


def plain(base: Path) -> Any:
    """The base by transformers alone: a fresh adapter changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def sequences_of(trainer: st.Trainer, records: list[int]) -> list[st.Sequence]:
    return [s for record in records for s in trainer.data.train.sequences[record]]


# -- objectives -------------------------------------------------------------------------------


def test_an_objective_of_the_users(tmp_path: Path, tiny_base: Path) -> None:
    def squares(
        logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert reference_logps is None
        return (layout.weight * logps**2).sum(), {}

    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT), objective=squares)
    logps = one_by_one(plain(tiny_base), sequences_of(trainer, trainer.plan[0]))
    trainer.train()
    assert steps_of(tmp_path / "run")[0]["loss"] == pytest.approx(
        float((logps**2).mean()), abs=1e-4
    )


@pytest.mark.parametrize("backend", ["segments", "padded"])
def test_compute_loss_tells_log_probabilities(
    tmp_path: Path, tiny_base: Path, backend: str
) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, f"model.attention={backend}"))
    sequences = sequences_of(trainer, trainer.plan[0])
    totals = replace(totals_of(sequences), targets=50.0)
    loss, logps = trainer.compute_loss(sequences, totals, return_outputs=True)
    expected = one_by_one(plain(tiny_base), sequences)
    assert largest_error(logps, expected) < 1e-4
    assert float(loss.detach()) == pytest.approx(-float(expected.sum()) / 50.0, abs=1e-4)
    assert loss.requires_grad


def test_held_out_loss(tmp_path: Path, tiny_base: Path) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *EVALUATED, "adapter.dropout=0.5"))
    expected = -one_by_one(plain(tiny_base), trainer.data.eval.flat)
    metrics = trainer.evaluate(prefix="test")
    assert metrics == {
        "test_loss": pytest.approx(float(expected.mean()), abs=1e-4),
        "test_perplexity": pytest.approx(math.exp(float(expected.mean())), rel=1e-3),
        "test_targets": expected.numel(),
    }
    records = trainer.record_losses(trainer.data.eval)
    assert [len(r) for r in records] == [
        sum(s.num_targets for s in sequences) for sequences in trainer.data.eval.sequences
    ]


@pytest.fixture
def stretched(tmp_path: Path, tiny_base: Path) -> Path:
    """A base that no tree can run: its position encoding depends on the sequence's length."""
    base = tmp_path / "stretched"
    shutil.copytree(tiny_base, base)
    values = json.loads((base / "config.json").read_text())
    rope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10_000.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    rope["original_max_position_embeddings"] = 64
    values |= {"rope_parameters": rope, "max_position_embeddings": 4096}
    (base / "config.json").write_text(json.dumps(values))
    return base


@pytest.mark.parametrize("budget", [200, 100_000])
def test_a_base_without_a_tree_runs_padded(
    tmp_path: Path, stretched: Path, budget: int, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [*SHORT, *EVALUATED, f"train.micro_batch_tokens={budget}"]
    trainer = st.Trainer(make_config(tmp_path, stretched, *overrides))
    expected = -one_by_one(plain(stretched), sequences_of(trainer, trainer.plan[0]))
    held_out = -one_by_one(plain(stretched), trainer.data.eval.flat)
    trainer.train()
    lengths = [len(s) for part in (trainer.data.train, trainer.data.eval) for s in part.flat]
    assert min(lengths) < 64 < max(lengths), "this test shows nothing"
    first, second = metrics_of(tmp_path / "run")[:2]
    assert first["eval_loss"] == pytest.approx(float(held_out.mean()), abs=1e-4)
    assert second["loss"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert run_info(tmp_path / "run")["attention"] == "padded"
    assert "depends on the length" in caplog.text and "nothing is shared" in caplog.text


def test_a_base_without_a_tree_resumes_with_the_same_run_file(
    tmp_path: Path, stretched: Path
) -> None:
    config = make_config(tmp_path, stretched, *SHORT, "model.attention=segments")
    first = st.train(config)
    again = st.train(config, resume=True)
    assert again.metrics["step"] == first.metrics["step"] == 4


def test_a_base_without_a_tree_finds_its_budget(tmp_path: Path, stretched: Path) -> None:
    result = st.train(make_config(tmp_path, stretched, *SHORT, "train.micro_batch_tokens=auto"))
    resolved = st.load_config(result.output_dir / "config.yaml")
    assert isinstance(resolved.train.micro_batch_tokens, int)
    assert resolved.model.attention == "padded"


# -- what a run leaves behind -----------------------------------------------------------------

STEP_KEYS = {
    "step", "epoch", "loss", "lr", "grad_norm", "records", "targets", "tokens", "distinct_tokens",
    "seconds", "samples_per_second", "tokens_per_second", "distinct_tokens_per_second", "memory",
}  # fmt: skip


def test_a_run_folder(tmp_path: Path, tiny_base: Path) -> None:
    result = st.train(make_config(tmp_path, tiny_base, *SHORT, *EVALUATED, "train.eval_steps=2"))
    run = tmp_path / "run"
    assert (result.output_dir, result.adapter_dir) == (run, run / "adapter")
    info = run_info(run)
    assert (info["phase"], info["state"], "reason" in info) == ("done", "done", False)
    assert info["ledger"]["rows"] == 20 and info["steps"] == 4
    assert info["versions"]["torch"] == torch.__version__
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "run.json", "metrics.jsonl", "log.txt", "checkpoints"}
    assert not [name for name in names if name.endswith(".tmp")]
    log = (run / "log.txt").read_text()
    assert "self-check" in log and "step 4/4" in log
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    for line in lines:
        if "loss" in line:
            assert line.keys() == STEP_KEYS
            assert 0 < line["records"] <= 4 and line["distinct_tokens"] < line["tokens"]
        else:
            assert line.keys() == {"step", "eval_loss", "eval_perplexity", "eval_targets"}
    assert result.metrics["step"] == 4
    assert result.metrics["eval_loss"] == lines[-1]["eval_loss"]


def test_the_resolved_run_file_gives_the_same_run(tmp_path: Path, tiny_base: Path) -> None:
    auto = ["model.device=auto", "model.attention=auto", "train.micro_batch_tokens=auto"]
    st.train(make_config(tmp_path, tiny_base, *SHORT, *auto))
    again = st.load_config(tmp_path / "run" / "config.yaml", [f"output.dir={tmp_path / 'again'}"])
    assert again.model.attention == "segments" and again.model.device == "cpu"
    assert isinstance(again.train.micro_batch_tokens, int)
    st.train(again)
    losses = [[line["loss"] for line in steps_of(tmp_path / run)] for run in ("run", "again")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("save_steps", [3, 4, 100])
def test_the_last_step_is_always_saved(tmp_path: Path, tiny_base: Path, save_steps: int) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT, f"train.save_steps={save_steps}")
    result = st.train(config)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == sorted({min(save_steps, 4), 4})
    assert_adapter_of_step(result.adapter_dir, 4)


def assert_adapter_of_step(folder: Path, step: int) -> None:
    path = folder.parent / "checkpoints" / f"step-{step:06d}"
    saved = checkpoint.read(path).tensors["adapter"]
    ours = adapter_of(folder)
    theirs = {name.replace(".default", ""): tensor for name, tensor in saved.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def worse_after(steps: int) -> Spy:
    """SFT that turns round: the held-out loss is best after so many steps."""
    spy = Spy()

    def objective(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = spy(*arguments)
        return (loss if spy.calls <= steps else -loss), metrics

    return objective  # type: ignore[return-value]


OVERFITTED = [*EVALUATED, "train.max_steps=7", "train.eval_steps=1", "train.warmup_ratio=0"]
OVERFITTED += ["train.lr_scheduler_type=constant", "train.max_grad_norm=0"]
# AdamW's momentum carries on for a step.


@pytest.mark.parametrize(("wanted", "other"), [("best", "last"), ("last", "best")])
def test_best_and_last(tmp_path: Path, tiny_base: Path, wanted: str, other: str) -> None:
    overrides = [*OVERFITTED, f"output.final_adapter={wanted}", "train.save_total_limit=1"]
    result = st.train(make_config(tmp_path, tiny_base, *overrides), objective=worse_after(3))
    run = tmp_path / "run"
    evals = {line["step"]: line["eval_loss"] for line in metrics_of(run) if "eval_loss" in line}
    best = min(evals, key=evals.__getitem__)
    assert 0 < best < 7, "this test shows nothing"
    steps = {"best": best, "last": 7}
    assert checkpoint.steps(run / "checkpoints") == sorted(steps.values())
    assert_adapter_of_step(result.adapter_dir, steps[wanted])
    assert_adapter_of_step(run / f"adapter-{other}", steps[other])
    assert not (run / f"adapter-{wanted}").exists()


def test_one_adapter_where_the_best_is_the_last(tmp_path: Path, tiny_base: Path) -> None:
    result = st.train(make_config(tmp_path, tiny_base, *OVERFITTED))
    assert_adapter_of_step(result.adapter_dir, 7)
    assert not list((tmp_path / "run").glob("adapter-*"))


def test_save_model(tmp_path: Path, tiny_base: Path) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT))
    trainer.train()
    trainer.save_model(tmp_path / "copy")
    ours, theirs = adapter_of(tmp_path / "copy"), adapter_of(tmp_path / "run" / "adapter")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


LOAD_ALONE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
chat = [{"role": "user", "content": "What is virtue?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits
    with model.disable_adapter():
        assert (model(torch.tensor([ids])).logits - logits).abs().max() > 0.01
torch.save({"ids": ids, "logits": logits}, out)
assert "stemtune" not in sys.modules
"""


def test_peft_alone_loads_the_adapter(tmp_path: Path, tiny_base: Path) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT))
    adapter = trainer.train().adapter_dir
    arguments = [str(tiny_base), str(adapter), str(tmp_path / "logits.pt")]
    child = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, *arguments], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=torch.tensor([theirs["ids"]])).logits
    assert largest_error(ours, theirs["logits"]) < 1e-5


# -- what goes wrong --------------------------------------------------------------------------


def not_finite(kind: str, at: int) -> Any:
    """SFT with a loss, or only a gradient, that is not finite at a step."""
    spy = Spy()

    def objective(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = spy(*arguments)
        if spy.calls != at:
            return loss, metrics
        # sqrt has an infinite slope at 0.
        return loss + (0 * loss).sqrt() if kind == "gradient" else loss * float(kind), metrics

    return objective


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_divergence(tmp_path: Path, tiny_base: Path, kind: str, limit: int) -> None:
    overrides = [*SHORT, "train.save_steps=1", f"train.max_grad_norm={limit}"]
    config = make_config(tmp_path, tiny_base, *overrides)
    trainer = st.Trainer(config, objective=not_finite(kind, at=3))
    rows = [trainer.data.train.place(record).line for record in trainer.plan[2]]
    with pytest.raises(DivergedError, match="step 3") as raised:
        trainer.train()
    assert raised.value.exit_code == 4
    assert all(f"rows.jsonl:{row} " in raised.value.where for row in rows[:3])
    run = tmp_path / "run"
    assert checkpoint.steps(run / "checkpoints") == [1, 2]
    assert [line["step"] for line in steps_of(run)] == [1, 2]
    assert run_info(run)["state"] == "failed" and "step 3" in run_info(run)["reason"]
    st.train(config, resume=True)
    st.train(make_config(tmp_path / "whole", tiny_base, *overrides))
    losses = [[line["loss"] for line in steps_of(f)] for f in (run, tmp_path / "whole" / "run")]
    assert losses[0] == losses[1]


def fits_up_to(trainer: st.Trainer, tokens: int) -> list[int]:
    """Let trees of more tokens run out of memory; the sizes that were tried."""
    backward, tried = trainer.accelerator.backward, []
    run = trainer.runner._run_micro_batches

    def spied(step: Any) -> Any:
        batches = trainer.scorer.micro_batches(step.sequences)
        sizes = [st.build_tree(step.of(batch).sequences).num_distinct for batch in batches]

        def checked(loss: Tensor) -> None:
            tried.append(sizes.pop(0))
            backward(loss)
            if tried[-1] > tokens:
                raise torch.OutOfMemoryError

        trainer.accelerator.backward = checked
        return run(step)

    trainer.runner._run_micro_batches = spied  # type: ignore[method-assign]
    return tried


def test_out_of_memory_changes_nothing(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = st.train(make_config(tmp_path / "whole", tiny_base, *SHORT)).output_dir
    config = make_config(tmp_path, tiny_base, *SHORT, "train.micro_batch_tokens=800")
    trainer = st.Trainer(config)
    tried = fits_up_to(trainer, 210)  # the longest sequence has 207
    trainer.train()
    assert max(tried) > 210 and trainer.scorer.budget == 200
    said = [message for message in caplog.messages if message.startswith("out of memory")]
    assert said == [f"out of memory: micro-batches of {n} tokens from now on" for n in (400, 200)]
    ours, theirs = steps_of(tmp_path / "run"), steps_of(expected)
    assert [line["loss"] for line in ours] == pytest.approx([x["loss"] for x in theirs], abs=1e-5)
    norms = [line["grad_norm"] for line in theirs]
    assert [line["grad_norm"] for line in ours] == pytest.approx(norms, rel=1e-4)


def gpu_full() -> None:
    raise torch.OutOfMemoryError


def cpu_full() -> None:
    """What a CPU's allocator says itself."""
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("full", [gpu_full, cpu_full])
def test_out_of_memory_late_in_a_step(
    tmp_path: Path, tiny_base: Path, full: Callable[[], None]
) -> None:
    """Half of a step's gradient is there already: it must not count twice."""
    overrides = ["train.max_steps=3", "train.micro_batch_tokens=300"]
    expected = st.train(make_config(tmp_path / "whole", tiny_base, *overrides)).output_dir
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *overrides), objective=Spy(2, full))
    trainer.train()
    assert trainer.scorer.budget == 150
    ours, theirs = steps_of(tmp_path / "run"), steps_of(expected)
    assert [line["loss"] for line in ours] == pytest.approx([x["loss"] for x in theirs], abs=1e-5)


def test_the_largest_micro_batch_is_tried_first(
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("stemtune.trainer.REHEARSED_FROM", 2)
    overrides = ["train.max_steps=3", "train.batch_size=2", "train.micro_batch_tokens=800"]
    expected = st.train(make_config(tmp_path / "whole", tiny_base, *overrides)).output_dir
    modes: list[bool] = []

    def full() -> None:
        modes.append(all(m.training for m in trainer.model.modules()))
        raise torch.OutOfMemoryError

    trainer = st.Trainer(make_config(tmp_path, tiny_base, *overrides), objective=Spy(1, full))
    part = trainer.data.train
    lengths = [len(sequence) for sequence in part.flat]
    longest = part.of(part.longest_records(2))
    assert [len(sequence) for sequence in longest] == sorted(lengths)[:-3:-1]
    budgets: list[int] = []
    step = trainer._step

    def spied(records: Any) -> Any:
        budgets.append(trainer.scorer.budget)
        return step(records)

    monkeypatch.setattr(trainer, "_step", spied)
    trainer.train()
    assert budgets == [400] * 3  # found before the first step
    assert modes == [True]  # elsewhere activation checkpointing is off, and more memory taken
    ours, theirs = steps_of(tmp_path / "run"), steps_of(expected)
    assert [line["loss"] for line in ours] == pytest.approx([x["loss"] for x in theirs], abs=1e-5)


def test_no_micro_batch_is_larger_than_the_one_that_is_tried_first(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's allocator can't use what it took for smaller ones. The longest records need not make
    the largest micro-batch: short ones fill it better."""
    monkeypatch.setattr("stemtune.trainer.REHEARSED_FROM", 2)
    overrides = ["train.max_steps=6", "train.batch_size=4", "train.micro_batch_tokens=250"]
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *overrides))
    sizes: list[int] = []
    real = trainer.runner.loss

    def counted(step: Any) -> Any:
        sizes.append(st.build_tree(step.sequences).num_distinct)
        return real(step)

    monkeypatch.setattr(trainer.runner, "loss", counted)
    trainer.train()
    longest = trainer.data.train.of(trainer.data.train.longest_records(4))
    alone = [longest[index] for index in trainer.scorer.largest(longest)]
    assert sizes[0] == max(sizes) > st.build_tree(alone).num_distinct


def test_out_of_memory_with_one_sequence(tmp_path: Path, tiny_base: Path) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT))
    fits_up_to(trainer, 10)
    with pytest.raises(OutOfMemoryError, match="single sequence") as raised:
        trainer.train()
    assert raised.value.exit_code == 8
    assert "activation_checkpointing" in raised.value.hint
    assert checkpoint_names(tmp_path / "run") == []
    assert run_info(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize("full", [gpu_full, cpu_full])
@pytest.mark.parametrize(
    ("place", "when"),
    [
        ("stemtune.model.load.AutoModelForCausalLM.from_pretrained", "loading the model"),
        ("stemtune.trainer.add_adapter", "loading the model"),
        ("torch.optim.AdamW.step", "training"),
        ("stemtune.saver._room_for", "training"),
    ],
)
def test_out_of_memory_where_no_smaller_micro_batch_helps(
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    when: str,
    full: Callable[[], None],
) -> None:
    monkeypatch.setattr(place, lambda *_, **__: full())
    with pytest.raises(OutOfMemoryError, match=f"while {when}") as raised:
        st.train(make_config(tmp_path, tiny_base, *SHORT))
    assert raised.value.exit_code == 8 and "stemtune check" in raised.value.hint
    assert run_info(tmp_path / "run")["state"] == "failed"


def test_out_of_memory_while_evaluating(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "held-out.jsonl", dialogue_rows(5))
    several = [f"data.eval_path={tmp_path}/held-out.jsonl", "data.allow_leaks=true"]
    expected = st.train(make_config(tmp_path / "whole", tiny_base, *SHORT, *several)).output_dir
    logprobs, calls = score.target_logprobs, []

    def full_at_first(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return logprobs(*arguments)

    monkeypatch.setattr(score, "target_logprobs", full_at_first)
    st.train(make_config(tmp_path, tiny_base, *SHORT, *several))
    ours, theirs = metrics_of(tmp_path / "run")[0], metrics_of(expected)[0]
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)


def test_a_full_disk_while_saving(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT, "train.save_steps=2")
    save = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if ".tmp-4-" in str(path) and path.name.startswith("optimizer"):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(DiskError, match="No space left") as raised:
            st.train(config)
    assert raised.value.exit_code == 7
    run = tmp_path / "run"
    assert checkpoint_names(run) == ["step-000002"]
    info = run_info(run)
    assert (info["phase"], info["state"]) == ("saving", "failed")
    assert "No space left" in info["reason"]
    st.train(config, resume=True)
    assert checkpoint_names(run) == ["step-000002", "step-000004"]


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "adapter_model.safetensors"])
def test_a_disk_that_is_full_for_other_files(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opened = Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        mode = arguments[0] if arguments else options.get("mode", "r")
        if name in path.name and mode != "r":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *arguments, **options)

    def full_save(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT, "train.save_steps=1"))
    if name.endswith("safetensors"):
        monkeypatch.setattr(trainer.model, "save_pretrained", full_save)
    else:
        trainer.runner.terms = terms_of(
            trainer.config.objective, Spy(3, lambda: monkeypatch.setattr(Path, "open", full))
        )
    with pytest.raises(DiskError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].state["progress"]["step"] >= 2


@pytest.mark.parametrize("kind", [SafetensorError, Exception])  # of safetensors, of tokenizers
def test_a_disk_that_is_full_for_what_others_write(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT))

    def full(folder: str) -> None:
        Path(folder, "tokenizer.json").write_bytes(b"half of it")
        raise kind("No space left on device (os error 28)")

    monkeypatch.setattr(trainer.tokenizer, "save_pretrained", full)
    with pytest.raises(DiskError, match="No space left") as raised:
        trainer.train()
    assert raised.value.exit_code == 7
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {name for name in left if name.endswith(".tmp")} and "adapter" not in left


@pytest.mark.parametrize("fact", [{"phase": "training"}, {"phase": "saving"}, {"state": "done"}])
def test_a_disk_that_is_full_between_phases(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, fact: dict[str, str]
) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT))
    write, phases = rundir.write_text, []

    def full(path: Path, text: str) -> None:
        facts = json.loads(text) if path.name == "run.json" else {}
        phases.append(facts.get("phase"))
        # "saving" for the second time: behind the last checkpoint.
        again = facts.get("phase") != "saving" or phases.count("saving") == 2
        if facts.items() >= fact.items() and "reason" not in facts and again:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(rundir, "write_text", full)
    with pytest.raises(DiskError, match="No space left"):
        trainer.train()


def test_a_spoiled_checkpoint_is_passed_over_and_written_again(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT, "train.save_steps=1")
    st.train(config)
    run = tmp_path / "run"
    expected = adapter_of(run / "adapter")
    for step in (3, 4):
        (run / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("{}")
    st.train(config, resume=True)
    assert "passed over step-000004: state.json is not what was written" in caplog.messages
    assert "resuming from step-000002" in caplog.messages
    assert checkpoint.newest(run / "checkpoints")[0].path.name == "step-000004"
    ours = adapter_of(run / "adapter")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


# -- what is refused --------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path, tiny_base: Path) -> Path:
    """The parent of a finished run's folder."""
    rows = tmp_path / "held_out.jsonl"
    write_rows(rows, [{"context": "Whence?", "target": "Thence."}])
    st.train(make_config(tmp_path, tiny_base, *SHORT, f"data.eval_path={rows}"))
    return tmp_path


def resume(folder: Path, *overrides: str) -> None:
    config = st.load_config(
        folder / "run.yaml", [*SHORT, f"data.eval_path={folder / 'held_out.jsonl'}", *overrides]
    )
    st.train(config, resume=True)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate: 0.002 → 0.001"),
        ("train.batch_size=5", "train.batch_size: 4 → 5"),
        ("train.seed=1", "train.seed: 0 → 1"),
        ("train.max_steps=9", "train.max_steps: 4 → 9"),
        ("adapter.dropout=0.5", "adapter.dropout: 0.0 → 0.5"),
        ("adapter.target_modules=[q_proj]", "adapter.target_modules: 'auto' → ['q_proj']"),
        ("data.system=You are nobody.", "data.system: None → 'You are nobody.'"),
        ("model.dtype=bfloat16", "model.dtype: 'float32' → 'bfloat16'"),
        ("model.attention=padded", "model.attention: 'segments' → 'padded'"),
        ("model.revision=v2", "model.revision: None → 'v2'"),
    ],
)
def test_a_resumed_run_is_the_same_run(finished: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError, match="can't resume") as raised:
        resume(finished, override)
    assert line in raised.value.what
    assert raised.value.exit_code == 2
    assert run_info(finished / "run")["state"] == "failed"
    resume(finished)


@pytest.mark.parametrize("name", ["rows.jsonl", "held_out.jsonl"])
def test_changed_rows_are_refused(finished: Path, name: str) -> None:
    rows = [{"context": "Whence?", "target": "Hence."}]
    write_rows(finished / name, rows if name == "held_out.jsonl" else dialogue_rows()[::-1])
    with pytest.raises(ConfigError, match="can't resume") as raised:
        resume(finished)
    assert raised.value.what.endswith(" has changed: data: is not what it was")


def test_a_changed_base_is_refused(finished: Path, tiny_base: Path) -> None:
    other = finished / "other-base"
    shutil.copytree(tiny_base, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: t * 1.1 for name, t in weights.items()}, other / "model.safetensors")
    with pytest.raises(ConfigError, match="another base") as raised:
        resume(finished, f"model.base={other}")
    assert raised.value.where == "model.base"
    resume(finished)


def test_what_may_change(finished: Path, tiny_base: Path) -> None:
    moved = finished / "moved-base"
    shutil.copytree(tiny_base, moved)
    overrides = [f"model.base={moved}", "train.micro_batch_tokens=50", "train.save_steps=1"]
    overrides += ["train.save_total_limit=1", "output.final_adapter=last"]
    overrides += ["train.activation_checkpointing=true", "tracking.project=other"]
    overrides += ["model.dtype=auto", "model.attention=auto", "model.device=auto"]
    resume(finished, *overrides)


def test_nothing_to_resume(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT)
    with pytest.raises(CheckpointError, match="no usable checkpoint") as raised:
        st.train(config, resume=True)
    assert raised.value.exit_code == 5
    assert not (tmp_path / "run").exists()
    st.train(config)


def test_a_finished_run_is_not_overwritten(finished: Path) -> None:
    before = {p: p.read_bytes() for p in (finished / "run").rglob("*") if p.is_file()}
    config = st.load_config(finished / "run.yaml", SHORT)
    with pytest.raises(OutputBusyError, match="holds another run") as raised:
        st.train(config)
    assert raised.value.exit_code == 6
    assert "--resume" in raised.value.hint
    assert {p: p.read_bytes() for p in (finished / "run").rglob("*") if p.is_file()} == before


def test_a_folder_of_something_else(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputBusyError, match="not empty"):
        st.train(make_config(tmp_path, tiny_base, *SHORT))
    assert [path.name for path in (tmp_path / "run").glob("[!.]*")] == ["thesis.txt"]


HOLDER = """
import sys
from pathlib import Path
from stemtune.rundir import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.claim(resume=False)
folder.write()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_holds(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout and child.stdout.readline() == "held\n"
    for again in (False, True):
        with pytest.raises(OutputBusyError, match=f"process {child.pid} ") as raised:
            st.train(config, resume=again)
        assert raised.value.exit_code == 6
    child.kill()  # what it leaves is a stale lock
    child.communicate()
    st.train(config)
    assert run_info(tmp_path / "run")["pid"] == os.getpid()


def test_two_runs_in_one_process(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT)
    trainer = st.Trainer(config)
    with pytest.raises(OutputBusyError, match=f"process {os.getpid()} "):
        st.Trainer(config)
    trainer.train()


def test_a_run_that_failed_early_can_start_again(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT)
    with pytest.raises(DivergedError):
        st.train(config, objective=not_finite("nan", at=1))
    st.train(config)
    assert run_info(tmp_path / "run")["state"] == "done"
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("data.max_length=4", DataError),
        ("adapter.target_modules=[nonsense]", ConfigError),
        ("tracking.trackers=[nonsense]", ConfigError),
    ],
)
def test_what_is_refused_leaves_no_folder(
    tmp_path: Path, tiny_base: Path, override: str, error: type[st.StemtuneError]
) -> None:
    with pytest.raises(error):
        st.train(make_config(tmp_path, tiny_base, *SHORT, override))
    assert not (tmp_path / "run").exists()


def test_a_bad_row_leaves_no_folder(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, *SHORT)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"context": "cut')
    with pytest.raises(DataError, match="not valid JSON") as raised:
        st.train(config)
    assert "rows.jsonl:21" in raised.value.where
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_loaded(tmp_path: Path, tiny_base: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="can't load") as raised:
        st.train(make_config(tmp_path, base, *SHORT))
    assert raised.value.exit_code == 3
    info = run_info(tmp_path / "run")
    assert (info["phase"], info["state"]) == ("loading the model", "failed")
    assert "can't load" in info["reason"]
    st.train(make_config(tmp_path, tiny_base, *SHORT))  # the same folder, with a good base


def test_held_out_numbers_that_are_none_are_named(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = score.target_logprobs

    def poisoned(model: Any, tree: Any, *more: Any) -> Any:
        logps = real(model, tree, *more)
        return torch.where(torch.from_numpy(tree.target_sequence) == 0, torch.nan, logps)

    monkeypatch.setattr(score, "target_logprobs", poisoned)
    config = make_config(tmp_path, tiny_base, *SHORT, *EVALUATED)
    trainer = st.Trainer(config)
    with pytest.raises(DivergedError, match="step 0: the held-out loss is nan") as raised:
        trainer.train()
    assert raised.value.exit_code == 4
    assert raised.value.where == str(trainer.data.eval.place(0))
    assert "rows.jsonl:" in raised.value.where
    assert "look at these rows" in str(raised.value.hint)


def test_a_failing_evaluation_says_so(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(score, "target_logprobs", fail)
    with pytest.raises(RuntimeError, match="no such kernel"):
        st.train(make_config(tmp_path, tiny_base, *SHORT, *EVALUATED))
    info = run_info(tmp_path / "run")
    assert (info["phase"], info["state"], info["reason"]) == (
        "evaluating",
        "failed",
        "no such kernel",
    )
