"""Interrupted and resumed = uninterrupted, bit for bit: adapter, optimizer, metrics."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import stemtune as st
from stemtune import checkpoint, fit, score, setup
from stemtune.errors import Interrupted
from stemtune.objectives import terms_of
from tests.runs import (
    IGNORED,
    Spy,
    adapter_of,
    checkpoint_names,
    make_config,
    metrics_of,
    run_info,
    without_clock,
)

pytestmark = IGNORED
SETTINGS = [
    "adapter.dropout=0.05",
    "data.eval_fraction=0.2",
    "train.max_steps=9",
    "train.batch_size=4",
    "train.eval_steps=3",
    "train.save_steps=4",
]
# Micro-batches a step in each way of running; every one of them draws dropout differently.
WAYS = {
    "one micro-batch": [],
    "many micro-batches": ["train.micro_batch_tokens=1"],
    "padded": ["model.attention=padded", "train.micro_batch_tokens=1"],
    "nothing held out": ["data.eval_fraction=0"],
    "nothing held out, padded": ["data.eval_fraction=0", "model.attention=padded"],
    "activation checkpointing": ["train.activation_checkpointing=true"],
    "turns": ["data.samples=turn", "data.batching=record"],
    "bfloat16": ["model.dtype=bfloat16"],
    "nf4": ["model.quantization=nf4"],
    "int8, bfloat16": ["model.quantization=int8", "model.dtype=bfloat16"],
    "8-bit optimizer": ["train.optimizer=adamw_8bit", "adapter.r=128"],
    "loftq": ["model.quantization=nf4", "adapter.init_weights=loftq"],
    "pissa": ["adapter.init_weights=pissa"],
    "dora": ["adapter.use_dora=true"],
    "lora+, a head": ["train.loraplus_lr_ratio=4", "adapter.modules_to_save=[lm_head]"],
    "activation offload": ["train.activation_offload=true"],
    "bfloat16, many micro-batches": ["model.dtype=bfloat16", "train.micro_batch_tokens=1"],
}


class Crash(Exception):
    """What no code of ours expects."""


def crash() -> None:
    raise Crash


def micro_batches_a_step(way: str) -> int:
    return 4 if "train.micro_batch_tokens=1" in WAYS[way] else 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    """Uninterrupted runs, by way."""
    done: dict[str, Path] = {}

    def run(way: str) -> Path:
        if way not in done:
            config = make_config(tmp_path_factory.mktemp("whole"), tiny_base, *SETTINGS, *WAYS[way])
            done[way] = st.train(config).output_dir
        return done[way]

    return run


def assert_same_run(run: Path, expected: Path) -> None:
    assert without_clock(metrics_of(run)) == without_clock(metrics_of(expected))
    for folder in ("adapter", "adapter-last"):
        assert (run / folder).exists() == (expected / folder).exists()
        if (expected / folder).exists():
            ours, theirs = adapter_of(run / folder), adapter_of(expected / folder)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours = checkpoint.newest(run / "checkpoints")[0].tensors
    theirs = checkpoint.newest(expected / "checkpoints")[0].tensors
    for kind in ("adapter", "optimizer"):
        assert ours[kind].keys() == theirs[kind].keys()
        assert all(torch.equal(ours[kind][name], theirs[kind][name]) for name in theirs[kind])


@pytest.mark.parametrize("step", [0, 1, 4, 5, 8])
def test_a_stop_between_steps(tmp_path: Path, tiny_base: Path, whole: Any, step: int) -> None:
    config = make_config(tmp_path, tiny_base, *SETTINGS)
    trainer = st.Trainer(config)

    def stop() -> None:
        trainer.stop.requested = True

    trainer.runner.terms = terms_of(trainer.config.objective, Spy(step, stop))
    trainer.stop.requested = step == 0
    with pytest.raises(Interrupted) as raised:
        trainer.train()
    assert raised.value.exit_code == 75
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == step
    assert run_info(tmp_path / "run")["state"] == "interrupted"
    st.train(config, resume=True)
    assert_same_run(tmp_path / "run", whole("one micro-batch"))


@pytest.mark.parametrize("tree", [1, 2, 3, 4])
def test_a_stop_within_an_evaluation(
    tmp_path: Path, tiny_base: Path, whole: Any, tree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is broken off: a scheduler may not wait for it. There are four, of one tree each: at the
    start, twice in between, at the end."""
    way = "many micro-batches"
    config = make_config(tmp_path, tiny_base, *SETTINGS, *WAYS[way])
    trainer = st.Trainer(config)
    trees, real = 0, score.build_tree

    def build(sequences: Any) -> Any:
        nonlocal trees
        trees += 1
        trainer.stop.requested |= trees == tree
        return real(sequences)

    monkeypatch.setattr(score, "build_tree", build)
    with pytest.raises(Interrupted):
        trainer.train()
    assert trees == tree
    evaluated = [line["step"] for line in metrics_of(tmp_path / "run") if "eval_loss" in line]
    step = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert step % 3 == 0 and step not in evaluated
    st.train(config, resume=True)
    assert_same_run(tmp_path / "run", whole(way))


