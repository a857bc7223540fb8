"""Peak resident memory of one optimizer step: a prefix tree against a padded batch.

    python benchmarks/memory.py
    python benchmarks/memory.py --form multiturn --dtype bfloat16 --json memory.json

Each case runs in a process of its own. What is counted is the peak (VmHWM) that one step reaches,
less what was resident when model and optimizer stood ready: activations, logits, gradients and
AdamW's first state.

Cases:
    tree         all sequences as one prefix tree.
    padded       the same sequences in one batch, padded on the right, through the model's ordinary
                 attention (causal SDPA, no mask), the head on targets alone.
    equal tokens a padded batch of just as many tokens as the tree has distinct ones, with just as
                 many scored positions: what sharing itself costs, apart from what it saves.
                 It is cut from the longest sequences, so its loss means nothing.
    own equal    the same batch through stemtune's own padded path, with its kernels and allocator.
    own padded   there too, but cut so that the rows differ in length as the sequences do: as many
                 tokens with the padding that a real batch has, and so with the mask that hides it.

With freed memory kept, a peak depends on where in the heap small blocks happen to lie: two runs of
one command differ by a quarter. `--rounds 5` takes the median of as many processes for each case.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from base import load_adapted, load_base
from contestants import hand, stemtune_tree
from sft import add_workload_arguments, note, quiet, samples_of
from workload import Sample, separate_work, shared_work

CASES = ["tree", "padded", "equal tokens", "own equal", "own padded"]
OWN = ("tree", "own equal", "own padded")
MIB = 1024  # kB, the unit of /proc


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    add_workload_arguments(parser)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--smoke", action="store_true", help="2 sequences")
    add_allocator_argument(parser)
    parser.add_argument("--rounds", type=int, default=1, help="processes for each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--case", choices=CASES, help="run this case alone, in this process")
    parser.set_defaults(sequences=8)  # 16 windows padded into one fp32 batch want over 20 GB
    options = parser.parse_args()
    if options.smoke:
        options.sequences = 2
    return options


def add_allocator_argument(parser: argparse.ArgumentParser) -> None:
    """Whose allocator keeps freed memory: stemtune's alone, as in life, everyone's, or nobody's,
    so that the peak is what is alive."""
    parser.add_argument("--allocator", choices=["own", "everyone", "plain"], default="own")


def load_for(ours: bool, dtype: str, allocator: str) -> Any:
    """The model with its adapter, and its tokenizer; the allocator made ready or left alone."""
    keeps = allocator == "everyone" or (ours and allocator == "own")
    with nullcontext() if keeps else mock.patch("stemtune.model.load.prepare_processor"):
        return load_adapted(dtype, ours=ours)


def measure(options: argparse.Namespace) -> float:
    """MiB that one step of `options.case` needs at its peak, on top of the loaded model."""
    model, tokenizer = load_for(options.case in OWN, options.dtype, options.allocator)
    samples = samples_of(options, tokenizer)
    if options.case in OWN:
        backend = "auto" if options.case == "tree" else "padded"
        step = stemtune_tree(model, tokenizer, sys.maxsize, backend)
    else:
        step = hand(model, tokenizer, 0, batch=len(samples))
    if options.case in ("equal tokens", "own equal"):
        samples = equal_batch(samples)
    elif options.case == "own padded":
        samples = uneven_batch(samples)
    step([Sample(sample.input_ids[:8], [False] * 7 + [True]) for sample in samples[:1]])
    reset_peak()
    baseline = resident("VmRSS")
    step(samples)
    return resident("VmHWM") - baseline


def equal_batch(samples: Sequence[Sample]) -> list[Sample]:
    """Rows without padding that hold as many tokens, and scored positions, as the samples' tree."""
    work = shared_work(samples)
    by_length = sorted(samples, key=lambda sample: len(sample.input_ids), reverse=True)
    count = math.ceil(work.tokens / len(by_length[0].input_ids))
    width = min(work.tokens // count, len(by_length[count - 1].input_ids))
    scored = work.scored // count
    mask = [False] * (width - scored) + [True] * scored
    return [Sample(sample.input_ids[:width], mask) for sample in by_length[:count]]


def uneven_batch(samples: Sequence[Sample]) -> list[Sample]:
    """The same rows, but for the first one cut as much shorter as their sequences are."""
    rows = equal_batch(samples)
    lengths = sorted((len(sample.input_ids) for sample in samples), reverse=True)
    kept = [
        len(row.input_ids) * length // lengths[0]
        for row, length in zip(rows, lengths, strict=False)
    ]
    return [
        Sample(row.input_ids[-count:], row.is_target[-count:])
        for row, count in zip(rows, kept, strict=True)
    ]


def reset_peak() -> None:
    """Give freed memory back to the system, then start the kernel's high-water mark anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(field: str) -> float:
    """A size from /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / MIB
    raise KeyError(field)


def in_own_process(case: str) -> float:
    """`measure` for one case, in a fresh interpreter with the same arguments."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--case", case]
    # Every large block is mapped by itself and given back when it is freed: the peak is then what
    # was alive, not what malloc happened to keep.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
    return float(output.split()[-1])


def report(options: argparse.Namespace) -> None:
    """All cases in turn, round by round; the medians, and their ratios to the tree's."""
    samples = samples_of(options, load_base(options.dtype)[1])
    equal = separate_work(equal_batch(samples), batch=len(samples))
    work = {
        "tree": shared_work(samples),
        "padded": separate_work(samples, batch=len(samples)),
        "equal tokens": equal,
        "own equal": equal,
        "own padded": separate_work(uneven_batch(samples), batch=len(samples)),
    }
    peaks: dict[str, list[float]] = {case: [] for case in options.cases}
    for number in range(options.rounds):
        for case in options.cases:
            note(f"round {number + 1}: {case} …")
            peaks[case].append(in_own_process(case))
    median = {case: statistics.median(values) for case, values in peaks.items()}
    print("| case | tokens run | scored | peak MiB | range | to the tree |")
    print("|---|---|---|---|---|---|")
    for case, values in peaks.items():
        to_tree = median[case] / median[options.cases[0]]
        print(
            f"| {case} | {work[case].tokens:,} | {work[case].scored:,} | {median[case]:,.0f}"
            f" | {min(values):,.0f}-{max(values):,.0f} | {to_tree:.2f}× |"
        )
    if options.json:
        figures = {
            case: {
                "peaks_mib": values,
                "tokens": work[case].tokens,
                "scored": work[case].scored,
            }
            for case, values in peaks.items()
        }
        kept = {k: v for k, v in vars(options).items() if k not in ("data", "json", "case")}
        text = json.dumps({"options": kept, "cases": figures}, indent=1) + "\n"
        options.json.write_text(text, encoding="utf-8")


def main() -> None:
    """One case in this process, or all of them in their own."""
    options = parse()
    quiet()
    if options.case:
        print(measure(options))
    else:
        report(options)


if __name__ == "__main__":
    main()
