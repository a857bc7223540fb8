"""The first pass over the rows: all that can be told without a tokenizer.

It reads, understands and audits every row, and keeps of a record no more than a few numbers: rows
may be many millions. Neither torch nor transformers is imported.
"""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemtune.config import Data, Source
from stemtune.data import kept
from stemtune.data.audit import Findings, audit_row, merge, minority_scripts
from stemtune.data.duplicates import BANDS, Keys, band_keys, key_of, same
from stemtune.data.formats import to_records
from stemtune.data.parallel import map_chunks
from stemtune.data.records import Dialogue, Finding, Ledger, Place, Preference, Record, Refusal
from stemtune.data.sources import File, Raw, find_files, parse
from stemtune.data.split import Groups, Links, draw, find_groups
from stemtune.errors import ConfigError, DataError

CHUNK_ROWS = 2000
RENDERING = {
    "memories",
    "rag",
    "thinking",
    "template",
    "max_length",
}  # read by the second pass alone
CHUNK_BYTES = 16 * 2**20
Count = NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """Some rows of one file."""

    file: int
    rows: list[tuple[Place, Raw]]


@dataclass(frozen=True)
class Facts:
    """What is kept of some rows and of the records they gave: R rows, N records."""

    columns: dict[str, NDArray[Any]]
    """[R] file, line, offset, records (how many a row gave), text (a key of what is asked and
    answered); [R, BANDS] bands; [N, 2] kin; [N] persona; of each pair of answers pair_row, and keys
    of the chosen and the rejected one with their prompt. A key of 0 is none."""
    refused: list[Refusal]
    formats: Counter[str]
    findings: Findings
    scripts: Findings


@dataclass(frozen=True)
class Survey:
    """What the first pass found. Rows and records are counted over all files, in order.

    Attributes:
        files: of the training data, then of the evaluation data.
        row_file, row_line, row_offset: [R] where a row stands.
        row_records: [R] how many records a row gave; 0 where it was refused.
        group: [N] the name of each record's group.
        persona: [N] a key of each record's system prompt.
        is_eval: [N] held out.
        repeats: [N] how often a record is seen in an epoch; 0: left out by its source's weight.
    """

    files: list[File]
    row_file: Count
    row_line: Count
    row_offset: Count
    row_records: Count
    group: Groups
    persona: Keys
    is_eval: NDArray[np.bool_]
    repeats: Count
    ledger: Ledger
    key: str = ""
    """Of all that it depends on; empty where the data are small, and nothing is kept."""

    @cached_property
    def record_row(self) -> Count:
        """[N] the row of each record."""
        return np.repeat(np.arange(len(self.row_records)), self.row_records)

    def sources(self) -> list[dict[str, Any]]:
        """What the rows come from, for others to recognise (see `File.facts`), and how many."""
        counts = np.bincount(self.row_file, minlength=len(self.files)).tolist()
        return [{**f.facts(), "rows": n} for f, n in zip(self.files, counts, strict=True)]

    def place(self, row: int) -> Place:
        """Where a row stands."""
        path = self.files[int(self.row_file[row])].path
        return Place(path, int(self.row_line[row]), int(self.row_offset[row]))


def survey(data: Data, seed: int) -> Survey:
    """Read, understand, audit, group and split the rows.

    Raises:
        DataError: a row that can't be right (with `on_bad_row: error`), nothing to train on, or a
            leak between training and evaluation data.
        ConfigError: memories without `samples: turn`.
    """
    if data.memories is not None and data.samples == "dialogue":
        hint = "a memory belongs to one turn: set data.samples: turn"
        raise ConfigError("memories need a record for each turn", where="data.memories", hint=hint)
    train = find_files(_limited(data.sources, data), "data.path")
    held_out = find_files(_limited(data.eval_sources, data), "data.eval_path")
    files = [*train, *held_out]
    key = _key(files, data, seed)
    found = _load(kept.find(key), files, key)
    if found is not None:
        if found.ledger.refused and data.on_bad_row == "error":
            raise _as_error(found.ledger.refused[0])
        return found
    columns, ledger = _read_all(files, data)
    is_eval = np.repeat(columns["file"] >= len(train), columns["records"])
    _refuse_nothing(is_eval, bool(held_out), ledger)
    group, cluster = _groups(columns)
    if not held_out and data.eval_fraction > 0:
        is_eval = _held_out(columns, files, cluster, data.eval_fraction, seed)
        if not is_eval.any():
            ledger.notes.append("only one group of rows: nothing is held out")
    found = Survey(
        files=files,
        row_file=columns["file"],
        row_line=columns["line"],
        row_offset=columns["offset"],
        row_records=columns["records"],
        group=group,
        persona=columns["persona"],
        is_eval=is_eval,
        repeats=_repeats(columns, files, group, is_eval, seed),
        ledger=ledger,
        key=key,
    )
    if held_out:
        _check_leaks(found, cluster, data)
    _compare_rows(columns, files, ledger)
    if key:
        kept.keep(key, partial(_save, found))
    return found