@pytest.mark.parametrize("way", WAYS)
def test_a_crash_between_checkpoints(tmp_path: Path, tiny_base: Path, whole: Any, way: str) -> None:
    config = make_config(tmp_path, tiny_base, *SETTINGS, *WAYS[way])
    count = micro_batches_a_step(way)
    in_step_7 = 6 * count + (count + 1) // 2  # of several micro-batches, one is done already
    with pytest.raises(Crash):
        st.train(config, objective=Spy(in_step_7, crash))
    assert metrics_of(tmp_path / "run")[-1]["step"] == 6
    assert run_info(tmp_path / "run")["state"] == "failed"
    trainer = st.Trainer(config, resume=True)
    assert trainer.progress.step in (4, 6)  # 6 as well, where it was the best so far
    trainer.train()
    assert_same_run(tmp_path / "run", whole(way))


def test_many_crashes(tmp_path: Path, tiny_base: Path, whole: Any) -> None:
    config = make_config(tmp_path, tiny_base, *SETTINGS, "train.save_steps=1")
    for number in range(8):
        with pytest.raises(Crash):  # each attempt gets one step further
            st.train(config, resume=number > 0, objective=Spy(2, crash))
    st.train(config, resume=True)
    assert_same_run(tmp_path / "run", whole("one micro-batch"))


def test_a_finished_run_changes_no_more(tmp_path: Path, tiny_base: Path, whole: Any) -> None:
    config = make_config(tmp_path, tiny_base, *SETTINGS)
    st.train(config)
    st.train(config, resume=True)
    assert_same_run(tmp_path / "run", whole("one micro-batch"))


def test_other_free_memory_changes_nothing(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Micro-batches decide which dropout is drawn: a run keeps the budget it began with.
    monkeypatch.setattr(fit, "SMALLEST", 1)
    settings = [*SETTINGS, "train.micro_batch_tokens=auto"]
    config = make_config(tmp_path / "whole", tiny_base, *settings)
    expected = st.train(config).output_dir
    config = make_config(tmp_path, tiny_base, *settings)
    with pytest.raises(Crash):
        st.train(config, objective=Spy(6, crash))
    monkeypatch.setattr(setup, "free_memory", lambda _device: 0)
    st.train(config, resume=True)
    assert_same_run(tmp_path / "run", expected)


def test_kill(tmp_path: Path, tiny_base: Path) -> None:
    settings = [*SETTINGS, "train.max_steps=60"]
    expected = st.train(make_config(tmp_path / "whole", tiny_base, *settings)).output_dir
    config = make_config(tmp_path, tiny_base, *settings)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "stemtune", "train", "run.yaml", *settings]
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    while child.poll() is None and (not metrics_of(run) or metrics_of(run)[-1]["step"] < 15):
        time.sleep(0.001)
    child.kill()
    _, said = child.communicate()
    assert child.returncode == -signal.SIGKILL, said.decode()
    assert run_info(run)["state"] == "running"
    st.train(config, resume=True)
    assert_same_run(run, expected)
    assert not [name for name in checkpoint_names(run) if name.startswith(".tmp-")]
    assert os.getpid() == run_info(run)["pid"]


def test_another_number_of_threads_is_said(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, tiny_base, *SETTINGS)
    with pytest.raises(Crash):
        st.train(config, objective=Spy(6, crash))
    torch.set_num_threads(2)
    try:
        st.train(config, resume=True)
        assert "the last bits of what follows may differ: threads: 1 → 2" in caplog.messages
        caplog.clear()
        st.train(config, resume=True)
    finally:
        torch.set_num_threads(1)
    assert not [said for said in caplog.messages if "last bits" in said]
