"""The memory estimate against what a run takes.

    OMP_NUM_THREADS=1 python benchmarks/estimate.py
    OMP_NUM_THREADS=1 python benchmarks/estimate.py --rounds 3 --only "bf16, 512"
    python benchmarks/estimate.py --device cuda      # a random base of 1.2 billion weights
    python benchmarks/estimate.py --device cuda --measured FILE...  # today's estimates of those

Each setting runs in a process of its own: `stemtune.Trainer` with a run file's settings, its
largest micro-batch and two steps. *predicted* is what the run wrote to run.json before weights
were loaded. *measured* is the peak resident set of the steps, less what was resident before
weights were loaded; *loading* is the peak until the steps begin, less the same. On a GPU
*measured* is what torch's allocator had reserved at the most, and CUDA's context beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from base import random_base
from workload import ROOT

import stemtune as st
from stemtune.config import Config
from stemtune.data.prepare import prepare
from stemtune.data.survey import survey
from stemtune.fit import heavy_steps
from stemtune.model.load import load_tokenizer
from stemtune.model.memory import peak_memory
from stemtune.report.memory import memory_of

AT_ONCE = 4  # processes on a GPU
HAMLET = str(ROOT / "src/stemtune/starter/hamlet.jsonl")
PAIRS = str(ROOT / "examples/hamlet_preferences.jsonl")
WAYS = {"separate sequences": "padded", "flex": "flex"}
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
ON_GPU = [
    "bf16, 2048",
    "bf16, 4096",
    "bf16, 4096, flex",
    "bf16, 4096, pairs",
    "bf16, 4096, checkpointing",
    "bf16, 8192, checkpointing",
    "bf16, 4096, offload",
    "bf16, 2048, checkpointing, weights elsewhere",
    "bf16, 4096, upper half, r 64",
    "bf16, 4096, 8-bit optimizer, r 64",
    "bf16, 2048, nf4",
    "bf16, 4096, nf4, checkpointing",
    "bf16, 2048, int8",
    "fp32, 2048",
]


def config_of(setting: str, folder: str, device: str, base: str) -> Config:
    """The run file of a setting; its second word is the budget of a micro-batch."""
    words = setting.split(", ")
    data: dict[str, Any] = {"path": HAMLET, "character": "HAMLET", "samples": "dialogue"}
    if "short sequences" in words:
        data |= {"samples": "turn", "history_turns": 1, "max_length": 160, "on_too_long": "drop"}
    adapter: dict[str, Any] = {"r": 64} if "r 64" in words else {}
    if "no dropout" in words:
        adapter["dropout"] = 0.0
    if "upper half" in words:
        adapter["layers"] = 15 if base == "smollm2" else 8
    values: dict[str, Any] = {
        "model": {
            "base": base,
            "dtype": "float32" if words[0] == "fp32" else "bfloat16",
            "device": device,
            "quantization": next((word for word in words if word in ("nf4", "int8")), None),
            "offload_layers": 16 if "weights elsewhere" in words else None,
            "attention": next((WAYS[word] for word in words if word in WAYS), "auto"),
        },
        "adapter": adapter,
        "data": {**data, "eval_fraction": 0.0, "batching": "record"},
        "train": {
            "batch_size": 10 if device == "cpu" else 32,
            "max_steps": 2,
            "micro_batch_tokens": int(words[1]),
            "activation_checkpointing": "checkpointing" in words,
            "activation_offload": "offload" in words,
            "optimizer": "adamw_8bit" if "8-bit optimizer" in words else "adamw",
        },
        "output": {"dir": folder},
        "tracking": {"trackers": []},
    }
    if "pairs" in words:
        values["data"] = {"path": PAIRS, "eval_fraction": 0.0, "batching": "record"}
        values["objective"] = {"type": "dpo"}
    return Config.model_validate(values)


def measure(setting: str, device: str, base: str) -> dict[str, Any]:
    """MB, predicted and measured, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(setting, str(Path(folder) / "run"), device, base)
        trainer = st.Trainer(config)
        loading = peak_memory(torch.device(device))
        context = 0.0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # a new high-water mark
        trainer.runner.rehearse(heavy_steps(trainer.data.train, trainer.plan, config))
        run = trainer.train().output_dir
        peak = peak_memory(torch.device(device))
        found = json.loads((run / "run.json").read_text(encoding="utf-8"))["memory"]
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    before = found["used"] / 1e6
    measured = peak * 2**20 / 1e6 - before
    if device == "cuda":
        context = float(os.environ["STEMTUNE_BENCH_CONTEXT"])
        measured = torch.cuda.max_memory_reserved() / 1e6 + context
    return {
        **{name: size / 1e6 for name, size in found["estimate"].items() if name != "tokens"},
        "tokens": found["estimate"]["tokens"],
        "measured": measured,
        "allocated": peak * 2**20 / 1e6,
        "context": context,
        "loading": loading * 2**20 / 1e6 - before,
        "loss": [json.loads(line).get("loss") for line in lines],
    }


