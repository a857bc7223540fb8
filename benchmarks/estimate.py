"""The memory estimate against what a run takes.

    OMP_NUM_THREADS=1 python benchmarks/estimate.py
    OMP_NUM_THREADS=1 python benchmarks/estimate.py --rounds 3 --only "bf16, 512"

Each setting runs in a process of its own: `stemtune.Trainer` with a run file's settings, its
largest micro-batch and two steps. *predicted* is what the run wrote to run.json before weights
were loaded. *measured* is the peak resident set of the steps, less what was resident before
weights were loaded; *loading* is the peak until the steps begin, less the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from workload import ROOT

import stemtune as st
from stemtune.config import Config
from stemtune.model.memory import peak_memory

HAMLET = str(ROOT / "src/stemtune/starter/hamlet.jsonl")
PAIRS = str(ROOT / "examples/hamlet_preferences.jsonl")
SETTINGS = [
    "fp32, 1024",
    "fp32, 512, r 64",
    "fp32, 2048, no dropout",
    "fp32, 2048, upper half",
    "fp32, 2048, checkpointing",
    "fp32, 4096, checkpointing",
    "fp32, 1024, short sequences",
    "fp32, 1024, separate sequences",
    "fp32, 1024, pairs",
    "bf16, 512",
    "bf16, 2048",
    "bf16, 2048, upper half, r 64",
    "bf16, 2048, checkpointing",
    "bf16, 4096, checkpointing",
    "bf16, 1024, nf4",
    "bf16, 2048, nf4, checkpointing, 8-bit optimizer",
    "fp32, 1024, int8",
]


def config_of(setting: str, folder: str) -> Config:
    """The run file of a setting; its second word is the budget of a micro-batch."""
    words = setting.split(", ")
    data: dict[str, Any] = {"path": HAMLET, "character": "HAMLET", "samples": "dialogue"}
    if "short sequences" in words:
        data |= {"samples": "turn", "history_turns": 1, "max_length": 160, "on_too_long": "drop"}
    adapter: dict[str, Any] = {"r": 64} if "r 64" in words else {}
    if "no dropout" in words:
        adapter["dropout"] = 0.0
    if "upper half" in words:
        adapter["layers"] = 15
    values: dict[str, Any] = {
        "model": {
            "base": "smollm2",
            "dtype": "float32" if words[0] == "fp32" else "bfloat16",
            "device": "cpu",
            "quantization": next((word for word in words if word in ("nf4", "int8")), None),
            "attention": "padded" if "separate sequences" in words else "auto",
        },
        "adapter": adapter,
        "data": {**data, "eval_fraction": 0.0, "batching": "record"},
        "train": {
            "batch_size": 10,
            "max_steps": 2,
            "micro_batch_tokens": int(words[1]),
            "activation_checkpointing": "checkpointing" in words,
            "optimizer": "adamw_8bit" if "8-bit optimizer" in words else "adamw",
        },
        "output": {"dir": folder},
        "tracking": {"trackers": []},
    }
    if "pairs" in words:
        values["data"] = {"path": PAIRS, "eval_fraction": 0.0, "batching": "record"}
        values["objective"] = {"type": "dpo"}
    return Config.model_validate(values)


def measure(setting: str) -> dict[str, float]:
    """MB, predicted and measured, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(setting, str(Path(folder) / "run"))
        trainer = st.Trainer(config)
        loading = peak_memory(torch.device("cpu"))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # a new high-water mark
        trainer.runner.rehearse(trainer.data.train.longest_records(config.train.batch_size))
        run = trainer.train().output_dir
        peak = peak_memory(torch.device("cpu"))
        found = json.loads((run / "run.json").read_text(encoding="utf-8"))["memory"]
    before = found["used"] / 1e6
    return {
        **{name: size / 1e6 for name, size in found["estimate"].items() if name != "tokens"},
        "tokens": found["estimate"]["tokens"],
        "measured": peak * 2**20 / 1e6 - before,
        "loading": loading * 2**20 / 1e6 - before,
    }


def in_own_process(setting: str) -> dict[str, float]:
    """The same in a fresh interpreter."""
    command = [sys.executable, str(Path(__file__)), "--setting", setting]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def report(settings: list[str], rounds: int, path: Path | None) -> None:
    """A table, setting by setting; of several rounds the median."""
    print("| setting | tokens | predicted MB | measured MB | range | difference | loading MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    figures: dict[str, Any] = {}
    for setting in settings:
        print(f"{setting} …", file=sys.stderr, flush=True)
        found = [in_own_process(setting) for _ in range(rounds)]
        figures[setting] = found
        measured = [one["measured"] for one in found]
        median, predicted = statistics.median(measured), found[0]["total"]
        print(
            f"| {setting} | {found[0]['tokens']:,} | {predicted:,.0f} | {median:,.0f}"
            f" | {min(measured):,.0f}-{max(measured):,.0f} | {predicted / median - 1:+.1%}"
            f" | {found[0]['loading']:,.0f} |",
            flush=True,
        )
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """One setting in this process, or several in their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--rounds", type=int, default=1, help="processes for each setting")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--setting", choices=SETTINGS, help="run this one, in this process")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT, of transformers
    if options.setting:
        print(json.dumps(measure(options.setting)))
    else:
        report(options.only, options.rounds, options.json)


if __name__ == "__main__":
    main()
