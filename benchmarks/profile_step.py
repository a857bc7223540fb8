"""Where the time of a step goes, by torch.profiler.

    python benchmarks/profile_step.py
    python benchmarks/profile_step.py --works windows rag --dtypes bfloat16

A step of stemtune for each work, profiled after two that warm up. Parts of its seconds:
    frozen        products with the base's matrices, forward and backward
    adapter       those with the adapter's
    attention     forward and backward, what it copies and its softmax among them
    head          log-probabilities and expected embeddings
    the rest      norms, rotary, activation, residuals, copies between dtypes, optimizer, Python
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import dpo
import sft
from base import DTYPES, load_adapted
from contestants import stemtune_tree
from peak import matmul_peak
from sft import note, quiet
from torch.profiler import ProfilerActivity, profile
from workload import ROOT

FILM = ROOT.parent / "shared/data/kdconv_film/dialogues.jsonl"
RANK = 16
PARTS = ["frozen", "adapter", "attention", "head", "the rest"]
SFT = {
    "windows": ["--form", "windows", "--sequences", "8"],
    "multi-turn": ["--form", "multiturn", "--sequences", "16"],
    "film": ["--data", str(FILM), "--character", "乙", "--form", "windows", "--sequences", "16"],
    "single": ["--form", "single", "--sequences", "16"],
}
DPO = {
    "rag": ["--work", "rag", "--groups", "1"],
    "rag of 2,100": ["--work", "rag", "--groups", "1", "--prompt", "2100", "--answer", "100"],
    "ranked": ["--work", "ranked", "--groups", "1"],
    "unshared": ["--work", "unshared", "--groups", "2"],
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--works", nargs="+", default=[*SFT, *DPO], choices=[*SFT, *DPO])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=[*DTYPES])
    return parser.parse_args()


def step_of(work: str, dtype: str) -> Callable[[], Any]:
    """One step of stemtune on a work."""
    model, tokenizer = load_adapted(dtype, ours=True)  # pyright: ignore[reportArgumentType]
    if work in SFT:
        samples = sft.samples_of(sft.parse([*SFT[work], "--dtype", dtype]), tokenizer)
        step = stemtune_tree(model, tokenizer, 4096)
        return lambda: step(samples)
    groups = dpo.load_groups(dpo.parse([*DPO[work], "--dtype", dtype]), tokenizer)
    references = dpo.reference_of(model, groups)
    compare = dpo.stemtune_tree(model, tokenizer, 4096)
    return lambda: compare(groups, references)


def ancestors(event: Any) -> Iterator[Any]:
    """An event and those that called it."""
    while event is not None:
        yield event
        event = event.cpu_parent


def part_of(event: Any) -> str:
    """Which part of the step an operator belongs to."""
    for above in ancestors(event):
        if "_Segments" in above.name:
            return "attention"
        if "_FrozenHead" in above.name:
            return "head"
        if "_LoraLinear" in above.name:
            products = ("mm", "linear_pointwise")
            if not any(name in event.name for name in products):
                return "adapter" if event.name != above.name else "the rest"
            shapes = [size for shape in event.input_shapes for size in shape]
            return "adapter" if RANK in shapes else "frozen"
    return "the rest"


def seconds_by_part(step: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Seconds of a step without the profiler, the median of three, and of its parts with it."""
    step()
    taken: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step()
    parts = dict.fromkeys(PARTS, 0.0)
    for event in found.events():
        parts[part_of(event)] += event.self_cpu_time_total / 1e6
    return statistics.median(taken), parts


def main() -> None:
    """The table."""
    options = parse()
    quiet()
    print(f"| work | dtype | s | {' | '.join(PARTS)} |")
    print("|---" * (3 + len(PARTS)) + "|")
    for dtype in options.dtypes:
        for work in options.works:
            note(f"{work}, {dtype} …")
            seconds, parts = seconds_by_part(step_of(work, dtype))
            told = " | ".join(f"{parts[part]:.2f}" for part in PARTS)
            print(f"| {work} | {dtype} | {seconds:.2f} | {told} |", flush=True)
        note(f"peak now: {matmul_peak(DTYPES[dtype]):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
