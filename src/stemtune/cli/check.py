"""`stemtune check`: what a run would train on, before any weights are loaded."""

import json
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from stemtune.cli.common import Json, Overrides, RunFile, log_to_stderr, out
from stemtune.cli.memory import parse_size, print_memory
from stemtune.config import Answers, Config, Data
from stemtune.errors import DataError, printable
from stemtune.runfile import load_stages

if TYPE_CHECKING:
    from stemtune.data.prepare import Prepared
    from stemtune.data.records import Ledger
    from stemtune.data.survey import Survey
    from stemtune.report.memory import Memory
    from stemtune.report.summary import Piece, Summary

KINDS_SHOWN, PLACES_SHOWN = 40, 3


@dataclass(frozen=True)
class Shown:
    """A sequence as text."""

    place: str
    role: str
    pieces: "list[Piece]"


def check(
    run_file: RunFile,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="How many records to show as text.")] = 2,
    as_json: Json = False,
    device_memory: Annotated[
        str,
        typer.Option(
            help="Memory of another device than this one, such as 10GB: a GPU, unless model.device"
            " says otherwise. Does a run fit there, and if not, what to change?"
        ),
    ] = "",
) -> None:
    """Show what a run would train on: rows, faults, lengths, sharing, memory, and trained tokens
    marked."""
    available = parse_size(device_memory) if device_memory else None
    stages = load_stages(run_file, overrides)
    log_to_stderr()
    for number, config in enumerate(stages, 1):
        if len(stages) > 1 and not as_json:
            out.print(f"\n[bold]stage {number} of {len(stages)}[/bold]")
        _check(config, show, as_json, available)


def _check(config: Config, show: int, as_json: bool, available: int | None) -> None:
    # All that is wrong is gathered; the first fault would stop a run.
    settings = config.data.model_copy(update={"on_bad_row": "skip"})
    strict = config.data.on_bad_row == "error"
    from stemtune.data.records import Ledger
    from stemtune.data.survey import survey

    surveyed = survey(settings, config.train.seed)
    if strict and surveyed.ledger.num_refused:  # said before anything slow is imported
        _stop(surveyed.ledger, as_json)
    from stemtune.data.prepare import prepare
    from stemtune.model.load import base_source, load_tokenizer, require_base
    from stemtune.model.quantized import require_trainable
    from stemtune.report.memory import memory_of
    from stemtune.report.summary import pieces, summarise

    require_base(config.model)
    require_trainable(base_source(config.model, weights=False), config.model)
    tokenizer = load_tokenizer(config.model)
    data = prepare(surveyed, tokenizer, settings, answers=config.answers, gather=True)
    too_long = config.data.on_too_long != "drop"
    fatal = Ledger(rows=data.ledger.rows)
    for refusal in data.ledger.refused:
        if too_long if refusal.too_long else strict:
            fatal.refuse(refusal)
    if fatal.num_refused:
        fatal.kinds = {kind: data.ledger.kinds[kind] for kind in fatal.kinds}
        fatal.num_refused = sum(fatal.kinds.values())
        _stop(fatal, as_json)
    summary = summarise(data, config, _elsewhere(surveyed, tokenizer, settings, config.answers))
    shown = [
        Shown(str(data.train.place(number)), sequence.role, pieces(sequence, tokenizer))
        for number, sequences in enumerate(data.train.sequences[:show])
        for sequence in sequences
    ]
    memory = memory_of(config, data, available)
    if as_json:
        samples = [asdict(sequence) for sequence in shown]
        figures = {**summary.to_json(), "memory": memory.to_json(), "samples": samples}
        print(json.dumps(figures, ensure_ascii=False))
    else:
        _print(summary, memory, data.ledger, shown)


def _elsewhere(
    surveyed: "Survey", tokenizer: Any, settings: Data, answers: Answers
) -> "dict[str, Prepared]":
    """The same data with their memories where they are not: what would that share?"""
    from stemtune.data.prepare import prepare

    if settings.memories is None:
        return {}
    before = settings.memories.position == "before_history"
    position = "after_history" if before else "before_history"
    memories = settings.memories.model_copy(update={"position": position})
    moved = settings.model_copy(update={"memories": memories})
    return {position: prepare(surveyed, tokenizer, moved, answers=answers, gather=True)}


def _stop(ledger: "Ledger", as_json: bool) -> NoReturn:
    """Show every row that would stop a run.

    Raises:
        DataError: always.
    """
    first, count = ledger.refused[0], ledger.num_refused
    if as_json:
        print(ledger.to_json())
    elif count > 1:  # a single one is said by the error itself
        _print_refused(ledger)
    more = f" (and {count - 1:,} more of {ledger.rows:,} rows)" if count > 1 else ""
    raise DataError(f"{first.what}{more}", where=first.place, hint=first.hint)