def _key(files: list[File], data: Data, seed: int) -> str:
    """Empty where the files are small."""
    sizes = [file.path.stat().st_size for file in files if file.path.is_file()]
    if sum(sizes) < kept.WORTH_KEEPING and len(sizes) == len(files):
        return ""
    named = [(str(file.path), file.kind, file.digest()) for file in files]
    # What is done about a bad row does not change what the others come to; nor does how they are
    # rendered.
    unread = {"on_bad_row", "on_too_long", "batching", "license", *RENDERING}
    settings = data.model_dump(exclude=unread)
    return kept.make_key(named, settings, seed)


ARRAYS = (
    "row_file",
    "row_line",
    "row_offset",
    "row_records",
    "group",
    "persona",
    "is_eval",
    "repeats",
)


def _save(found: Survey, folder: Path) -> None:
    with (folder / "survey.npz").open("wb") as file:
        np.savez(file, **{name: getattr(found, name) for name in ARRAYS})
    (folder / "ledger.json").write_text(found.ledger.to_json(), encoding="utf-8")


def _load(folder: Path | None, files: list[File], key: str) -> Survey | None:
    if folder is None:
        return None
    try:
        # Read whole first: numpy leaves a damaged file open.
        content = io.BytesIO((folder / "survey.npz").read_bytes())
        with np.load(content, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in ARRAYS}
        ledger = Ledger.from_json((folder / "ledger.json").read_text(encoding="utf-8"))
    except kept.DAMAGED:
        kept.discard(folder)
        return None
    return Survey(files=files, **columns, ledger=ledger, key=key)


def _read_all(files: list[File], data: Data) -> tuple[dict[str, NDArray[Any]], Ledger]:
    """The columns of all rows, and what became of them.

    Raises:
        DataError: the first row that can't be right, with `on_bad_row: error`.
    """
    facts: list[Facts] = []
    ledger = Ledger()
    for part in map_chunks(partial(survey_chunk, files=files, data=data), chunks(files)):
        if part.refused and data.on_bad_row == "error":
            raise _as_error(part.refused[0])
        part.columns["pair_row"] += ledger.rows  # counted over all rows
        _enter(part, ledger)
        facts.append(part)
    names = facts[0].columns
    columns = {name: np.concatenate([f.columns[name] for f in facts]) for name in names}
    silent = int((columns["records"] == 0).sum()) - ledger.num_refused
    if silent:
        ledger.notes.append(f"{silent} scenes have no turn of the character that can be trained")
    return columns, ledger


def _as_error(refusal: Refusal) -> DataError:
    return DataError(refusal.what, where=refusal.place, hint=refusal.hint)


def _limited(sources: list[Source], data: Data) -> list[Source]:
    """With `data.limit` where they have none of their own."""
    return [s if s.limit else s.model_copy(update={"limit": data.limit}) for s in sources]


def chunks(files: list[File]) -> Iterator[Chunk]:
    """The rows of all files, some at a time."""
    left: int | None = None
    for number, file in enumerate(files):
        if number == 0 or file.source is not files[number - 1].source:
            left = file.source.limit  # of a source, not of each of its files
        if left == 0:
            continue
        rows: list[tuple[Place, Raw]] = []
        size = 0
        for place, raw in islice(file.rows(), left):
            left = None if left is None else left - 1
            rows.append((place, raw))
            size += len(raw) if isinstance(raw, bytes) else 1000
            if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield Chunk(number, rows)
                rows, size = [], 0
        if rows:
            yield Chunk(number, rows)


def records_of(
    place: Place, raw: Raw, file: File, data: Data, count_tokens: Any = None
) -> tuple[str, list[Record]]:
    """A row's format and records.

    Raises:
        DataError: it can't be right.
    """
    form = "scene" if file.kind == "script" else file.source.format
    return to_records(parse(place, raw), place, data, form, count_tokens)


