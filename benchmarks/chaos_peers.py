"""The faults of `make chaos` against a script that trains with TRL, by the same harness.

    python benchmarks/chaos_peers.py --kills 50 --json chaos-peers.json

The script is what its documentation shows: SFTTrainer with LoRA, a checkpoint every two steps, and
`resume_from_checkpoint=True` where a checkpoint is there. After a fault the same script runs again.
    exact     it ends with the adapter of an undisturbed run, bit for bit
    refused   it ends with an error
    wrong     it ends well, with another adapter
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file, save_file

from tests.chaos.lab import Child, child
from tests.models import save_tiny_model
from tests.runs import dialogue_rows

STEPS, SAVE = 8, 2
OUTCOMES = ("exact", "refused", "wrong")


def script(base: Path, out: Path, rows: list[dict[str, Any]], on_step: Any = None) -> None:
    """Train, or go on where a checkpoint is there."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Each(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if on_step is not None:
                on_step(state.global_step, more["model"])

    trainer = SFTTrainer(
        model=str(base),
        args=SFTConfig(
            output_dir=str(out),
            max_steps=STEPS,
            save_steps=SAVE,
            save_total_limit=3,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear"),
        callbacks=[Each()],
    )
    there = out.exists() and any(out.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=there or None)
    trainer.save_model(str(out / "final"))


class Bench:
    """Runs of the script, and what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        import random

        self.folder, self.random = folder, random.Random(seed)
        self.base = folder / "base"
        save_tiny_model(self.base)
        self.rows = dialogue_rows()
        self.number = 0
        started = time.perf_counter()
        self.expected = self.new()
        assert self.start(self.expected).wait() == 0, "the undisturbed run fails"
        self.seconds = time.perf_counter() - started

    def new(self) -> Path:
        """A folder for a run."""
        self.number += 1
        return self.folder / f"{self.number:04d}"

    def start(self, out: Path, on_step: Any = None, rows: Any = None) -> Child:
        """The script in a child."""
        return child(lambda: script(self.base, out, rows or self.rows, on_step))

    def interrupted(self) -> Path:
        """A run that was killed in step 7, behind its checkpoints of steps 4 and 6."""
        out = self.new()

        def die(step: int, _model: Any) -> None:
            if step == STEPS - 1:
                os.kill(os.getpid(), signal.SIGKILL)

        self.start(out, die).wait()
        return out

    def again(self, out: Path, rows: Any = None) -> str:
        """The outcome of running the script once more."""
        if self.start(out, rows=rows).wait() != 0:
            return "refused"
        name = "adapter_model.safetensors"
        ours, theirs = load_file(out / "final" / name), load_file(self.expected / "final" / name)
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
        shutil.rmtree(out)
        return "exact" if same else "wrong"


def signalled(number: signal.Signals, bench: Bench, count: int) -> list[str]:
    found: list[str] = []
    for _ in range(count):
        out = bench.new()
        process = bench.start(out)
        time.sleep(bench.random.uniform(0, bench.seconds))
        process.kill(number)
        process.wait()
        found.append(bench.again(out))
    return found


def _newest(out: Path) -> Path:
    return max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def flipped(bench: Bench, count: int) -> list[str]:
    found: list[str] = []
    for _ in range(count):
        out = bench.interrupted()
        files = [path for path in sorted(_newest(out).iterdir()) if path.is_file()]
        file = bench.random.choices(files, [path.stat().st_size for path in files])[0]
        content = bytearray(file.read_bytes())
        bit = bench.random.randrange(len(content) * 8)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(content))
        found.append(bench.again(out))
    return found


def missing(bench: Bench, count: int) -> list[str]:
    names = [path.name for path in sorted(_newest(bench.interrupted()).iterdir()) if path.is_file()]
    found: list[str] = []
    for name in names[:count]:
        out = bench.interrupted()
        (_newest(out) / name).unlink()
        found.append(bench.again(out))
    return found


def dropped_tensor(bench: Bench, count: int) -> list[str]:
    found: list[str] = []
    for number in range(count):
        out = bench.interrupted()
        path = _newest(out) / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors.pop(sorted(tensors)[number % len(tensors)])
        save_file(tensors, path, {"format": "pt"})
        found.append(bench.again(out))
    return found


def changed_data(bench: Bench, count: int) -> list[str]:
    other = dialogue_rows(40)[20:]
    return [bench.again(bench.interrupted(), other) for _ in range(count)]


def poisoned(bench: Bench, count: int) -> list[str]:
    """A weight becomes NaN after step 3: `refused` is what should come of it."""
    found: list[str] = []
    for _ in range(count):
        out = bench.new()

        def poison(step: int, model: Any) -> None:
            if step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

        code = bench.start(out, poison).wait()
        found.append("refused" if code else "wrong")
    return found


FAULTS: dict[str, Callable[[Bench, int], list[str]]] = {
    "kill -9 at a random moment": partial(signalled, signal.SIGKILL),
    "SIGTERM at a random moment": partial(signalled, signal.SIGTERM),
    "a flipped bit in the newest checkpoint": flipped,
    "a file of it missing": missing,
    "a tensor of its adapter missing": dropped_tensor,
    "other data on resume": changed_data,
    "a weight that is NaN": poisoned,
}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--others", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, dict[str, int]] = {}
    print(f"| fault, TRL | tried | {' | '.join(OUTCOMES)} |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.seed)
        for name, fault in FAULTS.items():
            found = fault(bench, options.kills if "kill" in name else options.others)
            counts[name] = {outcome: found.count(outcome) for outcome in OUTCOMES}
            told = " | ".join(str(counts[name][outcome]) for outcome in OUTCOMES)
            print(f"| {name} | {len(found)} | {told} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
