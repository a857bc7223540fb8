"""Time the same SFT step by several contestants, interleaved in one run.

    python benchmarks/sft.py --smoke
    python benchmarks/sft.py --form windows --dtype bfloat16 --json windows-bf16.json

Every round runs each contestant once, in an order that rotates, with the processor's peak
measured between any two of them. Ratios are taken within a round, so that a slow minute of the
machine hits both sides of them. Beside each step stands how many cores the process really had:
clearly fewer than its threads means that somebody else was computing. All contestants train on,
step after step, each its own adapter: that their losses stay equal says that gradients and
updates are equal too.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from base import DTYPES, load_adapted, load_base
from contestants import CONTESTANTS, PEERS, Step, work_of
from peak import matmul_peak, step_flops
from workload import Sample, Work, default_data, load_samples, separate_work, shared_work

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # relative for fp32 (four digits), else absolute
WARM_UP_SAMPLES = 1
OURS = ("stemtune", "stemtune_alone")

Record = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    add_workload_arguments(parser)
    parser.add_argument("--contestants", default="stemtune,trl,trl_head,hand")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    parser.add_argument("--smoke", action="store_true", help="2 sequences, 1 round")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.sequences, options.rounds = 2, 1
    options.contestants = options.contestants.split(",")
    unknown = set(options.contestants) - set(CONTESTANTS)
    if unknown:
        parser.error(f"no contestant {sorted(unknown)}; there are {', '.join(CONTESTANTS)}")
    return options


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train on, and in what: the arguments that sft.py and memory.py share."""
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--character", help="the role that is trained (default: by file name)")
    parser.add_argument("--form", choices=["windows", "multiturn", "single"], default="windows")
    parser.add_argument("--sequences", type=int, default=16, help="turns of the character")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--micro-batch", type=int, default=4096, help="distinct tokens of a tree")


def samples_of(options: argparse.Namespace, tokenizer: Any) -> list[Sample]:
    """The work that the command line asks for."""
    return load_samples(options.data, options.character, options.form, options.sequences, tokenizer)


def run(options: argparse.Namespace, samples: list[Sample]) -> list[Record]:
    """All rounds; one record for each timed step."""
    longest = sorted(samples, key=lambda sample: len(sample.input_ids))[-WARM_UP_SAMPLES:]
    steps: dict[str, Step] = {}
    flops: dict[str, float] = {}
    for name in options.contestants:
        model, tokenizer = load_adapted(options.dtype, ours=name in OURS)
        steps[name] = CONTESTANTS[name](model, tokenizer, options.micro_batch)
        flops[name] = step_flops(model, work_of(name, samples, options.micro_batch))
        warm_up, _ = steps[name](longest)
        note(f"ready: {name} (warm-up loss {warm_up:.6f})")
    records: list[Record] = []
    peak = matmul_peak(DTYPES[options.dtype], options.peak_seconds)
    for turn in range(options.rounds):
        shift = turn % len(options.contestants)
        for name in options.contestants[shift:] + options.contestants[:shift]:
            before = peak
            clock, used = time.perf_counter(), time.process_time()
            loss, seconds = steps[name](samples)
            used = (time.process_time() - used) / (time.perf_counter() - clock)
            peak = matmul_peak(DTYPES[options.dtype], options.peak_seconds)
            records.append(
                {
                    "round": turn,
                    "contestant": name,
                    "seconds": seconds,
                    "loss": loss,
                    "cores_used": used,
                    "flops": flops[name],
                    "peak_before": before,
                    "peak_after": peak,
                    "share_of_peak": flops[name] / seconds / 1e9 / ((before + peak) / 2),
                }
            )
            note(
                f"round {turn + 1}/{options.rounds}  {name:<12} {seconds:7.2f} s  {loss:.6f}"
                f"  {used:.1f} of {torch.get_num_threads()} cores"
            )
    return records


def describe(samples: list[Sample], options: argparse.Namespace) -> None:
    """What a step holds, before any of it is run."""
    each, once = separate_work(samples), shared_work(samples)
    note(
        f"{options.data.parent.name}/{options.data.name}, {options.form}: {len(samples)} sequences,"
        f" {each.tokens:,} tokens, {once.tokens:,} distinct (ratio"
        f" {each.tokens / once.tokens:.2f}), {each.scored:,} targets, {options.dtype}"
    )


