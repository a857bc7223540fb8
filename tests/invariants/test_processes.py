"""However many processes share a run, it is the same run: losses, adapter, and whatever happens to
one of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stemtune as st
from stemtune.errors import ConfigError, Interrupted
from stemtune.lower import require_lower_blocks
from stemtune.ranks import Ranks
from tests.runs import (
    IGNORED,
    adapter_of,
    make_config,
    metrics_of,
    run_info,
    write_rows,
)

pytestmark = IGNORED
ROOT = Path(__file__).parents[2]
SETTINGS = [
    "data.eval_fraction=0.2",
    "train.max_steps=9",
    "train.batch_size=4",
    "train.eval_steps=3",
    "train.micro_batch_tokens=200",
]


def by_torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", "2", "-m", *command],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def require_same_run(found: Path, expected: Path) -> None:
    """Sums in another order: all numbers are near, and those that are counted are equal."""
    mine, theirs = metrics_of(found), metrics_of(expected)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for ours, line in zip(mine, theirs, strict=True):
        for name in ("loss", "eval_loss", "grad_norm", "rewards_accuracy", "rewards_margin"):
            if name in line:
                assert ours[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), name
        for name in ("lr", "records", "targets", "tokens", "eval_targets"):
            assert ours.get(name) == line.get(name), name
    weights = adapter_of(expected / "adapter")
    for name, tensor in adapter_of(found / "adapter").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5)


def test_two_processes_one_of_them_disturbed_then_one(tmp_path: Path, tiny_base: Path) -> None:
    whole = st.train(make_config(tmp_path / "whole", tiny_base, *SETTINGS)).output_dir
    config = make_config(tmp_path / "parts", tiny_base, *SETTINGS)
    done = by_torchrun("tests.disturbed", str(tmp_path / "parts" / "run.yaml"), *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "process 0: stopped at step" in done.stdout
    assert "process 1: stopped at step" in done.stdout
    run = Path(config.output.dir)
    assert run_info(run)["state"] == "interrupted"
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert log.count("out of memory: micro-batches of 100 tokens from now on") == 1
    assert 0 < len(metrics_of(run)) < len(metrics_of(whole))
    st.train(config, resume=True)
    require_same_run(run, whole)


@pytest.mark.parametrize("persona", [False, True])
def test_preferences_by_one_process_then_two(
    tmp_path: Path, tiny_base: Path, persona: bool
) -> None:
    """With a persona that all steps share, the reference goes over the whole data set."""
    rows = [
        {
            "prompt": f"What is virtue, {number}?",
            "chosen": f"Let us look together, {number}.",
            "rejected": "A gadfly." if number % 3 else f"No, {number}.",
        }
        for number in range(20)
    ]
    settings = [*SETTINGS, "objective.type=dpo", "train.save_steps=100"]
    if persona:
        settings += [f"data.system={'You are Socrates. ' * 60}", "train.micro_batch_tokens=1500"]
    configs = {
        name: make_config(tmp_path / name, tiny_base, *settings) for name in ("whole", "parts")
    }
    for name in configs:
        write_rows(tmp_path / name / "rows.jsonl", rows)
    st.train(configs["whole"])
    run = Path(configs["parts"].output.dir)
    trainer = st.Trainer(configs["parts"])
    step = trainer._step

    def stopping(records: list[int]) -> dict[str, object]:
        if trainer.progress.step == 3:
            trainer.stop.requested = True
        return step(records)

    trainer._step = stopping  # type: ignore[method-assign, assignment]
    with pytest.raises(Interrupted):
        trainer.train()
    (run / "reference.safetensors").unlink()  # so that two processes compute it, too
    run_file = str(tmp_path / "parts" / "run.yaml")
    done = by_torchrun("stemtune", "train", run_file, *settings, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "adapter")
    assert "processes: 1 → 2" in done.stderr
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert log.count("of the whole data set") == 2 * persona
    require_same_run(run, Path(configs["whole"].output.dir))


def test_a_run_file_is_refused_once_and_says_so(tmp_path: Path, tiny_base: Path) -> None:
    make_config(tmp_path, tiny_base)
    done = by_torchrun("stemtune", "train", str(tmp_path / "run.yaml"), "data.path=nowhere.jsonl")
    assert done.returncode != 0
    assert "nowhere.jsonl" in done.stderr
    assert not (tmp_path / "run").exists()


def test_lower_states_take_one_process(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, "adapter.layers=1", "train.keep_lower_states=true")
    require_lower_blocks(config, Ranks())
    with pytest.raises(ConfigError, match="one process"):
        require_lower_blocks(config, Ranks(rank=1, size=2))
