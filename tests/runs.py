"""Runs on a tiny base: a run file, a handful of rows, and what a run left behind."""

import json
import re
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

import stemtune as st
from stemtune.objectives import Layout, sft

# Warnings that none of our code can prevent: PEFT and accelerate call what torch and transformers
# have renamed since.
IGNORED = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in [
        "`is_gradient_checkpointing` is deprecated",  # PEFT, of transformers
    ]
]

CLOCKED = re.compile("seconds|per_second|memory")
QUESTIONS = ["What is virtue?", "Who are you, and whence do you come?", "Can it be taught at all?"]
ANSWERS = [
    "I know not.",
    "A gadfly, my friend, upon a great and noble horse that is slow.",
    "Let us look together.",
    "No.",
    "Whoever asks so has begun to answer; so tell me what you take it to be, and why.",
]

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32", "device": "cpu", "attention": "segments"},
    "adapter": {"r": 4, "alpha": 8, "dropout": 0.0},
    "data": {"path": "rows.jsonl", "eval_fraction": 0.0},
    "train": {"learning_rate": 2e-3, "batch_size": 8, "micro_batch_tokens": 100_000},
    "tracking": {"trackers": []},
}


def dialogue_rows(count: int = 20) -> list[dict[str, Any]]:
    """Rows that share stems and differ in length: one turn or two, the same few questions."""
    rows = []
    for number in range(count):
        turns = [
            {"role": "system", "content": "You are Socrates."},
            {"role": "user", "content": QUESTIONS[number % 3]},
            {"role": "assistant", "content": f"{ANSWERS[number % 5]} {number}"},
        ]
        if number % 4 == 0:
            turns += [
                {"role": "user", "content": QUESTIONS[(number + 1) % 3]},
                {"role": "assistant", "content": ANSWERS[(number + 2) % 5]},
            ]
        rows.append({"messages": turns})
    return rows


def write_rows(path: Path, rows: Seq[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run_file(folder: Path, base: Path, rows: Seq[dict[str, Any]] | None = None) -> Path:
    """`run.yaml` and its rows; the run goes to `folder/run`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl", dialogue_rows() if rows is None else rows)
    values = {**SETTINGS, "model": {**SETTINGS["model"], "base": str(base)}}
    values["output"] = {"dir": str(folder / "run")}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def make_config(folder: Path, base: Path, *overrides: str) -> st.Config:
    """The config of a tiny run, through the run file."""
    return st.load_config(write_run_file(folder, base), list(overrides))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a line that is still being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of steps, without those of evaluations."""
    return [line for line in metrics_of(run) if "loss" in line]


def run_info(run: Path) -> dict[str, Any]:
    """`run.json`."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def adapter_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder."""
    return load_file(folder / "adapter_model.safetensors")


def checkpoint_names(run: Path) -> list[str]:
    """All that lies in `checkpoints/`, in order."""
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def without_clock(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what time and memory decide."""
    return [{k: v for k, v in line.items() if not CLOCKED.search(k)} for line in lines]


class Spy:
    """The SFT objective, which also counts micro-batches and calls back at one of them."""

    def __init__(self, at: int = -1, act: Any = None) -> None:
        self.calls = 0
        self.at, self.act = at, act

    def __call__(
        self, logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        if self.calls == self.at:
            self.act()
        return sft(logps, reference_logps, layout, config)