def table(records: list[Record], options: argparse.Namespace, samples: list[Sample]) -> str:
    """One line a contestant: what it computed, how long it took, how much of the peak that is."""
    heads = ["contestant", "tokens run", "scored", "median s", "min", "max"]
    heads += ["best peer ÷ it", "GFLOP/s", "of peak"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in options.contestants:
        own = [record for record in records if record["contestant"] == name]
        seconds = [record["seconds"] for record in own]
        work: Work = work_of(name, samples, options.micro_batch)
        ratios = ratios_to_best_peer(records, name)
        rate = statistics.median(record["flops"] / record["seconds"] / 1e9 for record in own)
        share = statistics.median(record["share_of_peak"] for record in own)
        lines.append(
            f"| {name} | {work.tokens:,} | {work.scored:,} | {statistics.median(seconds):.2f}"
            f" | {min(seconds):.2f} | {max(seconds):.2f}"
            f" | {f'{statistics.median(ratios):.2f}×' if ratios else '–'}"
            f" | {rate:.0f} | {share:.0%} |"
        )
    return "\n".join(lines)


def ratios_to_best_peer(records: list[Record], name: str) -> list[float]:
    """For each round: seconds of that round's fastest other peer over those of `name`."""
    ratios: list[float] = []
    for own in (record for record in records if record["contestant"] == name):
        others = [
            record["seconds"]
            for record in records
            if record["round"] == own["round"]
            and record["contestant"] in PEERS
            and record["contestant"] != name
        ]
        if others:
            ratios.append(min(others) / own["seconds"])
    return ratios


def sharing(records: list[Record], samples: list[Sample]) -> str:
    """Seconds of the tree ÷ (share of distinct tokens × seconds without sharing): 1 is what the
    arithmetic of distinct tokens promises. Empty where one of the two did not take part."""
    seconds = {(r["contestant"], r["round"]): r["seconds"] for r in records}
    pairs = [
        (value, seconds[OURS[1], turn])
        for (name, turn), value in seconds.items()
        if name == OURS[0] and (OURS[1], turn) in seconds
    ]
    if not pairs:
        return ""
    share = shared_work(samples).tokens / separate_work(samples).tokens
    ratio = statistics.median(tree / (share * alone) for tree, alone in pairs)
    return f"wall time ÷ (distinct share {share:.3f} × without sharing): {ratio:.2f}\n"


def check_losses(records: list[Record], dtype: str) -> str:
    """The losses of every round, side by side, and how far apart they are at most: relative in
    fp32, absolute in bfloat16, where rounding alone makes the paths drift apart.

    Raises:
        AssertionError: in fp32, they do not agree to four digits.
    """
    names = list(dict.fromkeys(record["contestant"] for record in records))
    lines = [f"{'round':<6}" + "".join(f"{name:>13}" for name in names) + f"{'spread':>12}"]
    worst = 0.0
    for turn in sorted({record["round"] for record in records}):
        loss = {r["contestant"]: r["loss"] for r in records if r["round"] == turn}
        spread = max(loss.values()) - min(loss.values())
        worst = max(worst, spread / (min(loss.values()) if dtype == "float32" else 1.0))
        row = "".join(f"{loss[name]:13.6f}" for name in names)
        lines.append(f"{turn + 1:<6}{row}{spread:12.2e}")
    verdict = "within" if worst <= TOLERANCE[dtype] else "BEYOND"
    lines.append(f"largest difference {worst:.1e}: {verdict} {TOLERANCE[dtype]:.0e}")
    report = "\n".join(lines)
    assert dtype != "float32" or worst <= TOLERANCE[dtype], report
    return report


def machine() -> Record:
    """What the figures were measured on, without a name or a path."""
    tuning = ("OMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD", "DNNL_", "ONEDNN_")
    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "environment": {k: v for k, v in os.environ.items() if k.startswith(tuning)},
    }


def quiet() -> None:
    """No progress bars, and none of the peers' notes on their own deprecated names."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def note(line: str) -> None:
    """Progress goes to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run, print the table and the losses, keep the raw figures."""
    options = parse()
    quiet()
    samples = samples_of(options, load_base(options.dtype)[1])
    describe(samples, options)
    records = run(options, samples)
    if options.json:
        kept = {k: v for k, v in vars(options).items() if k not in ("data", "json")}
        work = {n: asdict(work_of(n, samples, options.micro_batch)) for n in options.contestants}
        document = {"options": kept, "machine": machine(), "work": work, "records": records}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(records, options, samples))
    print(sharing(records, samples))
    print(check_losses(records, options.dtype))


if __name__ == "__main__":
    main()