def survey_chunk(chunk: Chunk, files: list[File], data: Data) -> Facts:
    """Understand and audit some rows."""
    made = _Rows(chunk.file)
    for place, raw in chunk.rows:
        try:
            name, records = records_of(place, raw, files[chunk.file], data)
        except DataError as error:
            made.refuse(place, error)
        else:
            made.keep(place, name, records)
    return made.facts()


class _Rows:
    """Gathers the facts of a chunk, row by row."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.rows: list[tuple[int, ...]] = []
        self.bands: list[list[int]] = []
        self.kin: list[tuple[int, int]] = []
        self.persona: list[int] = []
        self.pairs: list[tuple[int, int, int]] = []
        self.refused: list[Refusal] = []
        self.formats: Counter[str] = Counter()
        self.findings: Findings = {}
        self.scripts: Findings = {}

    def refuse(self, place: Place, error: DataError) -> None:
        """A row that can't be right."""
        self.refused.append(Refusal(error.where, error.what, error.hint))
        self.rows.append((place.line, place.offset, 0, 0))
        self.bands.append([0] * BANDS)

    def keep(self, place: Place, form: str, records: list[Record]) -> None:
        """A row that was understood."""
        self.formats[form] += 1
        audit_row(records, place, self.findings, self.scripts)
        for record in records:
            first, second = (*record.kin, "0")[:2]
            self.kin.append((int(first, 16), int(second, 16)))
            self.persona.append(key_of(record.persona))
        said, asked = _texts(records)
        for record in records:
            if isinstance(record, Preference):
                keys = [key_of(f"{asked}\0{answer.content}") for answer in record.answers]
                self.pairs += [(len(self.rows), keys[a], keys[b]) for a, b in record.pairs]
        text = key_of(f"{asked}\0{said}") if records else 0
        self.rows.append((place.line, place.offset, len(records), text))
        self.bands.append(band_keys(said))

    def facts(self) -> Facts:
        """As columns."""
        names = ("line", "offset", "records", "text")
        kinds = (np.int64, np.int64, np.int64, np.uint64)
        values = list(zip(*self.rows, strict=True))
        columns: dict[str, NDArray[Any]] = {
            name: np.array(column, kind)
            for name, kind, column in zip(names, kinds, values, strict=True)
        }
        columns["file"] = np.full(len(self.rows), self.file)
        columns["bands"] = np.array(self.bands, np.uint64).reshape(-1, BANDS)
        pairs = np.array(self.pairs, np.uint64).reshape(-1, 3)
        columns["pair_row"] = pairs[:, 0].astype(np.int64)
        columns["chosen"], columns["rejected"] = pairs[:, 1], pairs[:, 2]
        columns["kin"] = np.array(self.kin, np.uint64).reshape(-1, 2)
        columns["persona"] = np.array(self.persona, np.uint64)
        return Facts(columns, self.refused, self.formats, self.findings, self.scripts)


def _texts(records: list[Record]) -> tuple[str, str]:
    """What a row's records answer, and what they are asked."""
    said: list[str] = []
    asked: list[str] = []
    for record in records:
        if isinstance(record, Dialogue):
            said += [record.messages[turn].content for turn in record.trained]
            asked += [m.content for m in record.messages[: record.trained[0]] if m.role == "user"]
        elif isinstance(record, Preference):
            said += [answer.content for answer in record.answers]
            asked += [message.content for message in record.prompt]
    return "\n".join(said), "\n".join(asked)


# -- putting it together ----------------------------------------------------------------------


def _enter(facts: Facts, ledger: Ledger) -> None:
    ledger.rows += len(facts.columns["line"])
    for refusal in facts.refused:
        ledger.refuse(refusal)
    for name, count in facts.formats.items():
        ledger.formats[name] = ledger.formats.get(name, 0) + count
    merge(ledger.findings, facts.findings)
    merge(ledger.scripts, facts.scripts)


def _refuse_nothing(is_eval: NDArray[np.bool_], wants_eval: bool, ledger: Ledger) -> None:
    """Nothing to train on, or nothing to evaluate on."""
    missing = [("train", "data.path")] if is_eval.all() else []
    if wants_eval and not is_eval.any():
        missing.append(("evaluate", "data.eval_path"))
    for what, where in missing:
        refused = f": all {ledger.rows} rows were refused" if ledger.refused else ""
        notes = [*ledger.notes, "add some rows"]
        hint = ledger.refused[0].what if ledger.refused else notes[0]
        raise DataError(f"nothing to {what} on{refused}", where=where, hint=hint)


