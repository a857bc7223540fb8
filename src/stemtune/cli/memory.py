"""Memory on the command line: read as an option, shown as a table."""

import re
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from stemtune.cli.common import out
from stemtune.errors import ConfigError

if TYPE_CHECKING:
    from stemtune.report.memory import Memory

POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
NAMES = {
    "base": "frozen weights",
    "adapter": "trained weights",
    "gradients": "of the trained weights",
    "optimizer": "AdamW's state",
    "activations": "kept for the backward pass",
    "temporaries": "head and backward pass, for a moment",
    "runtime": "libraries",
    "holes": "freed memory that can't be used again",
}


def parse_size(text: str) -> int:
    """Bytes of `10GB` (10⁹ bytes each), `10GiB` (2³⁰) or `8192MB`.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if found is None or (found[3] and not found[2]):
        what = f"{text!r} is no amount of memory"
        raise ConfigError(what, where="--device-memory", hint="write 10GB, 10GiB or 8192MB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** POWER[found[2]])


def print_memory(memory: "Memory") -> None:
    """The estimate by part, whether it fits, and what to change."""
    found = memory.estimate
    if memory.padded:
        what = f"nothing is shared on this base, it trains padded: {memory.padded}"
        out.print(Text(what, style="yellow"), soft_wrap=True)
    if found is None:
        out.print(f"memory: no estimate for this base ({memory.reason})", markup=False)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold", style="dim")
    for part, size in found.parts.items():
        table.add_row(f"  {part}", gigabytes(size), NAMES[part])
    table.add_row("  in all", gigabytes(found.total), "")
    title = f"\nmemory, in micro-batches of {found.tokens:,} tokens (estimated)"
    out.print(Text(title, style="bold"))
    out.print(table)
    there = f"{gigabytes(memory.available)} on {memory.device}"
    if memory.fits:
        out.print(f"it fits into {there}", markup=False)
        return
    out.print(Text(f"it does not fit into {there}", style="yellow"))
    for change in memory.changes:
        settings = " ".join(f"{name}={_yaml(value)}" for name, value in change.settings.items())
        yet = "" if change.total <= memory.available else ", not yet enough"
        line = f"  → {settings}: {gigabytes(change.total)}{yet}"
        out.print(line, markup=False, soft_wrap=True)
    if not memory.changes:
        out.print("  → take a smaller base: no settings make it fit", markup=False)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def gigabytes(size: float) -> str:
    """A size as it is shown: 10⁹ bytes are a GB."""
    return f"{size / 1e9:.2f} GB"
