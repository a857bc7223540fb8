"""Seconds of an epoch when the states below the adapted blocks are kept, and when they are not.

    python benchmarks/lower_states.py --dtype bfloat16 --json lower-states.json

Whole runs over the starter data, in turns:
    everything   all blocks adapted: what a run does by itself.
    upper half   the adapter in the upper half of the blocks.
    … kept       the same, what lies below computed once. Its first epoch counts that computing.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from base import DTYPES
from sft import machine, note, quiet
from workload import ROOT

import stemtune as st
from stemtune.lower import LowerStates

STARTER = ROOT / "src/stemtune/starter/hamlet.jsonl"
HALF = 15  # of 30 blocks
RUNS: dict[str, dict[str, Any]] = {
    "everything": {},
    "upper half": {"adapter.layers": HALF},
    "… kept": {"adapter.layers": HALF, "train.keep_lower_states": True},
}
EPOCHS = 3


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--rows", type=int, default=12, help="dialogues of the starter data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    return parser.parse_args()


def epochs(settings: dict[str, Any], rows: Path, folder: Path, dtype: str) -> list[float]:
    """Seconds of each epoch of a run."""
    run_file = folder / "run.yaml"
    run_file.write_text("model: {base: smollm2, device: cpu}\n", encoding="utf-8")
    overrides = {
        "model.dtype": dtype,
        "data.path": rows,
        "data.character": "HAMLET",
        "data.eval_fraction": 0,
        "train.num_train_epochs": EPOCHS,
        "train.save_steps": 10_000,
        "tracking.trackers": "[]",
        "output.dir": folder / "run",
        **settings,
    }
    config = st.load_config(run_file, [f"{name}={value}" for name, value in overrides.items()])
    computing = 0.0

    def timed(own: Callable[..., None]) -> Callable[..., None]:
        def compute(*args: Any) -> None:
            nonlocal computing
            started = time.perf_counter()
            own(*args)
            computing = time.perf_counter() - started

        return compute

    with mock.patch.object(LowerStates, "compute", timed(LowerStates.compute)):
        st.train(config)
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "seconds" in line]
    size = len(steps) // EPOCHS
    found = [sum(s["seconds"] for s in steps[at : at + size]) for at in range(0, len(steps), size)]
    return [found[0] + computing, *found[1:]]


def main() -> None:
    """All runs, round by round, and the table."""
    options = parse()
    quiet()
    found: dict[str, list[list[float]]] = {name: [] for name in RUNS}
    for turn in range(options.rounds):
        for name, settings in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "rows.jsonl"
                lines = STARTER.read_text(encoding="utf-8").splitlines()[: options.rows]
                rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
                seconds = epochs(settings, rows, Path(folder), options.dtype)
            found[name].append(seconds)
            told = ", ".join(f"{value:.1f}" for value in seconds)
            note(f"round {turn + 1}/{options.rounds}  {name:<12} {told} s")
    print("| run | first epoch, s | later, s | later ÷ its first | later ÷ everything's |")
    print("|---" * 5 + "|")
    plain = [statistics.mean(seconds[1:]) for seconds in found["everything"]]
    for name, rounds in found.items():
        first = statistics.median(seconds[0] for seconds in rounds)
        later = [statistics.mean(seconds[1:]) for seconds in rounds]
        own = statistics.median(b / seconds[0] for b, seconds in zip(later, rounds, strict=True))
        all_of = statistics.median(b / a for b, a in zip(later, plain, strict=True))
        middle = statistics.median(later)
        print(f"| {name} | {first:.1f} | {middle:.1f} | {own:.2f} | {all_of:.2f} |")
    if options.json:
        kept = {"rows": options.rows, "rounds": options.rounds, "dtype": options.dtype}
        document = {"options": kept, "machine": machine(), "seconds": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