def _groups(rows: dict[str, NDArray[Any]]) -> tuple[Groups, Groups]:
    """By kin: what shares a step. And by kin or nearly the same answers: what shares a side of the
    split."""
    kin, count = rows["kin"], len(rows["kin"])
    record = np.tile(np.arange(count), 2)
    by_kin = [(record[a], record[b]) for a, b in [same(kin.T.reshape(-1))]]
    # A row's records have kin in common: its first one stands for all.
    first = np.cumsum(rows["records"]) - rows["records"]
    given = rows["records"] > 0
    by_text: Iterator[Links] = (
        (first[given][a], first[given][b])
        for a, b in (same(band) for band in rows["bands"][given].T)
    )
    names = kin[:, 0].astype(np.uint64)
    return find_groups(names, by_kin), find_groups(names, chain(by_kin, by_text))


def _check_leaks(found: Survey, cluster: Groups, data: Data) -> None:
    is_eval = found.is_eval
    leaks = np.intersect1d(cluster[~is_eval], cluster[is_eval])
    if not len(leaks):
        return
    first = np.flatnonzero(is_eval & np.isin(cluster, leaks))[0]
    place = found.place(int(found.record_row[first]))
    what = f"{len(leaks)} groups of the evaluation data are in the training data as well"
    if not data.allow_leaks:
        hint = (
            "they share a dialogue, a query, or nearly the same answer: take them out of one of "
            "the two, or set data.allow_leaks: true"
        )
        raise DataError(what, where=str(place), hint=hint)
    found.ledger.notes.append(f"{what} (data.allow_leaks)")


def _compare_rows(rows: dict[str, NDArray[Any]], files: list[File], ledger: Ledger) -> None:
    """Rows that say the same, nearly the same, or the contrary."""

    def report(kind: str, numbers: NDArray[np.int64]) -> None:
        finding = Finding()
        for number in np.unique(numbers).tolist():
            path = files[int(rows["file"][number])].path
            finding.add(f"{path}:{rows['line'][number]}", "")
        if finding.count:
            ledger.findings[kind] = finding

    _, again = same(rows["text"])
    report("exact duplicates", again)
    met = [same(band)[1] for band in rows["bands"].T]
    report("near duplicates", np.setdiff1d(np.concatenate(met), again))
    chosen, rejected, row = rows["chosen"], rows["rejected"], rows["pair_row"]
    report(
        "contradictions",
        np.array(
            [
                number
                for key in np.intersect1d(chosen, rejected)
                for number in row[rejected == key]
                if (row[chosen == key] != number).any()  # within a row it only stands between
            ],
            np.int64,
        ),
    )
    rare = minority_scripts(ledger.scripts)
    if rare.count:
        ledger.findings["another script"] = rare


def _held_out(
    rows: dict[str, NDArray[Any]], files: list[File], cluster: Groups, fraction: float, seed: int
) -> NDArray[np.bool_]:
    """A share of the groups all of whose sources may be held out."""
    may = np.repeat(np.array([file.source.eval for file in files])[rows["file"]], rows["records"])
    may &= ~np.isin(cluster, cluster[~may])
    is_eval = np.zeros(len(cluster), np.bool_)
    if may.any():
        is_eval[may] = draw(cluster[may], fraction, seed, "eval")
    return is_eval


def _repeats(
    rows: dict[str, NDArray[Any]],
    files: list[File],
    group: Groups,
    is_eval: NDArray[np.bool_],
    seed: int,
) -> Count:
    """By the weights of the sources; groups are taken or left whole."""
    weight = np.array([file.source.weight for file in files])[rows["file"]]
    of_record = np.repeat(weight, rows["records"])
    repeats = np.floor(of_record).astype(np.int64)
    for part in np.unique(of_record % 1):
        if part > 0:
            mine = (of_record % 1 == part) & ~is_eval
            if not mine.any():
                continue
            drawn = draw(group[mine], float(part), seed, "weight")
            repeats[mine] += drawn if drawn.any() else 1  # a single group can't be halved
    repeats[is_eval] = 1
    return repeats