def predicted_anew(setting: str, device: str, base: str) -> dict[str, float]:
    """What the estimate of a run is today, wherever that device may be: MB by part."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(setting, folder, device, base)
        surveyed = survey(config.data, config.train.seed)
        tokenizer = load_tokenizer(config.model)
        data = prepare(surveyed, tokenizer, config.data, answers=config.answers)
        estimate = memory_of(config, data, 80_000_000_000).estimate
        assert estimate is not None
        found = estimate.to_json()
    return {**{name: size / 1e6 for name, size in found.items()}, "tokens": found["tokens"]}


def cuda_context() -> float:
    """MB that a process takes of a GPU before its first tensor and with cuBLAS awake, while nothing
    else changes there."""
    code = (
        "import torch; torch.cuda.init(); free, total = torch.cuda.mem_get_info();"
        "x = torch.ones(64, 64, device='cuda').bfloat16(); x @ x; torch.cuda.synchronize();"
        "print(free - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved(), total - free)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return sum(map(int, output.stdout.split())) / 1e6


def in_own_process(setting: str, device: str, base: str) -> dict[str, Any]:
    """The same in a fresh interpreter."""
    command = [sys.executable, str(Path(__file__)), "--setting", setting]
    command += ["--device", device, "--base", base]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def report(settings: list[str], options: argparse.Namespace, base: str) -> None:
    """A table, setting by setting; of several rounds the median. On a GPU, whose allocators don't
    see one another, some at a time."""
    print("| setting | tokens | predicted MB | measured MB | range | difference | loading MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    figures: dict[str, Any] = {}
    with ThreadPoolExecutor(1 if options.device == "cpu" else AT_ONCE) as pool:
        runs = {
            setting: [
                pool.submit(in_own_process, setting, options.device, base)
                for _ in range(options.rounds)
            ]
            for setting in settings
        }
        for setting, mine in runs.items():
            try:
                figures[setting] = [run.result() for run in mine]
            except subprocess.CalledProcessError as error:
                print(f"| {setting} | exit code {error.returncode} |", flush=True)
                continue
            print(line_of(setting, figures[setting]), flush=True)
            if options.json is not None:  # what was measured stays, whatever comes
                options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def compare_anew(options: argparse.Namespace, base: str) -> None:
    """The same table, of peaks that were measured and of today's estimates."""
    for path in options.measured:
        for setting, found in json.loads(path.read_text(encoding="utf-8")).items():
            estimate = predicted_anew(setting, options.device, base)
            assert estimate["tokens"] == found[0]["tokens"], f"{setting}: another micro-batch"
            print(line_of(setting, [{**one, **estimate} for one in found]), flush=True)


def line_of(setting: str, found: list[dict[str, Any]]) -> str:
    """Of the table."""
    measured = [one["measured"] for one in found]
    median, predicted = statistics.median(measured), found[0]["total"]
    return (
        f"| {setting} | {found[0]['tokens']:,} | {predicted:,.0f} | {median:,.0f}"
        f" | {min(measured):,.0f}-{max(measured):,.0f} | {predicted / median - 1:+.1%}"
        f" | {found[0]['loading']:,.0f} |"
    )


def main() -> None:
    """One setting in this process, or several in their own."""
    every = [*SETTINGS, *ON_GPU]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--base", help="by default SmolLM2, on a GPU a random one")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each setting")
    parser.add_argument("--only", nargs="+", choices=every)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--measured", type=Path, nargs="+", help="figures written by --json")
    parser.add_argument("--setting", choices=every, help="run this one, in this process")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT, of transformers
    if options.setting:
        print(json.dumps(measure(options.setting, options.device, options.base)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or "smollm2"
        if options.measured:
            compare_anew(options, base if options.device == "cpu" else random_base(Path(folder)))
            return
        if options.device == "cuda":
            base = options.base or random_base(Path(folder))
            if "STEMTUNE_BENCH_CONTEXT" not in os.environ:
                os.environ["STEMTUNE_BENCH_CONTEXT"] = str(cuda_context())
        report(options.only or (SETTINGS if options.device == "cpu" else ON_GPU), options, base)


if __name__ == "__main__":
    main()