def _print(summary: "Summary", memory: "Memory", ledger: "Ledger", shown: list["Shown"]) -> None:
    out.print(_table(summary))
    print_memory(memory)
    out.print(_histogram("sequences by length in tokens", summary.lengths))
    if len(summary.sharings) > 1:
        out.print(_histogram("steps by tokens ÷ distinct tokens", summary.sharings))
    _print_refused(ledger)
    for kind, finding in summary.findings.items():
        _print_trouble(kind, finding["count"], finding["examples"], finding["remedy"])
    for note in summary.notes:
        out.print(f"note: {note}", markup=False)
    for sequence in shown:
        role = "" if sequence.role == "answer" else f", {sequence.role}"
        out.print(f"\n── {sequence.place}{role}", style="bold", markup=False)
        out.print(_marked(sequence.pieces))
    if shown:
        out.print("\ntrained tokens stand between ⟦ and ⟧", style="dim")


def _print_refused(ledger: "Ledger") -> None:
    """By kind, the most frequent first."""
    for kind, count in sorted(ledger.kinds.items(), key=lambda item: -item[1])[:KINDS_SHOWN]:
        mine = [refusal for refusal in ledger.refused if refusal.kind == kind]
        examples = [(refusal.place, refusal.what) for refusal in mine]
        _print_trouble("refused", count, examples, mine[0].hint)
    if len(ledger.kinds) > KINDS_SHOWN:
        out.print(f"… and {len(ledger.kinds) - KINDS_SHOWN} more kinds (--json lists them)")


def _print_trouble(kind: str, count: int, examples: list[tuple[str, str]], remedy: str) -> None:
    rows = "row" if count == 1 else "rows"
    out.print(Text.assemble((f"{kind}: {count:,} {rows}", "yellow"), f"  → {remedy}"))
    for place, text in examples[:PLACES_SHOWN]:
        out.print(
            Text(printable(f"  {place}{'  ' if text else ''}{text}"), overflow="fold", style="dim")
        )


def _table(summary: "Summary") -> Table:
    def of(part: int, whole: int) -> str:
        return f"{part:,} ({part / whole:.0%})" if whole else str(part)

    def spread(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    formats = ", ".join(f"{n:,} {name}" for name, n in summary.formats.items())
    sharing = ", ".join(
        f"{name} {ratio:.2f}{'*' if name == summary.batching else ''}"
        for name, ratio in summary.sharing.items()
    )
    longest = summary.longest
    rows: dict[str, Any] = {
        "rows": f"{summary.rows:,} read ({formats}), {summary.num_refused:,} refused",
        "records": f"{summary.train_records:,} to train on, {summary.eval_records:,} held out",
        "groups": f"{summary.groups:,}",
        "sequences": f"{summary.sequences:,}",
        "length in tokens": spread(summary.length),
        "longest": f"{longest['tokens']:,} of {summary.max_length:,} tokens: {longest['place']}",
        "trained tokens": f"{of(summary.targets, summary.tokens)} of {summary.tokens:,}",
        "sharing": f"{sharing}  (* data.batching)",
        "sharing of a step": spread(summary.step_sharing),
        "memories": f"sharing {spread(summary.memory_sharing)}",
        "steps": f"{summary.steps:,} of {summary.batch_size} records, "
        f"{summary.steps_per_epoch:,} an epoch",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    if not summary.memory_sharing:
        del rows["memories"]
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def _histogram(title: str, bins: Seq[tuple[float, int]]) -> Text:
    """How many there are up to the end of each bin, over the width of the page."""
    most = max(count for _, count in bins)
    width = max(out.width - 24, 10)
    text = Text(f"\n{title}\n", style="bold")
    for end, count in bins:
        bar = "█" * round(count / most * width) or ("▏" if count else "")
        text.append(f"{'≤ ' + str(end):>10} ", style="not bold")
        text.append(bar, style="not bold cyan")
        text.append(f" {count:,}\n", style="not bold")
    return text


def _marked(sequence: "list[Piece]") -> Text:
    text = Text()
    before = False
    for piece in sequence:
        if piece.trained != before:
            text.append("⟦" if piece.trained else "⟧", style="bold")
        style = "green" if piece.trained else "default"
        text.append(
            printable(piece.text, keep="\n\t"), style=f"{style} dim" if piece.special else style
        )
        before = piece.trained
    if before:
        text.append("⟧", style="bold")
    return text
