"""The same step by stemtune and by other tools, each in a process and an environment of its own,
with the allocator that it comes with, in turns.

    python benchmarks/peers/compare.py --dtype bfloat16 --json compare.json
    python benchmarks/peers/compare.py --sequences 2 --rounds 1 --contestants stemtune,swift
    python benchmarks/peers/compare.py --work rag --contestants stemtune,hand,trl_head

Rounds, ratios and the processor's peak are as in sft.py; the order rotates from round to round. A
worker's first step is a warm-up: it is not timed, and its loss, before any update, must agree.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(FOLDER.parent))

import dpo
from base import DTYPES, load_adapted, load_base
from peak import matmul_peak
from sft import add_workload_arguments, describe, machine, note, quiet, samples_of
from workload import conversations

from stemtune.model.smollm2 import converted_folder

OWN = ("stemtune", "hand", "trl_head", "trl")
DPO = ("rag", "ranked", "unshared")
OTHERS = {"swift": "swift_sft.py", "llamafactory": "llamafactory_sft.py"}


class Worker:
    """A contestant's process.

    Attributes:
        loss: before any update, of the warm-up.
        failed: the last line that it said, if it ended.
    """

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.log, self.failed, self.loss = name, log, "", float("nan")
        # Not the caller's path: an environment of its own sees its own packages alone.
        env = {k: v for k, v in os.environ.items() if name not in OTHERS or k != "PYTHONPATH"}
        with log.open("w", encoding="utf-8") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**env, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            )

    def step(self) -> dict[str, float] | None:
        """Loss and seconds of one step; None if the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        said = [text for text in self.log.read_text(encoding="utf-8").splitlines() if text.strip()]
        self.failed = said[-1] if said else f"exit {self.process.wait()}"
        return None

    def end(self) -> None:
        """No more turns."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended by itself
            self.process.stdin.close()
        self.process.wait()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    add_workload_arguments(parser)
    parser.set_defaults(sequences=8)
    parser.add_argument("--work", choices=["sft", *DPO], default="sft", help="see dpo.py")
    parser.add_argument("--prompt", type=int, default=700, help="tokens of a prompt, for DPO")
    parser.add_argument("--answer", type=int, default=0, help="tokens of an answer, for DPO")
    parser.add_argument("--contestants", default="stemtune,hand,trl_head,swift,llamafactory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    options = parser.parse_args()
    options.contestants = options.contestants.split(",")
    return options


def work_of(options: argparse.Namespace) -> dict[str, Any]:
    """What own.py is given, as JSON has it."""
    if options.work == "sft":
        samples = samples_of(options, load_base(options.dtype)[1])
        describe(samples, options)
        return {"samples": [vars(sample) for sample in samples]}
    groups = "2" if options.work == "unshared" else "1"
    arguments = ["--work", options.work, "--groups", groups, "--dtype", options.dtype]
    arguments += ["--prompt", str(options.prompt), "--answer", str(options.answer)]
    model, tokenizer = load_adapted(options.dtype)
    found = dpo.load_groups(dpo.parse(arguments), tokenizer)
    references = dpo.reference_of(model, found)
    return {"groups": [vars(group) for group in found], "references": references}


def start(options: argparse.Namespace, folder: Path) -> list[Worker]:
    """All workers, each through its warm-up, one after the other."""
    work = work_of(options)
    file = folder / "work.json"
    file.write_text(json.dumps(work), encoding="utf-8")
    talks = conversations(options.data, options.character, options.form, options.sequences)
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in talks]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    workers: list[Worker] = []
    for name in options.contestants:
        if name in OWN:
            command = [sys.executable, str(FOLDER / "own.py"), name, options.dtype, str(file)]
        else:
            python = ROOT / ".venv-peers" / name / "bin/python"
            command = [str(python), str(FOLDER / OTHERS[name]), options.dtype]
            command += [str(converted_folder()), str(folder / "rows.jsonl"), str(len(talks))]
            if not python.exists():
                note(f"{name}: no environment; bash benchmarks/peers/make_env.sh {name}")
                continue
        worker = Worker(name, command, folder / f"{name}.log")
        first = worker.step()
        if first is None:
            note(f"{name} can't run: {worker.failed}")
        else:
            worker.loss = first["loss"]
            note(f"ready: {name} (warm-up {first['seconds']:.1f} s, loss {first['loss']:.6f})")
        workers.append(worker)
    return workers


def run(workers: list[Worker], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each timed step."""
    records: list[dict[str, Any]] = []
    for turn in range(options.rounds):
        standing = [worker for worker in workers if not worker.failed]
        shift = turn % len(standing)
        for worker in standing[shift:] + standing[:shift]:
            peak = matmul_peak(DTYPES[options.dtype], options.peak_seconds)
            found = worker.step()
            if found is None:
                note(f"{worker.name} ended: {worker.failed}")
                continue
            note(f"round {turn + 1}/{options.rounds}  {worker.name:<14} {found['seconds']:7.2f} s")
            records.append({"round": turn, "contestant": worker.name, "peak": peak, **found})
    return records


def table(workers: list[Worker], records: list[dict[str, Any]]) -> str:
    """One line a contestant."""
    from statistics import median

    lines = [
        "| tool | median s | min | max | ÷ stemtune | loss before any update |",
        "|---" * 6 + "|",
    ]
    seconds = {(r["contestant"], r["round"]): r["seconds"] for r in records}
    for worker in workers:
        if worker.failed:
            lines.append(f"| {worker.name} | can't run: {worker.failed} | | | | |")
            continue
        own = [r["seconds"] for r in records if r["contestant"] == worker.name]
        ratios = [
            value / seconds["stemtune", turn]
            for (name, turn), value in seconds.items()
            if name == worker.name and ("stemtune", turn) in seconds
        ]
        ratio = f"{median(ratios):.2f}×" if ratios else "–"
        lines.append(
            f"| {worker.name} | {median(own):.2f} | {min(own):.2f} | {max(own):.2f} | {ratio}"
            f" | {worker.loss:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, keep the raw figures."""
    options = parse()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        workers = start(options, Path(folder))
        try:
            records = run(workers, options)
        finally:
            for worker in workers:
                worker.end()
    print(table(workers, records))
    if options.json:
        kept = {k: v for k, v in vars(options).items() if k not in ("data", "json")}
        losses = {worker.name: worker.loss for worker in workers if not worker.failed}
        failed = {worker.name: worker.failed for worker in workers if worker.failed}
        document = {
            "options": kept,
            "machine": machine(),
            "first_loss": losses,
            "failed": failed,
            "records": records,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
