"""Where a run's numbers go: `metrics.jsonl`, trackers, the console."""

import difflib
import json
import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import LoggerType
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track

from stemtune.config import Tracking
from stemtune.errors import ConfigError
from stemtune.rundir import sync, write_text

log = logging.getLogger(__name__)
Metrics = dict[str, Any]
Item = TypeVar("Item")


def require_trackers(config: Tracking) -> None:
    """Refuse trackers that accelerate does not know or that are not installed.

    Raises:
        ConfigError: with what to install.
    """
    known = [str(name) for name in LoggerType if name != LoggerType.ALL]
    for name in config.trackers:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"unknown tracker {name!r}", where="tracking.trackers", hint=hint)
        if find_spec(name) is None:
            hint = f"pip install {name}, or take it out of the list"
            what = f"the tracker {name!r} is not installed"
            raise ConfigError(what, where="tracking.trackers", hint=hint)


def read_metrics(path: Path) -> list[Metrics]:
    """All whole lines of a `metrics.jsonl`; none where there is no such file."""
    if not path.exists():
        return []
    result: list[Metrics] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            result.append(json.loads(line))
        except ValueError:  # the last line, cut by a crash
            break
    return result


class MetricsFile:
    """`metrics.jsonl`: a line a step, and a line an evaluation."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Lines past `after_step`, which a resumed run will write again, are dropped."""
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= after_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(path, text if after_step else "")

    def lines(self) -> list[Metrics]:
        """See `read_metrics`."""
        return read_metrics(self.path)

    def sync(self) -> None:
        """Have the disk hold what was written."""
        sync(self.path)

    def write(self, line: Metrics) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ConsoleProgress:
    """A bar on a terminal; a log line now and then elsewhere.

    Args:
        quiet: without the bar.
    """

    def __init__(self, total: int, start: int, *, quiet: bool = False) -> None:
        self.total = total
        console = Console(stderr=True)
        self.bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("steps", total=total, completed=start, numbers="")

    def step(self, line: Metrics) -> None:
        """Show a step."""
        accuracy = line.get("rewards_accuracy")
        preferred = "" if accuracy is None else f"accuracy {accuracy:.2f}  "
        loss = "skipped" if line["loss"] is None else f"loss {line['loss']:.3f}"
        numbers = (
            f"{loss}  {preferred}{_short(line['tokens'] / line['seconds'])} tok/s "
            f"({_short(line['distinct_tokens'] / line['seconds'])} distinct)"
        )
        self.bar.update(self.task, completed=line["step"], numbers=numbers)
        every = max(1, self.total // 20)
        shown = self.bar.disable and (line["step"] % every == 0 or line["step"] == self.total)
        level = logging.INFO if shown else logging.DEBUG
        log.log(level, "step %d/%d  %s", line["step"], self.total, numbers)


def track(items: Seq[Item], what: str, *, quiet: bool = False) -> Iterator[Item]:
    """Items one by one, with a bar on a terminal, unless `quiet`."""
    console = Console(stderr=True)
    yield from rich_track(items, what, console=console, disable=quiet or not console.is_terminal)


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
