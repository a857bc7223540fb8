"""From files to sequences: the second pass, which needs the tokenizer.

The rows are read again, rendered over all cores, and written to a store. What is large is kept on
disk for the next run (see `data/kept.py`); what is small is made anew in memory.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeGuard, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from stemtune.config import Answers, Data
from stemtune.data import kept
from stemtune.data.memories import Memory, MemoryBook, exchanges, read_memories
from stemtune.data.parallel import map_chunks
from stemtune.data.records import Dialogue, Ledger, Place, Preference, Record, Refusal
from stemtune.data.render import Renderer, TooLongError, conversations, render
from stemtune.data.store import Batch, Store, to_batch, write
from stemtune.data.survey import RENDERING, Chunk, Survey, chunks, records_of
from stemtune.errors import DataError
from stemtune.tree.sequence import Sequence

Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Part:
    """One side of the split. Its records are counted from 0; a record whose source has a weight may
    stand in it several times.

    Attributes:
        store: the sequences of all records, of both sides.
        survey: where they come from.
        numbers: [n] for each record its number over all records.
    """

    store: Store
    survey: Survey
    numbers: Numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def groups(self) -> NDArray[np.uint64]:
        """[n] the name of each record's group."""
        return self.survey.group[self.numbers]

    @property
    def personas(self) -> NDArray[np.uint64]:
        """[n] a key of each record's system prompt."""
        return self.survey.persona[self.numbers]

    def place(self, record: int) -> Place:
        """Where a record's row stands."""
        return self.survey.place(int(self.survey.record_row[self.numbers[record]]))

    @cached_property
    def sequences(self) -> "SequenceList":
        """For each record its sequences, read when they are asked for."""
        return SequenceList(self)

    def longest(self) -> Sequence:
        """The longest sequence."""
        numbers = np.flatnonzero(np.isin(self.store.record, self.numbers))
        return self.store.sequence(int(numbers[np.argmax(self.store.length[numbers])]), 0)

    def longest_records(self, count: int) -> list[int]:
        """The records with most tokens, the longest first."""
        tokens = np.bincount(self.store.record, self.store.length)[self.numbers]
        return np.argsort(-tokens, kind="stable")[:count].tolist()

    @cached_property
    def sources(self) -> list[str]:
        """[n] what each record's source is called."""
        survey = self.survey
        names = [file.source.path for file in survey.files]
        return [names[int(n)] for n in survey.row_file[survey.record_row[self.numbers]]]

    def of(self, records: Iterable[int]) -> list[Sequence]:
        """The sequences of these records, record by record."""
        return [sequence for record in records for sequence in self.sequences[record]]

    @property
    def flat(self) -> list[Sequence]:
        """All sequences, record by record: all of them in memory."""
        return self.of(range(len(self)))


class SequenceList(Seq[list[Sequence]]):
    """The sequences of each record of a part. A sequence's `record` is an index into the part."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.first = np.searchsorted(part.store.record, part.numbers, "left")
        self.end = np.searchsorted(part.store.record, part.numbers, "right")

    def __len__(self) -> int:
        return len(self.part)

    @overload
    def __getitem__(self, index: int) -> list[Sequence]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Sequence]]: ...
    def __getitem__(self, index: int | slice) -> list[Sequence] | list[list[Sequence]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        numbers = range(int(self.first[index]), int(self.end[index]))
        return [self.part.store.sequence(number, index) for number in numbers]


@dataclass(frozen=True)
class Prepared:
    """All that a run needs of the data."""

    train: Part
    eval: Part
    ledger: Ledger
    fingerprint: str
    """SHA-256 over every id, mask, role and group, in order, and the split."""
    memories: tuple[Memory, ...] = ()
    """What prompts were reminded of: `chat` needs them as well."""


def prepare(
    survey: Survey,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    *,
    answers: Answers = "best",
    gather: bool = False,
) -> Prepared:
    """Render every record.

    Args:
        answers: what the objective needs of a record: see `Config.answers`. With `best`, of a
            preference the best answer is trained, as if it were a dialogue.
        gather: leave every record out that would stop a run, and say so in the ledger.

    Raises:
        DataError: a record that is too long (with `on_too_long: error`) or has not the answers that
            are needed, or nothing left.
        DiskError: no room for what is kept.
    """
    memories = _memories(survey, data)
    renderer = _ChunkRenderer(survey, tokenizer, data, memories, answers, gather)
    if survey.key:
        trims = data.on_too_long == "trim_context"
        rendering = data.model_dump(include=RENDERING)
        known = (_tokenizer_key(tokenizer), rendering, repr(memories), answers, trims)
        key = kept.make_key(survey.key, *known)
        loaded = _load(kept.find(key)) or _load(kept.keep(key, partial(_save, renderer)))
        assert loaded is not None, "an entry that was just written can be read"
        store, digest, rendered = loaded
    else:
        buffer = pa.BufferOutputStream()
        digest, rendered = _render_all(renderer, buffer)
        store = Store(buffer.getvalue())
    if not gather:
        _refuse_fatal(rendered.refused, data)  # gathered by a run that left them out
    ledger = _joined(survey.ledger, rendered)
    there = np.unique(store.record)
    train, held_out = there[~survey.is_eval[there]], there[survey.is_eval[there]]
    if not len(train):
        last = ledger.refused[-1]
        raise DataError("every record was refused", where=last.place, hint=last.what)
    return Prepared(
        Part(store, survey, np.repeat(train, survey.repeats[train])),
        Part(store, survey, held_out),
        ledger,
        _fingerprint(digest, survey, train, held_out),
        tuple(memories),
    )


def _is_fatal(refusal: Refusal, data: Data) -> bool:
    return data.on_too_long != "drop" if refusal.too_long else data.on_bad_row == "error"


def _refuse_fatal(refused: list[Refusal], data: Data) -> None:
    """Stop at the first record that may not be left out."""
    for refusal in refused:
        if _is_fatal(refusal, data):
            kind = TooLongError if refusal.too_long else DataError
            what = refusal.what.removeprefix("too long: ")
            raise kind(what, where=refusal.place, hint=refusal.hint)


def _save(renderer: "_ChunkRenderer", folder: Path) -> None:
    digest, ledger = _render_all(renderer, str(folder / "sequences.arrow"))
    text = json.dumps([digest, ledger.to_json()])
    (folder / "rendered.json").write_text(text, encoding="utf-8")


def _load(folder: Path | None) -> tuple[Store, str, Ledger] | None:
    if folder is None:
        return None
    try:
        digest, said = json.loads((folder / "rendered.json").read_text(encoding="utf-8"))
        return Store(folder / "sequences.arrow"), digest, Ledger.from_json(said)
    except kept.DAMAGED:
        kept.discard(folder)
        return None


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """All of it that decides ids: vocabulary, merges, normalisation, special tokens, template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary: dict[str, int] = {} if backend else tokenizer.get_vocab()  # pyright: ignore
    text: str = backend.to_str() if backend else repr(sorted(vocabulary.items()))
    return [
        hashlib.sha256(text.encode()).hexdigest(),
        str(tokenizer.special_tokens_map),
        tokenizer.chat_template,
        type(tokenizer).__name__,
        transformers_version,
    ]


def _joined(first: Ledger, second: Ledger) -> Ledger:
    return replace(
        first,
        refused=[*first.refused, *second.refused],
        num_refused=first.num_refused + second.num_refused,
        kinds=dict(Counter(first.kinds) + Counter(second.kinds)),
        notes=[*first.notes, *second.notes],
    )


def _fingerprint(digest: str, survey: Survey, train: Numbers, held_out: Numbers) -> str:
    whole = hashlib.sha256(digest.encode())
    for part in (train, held_out):
        whole.update(np.ascontiguousarray(survey.group[part]).tobytes())
        whole.update(np.ascontiguousarray(survey.repeats[part]).tobytes())
        whole.update(b"|")
    return whole.hexdigest()


def _memories(survey: Survey, data: Data) -> list[Memory]:
    """What prompts are reminded of: a file's passages, or what is said in the training data."""
    if data.memories is None:
        return []
    if data.memories.path is not None:
        return read_memories(Path(data.memories.path))
    found: dict[Memory, None] = {}
    record = row = 0
    for chunk in chunks(survey.files):
        for place, raw in chunk.rows:
            row += 1
            if not survey.row_records[row - 1]:
                continue
            for item in records_of(place, raw, survey.files[chunk.file], data)[1]:
                if not survey.is_eval[record] and survey.repeats[record]:
                    group = int(survey.group[record])
                    found |= dict.fromkeys(Memory(text, group) for text in exchanges(item))
                record += 1
    return list(found)


# -- rendering --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """A chunk, and where its rows and records are counted from."""

    chunk: Chunk
    first_row: int
    first_record: int


@dataclass(frozen=True)
class _Done:
    """What a chunk came to."""

    batch: Batch
    rows: int
    refused: list[Refusal]
    joined: int
    compared: int
    """Preferences of which the best answer alone is trained."""


def _render_all(renderer: "_ChunkRenderer", sink: object) -> tuple[str, Ledger]:
    """Write all sequences, in order.

    Returns:
        A digest of them, and what became of those that were left out.
    """
    survey = renderer.survey
    ledger = Ledger()
    digests = [hashlib.sha256() for _ in range(7)]
    joined = compared = 0
    total = len(survey.row_line)
    console = Console(stderr=True)
    quiet = not console.is_terminal or total < 10_000

    def batches() -> Iterator[Batch]:
        nonlocal joined, compared
        with Progress(console=console, transient=True, disable=quiet) as progress:
            task = progress.add_task("rendering rows", total=total)
            for done in map_chunks(renderer, _work(survey)):
                if not renderer.gather:
                    _refuse_fatal(done.refused, renderer.data)
                for refusal in done.refused:
                    ledger.refuse(refusal)
                joined += done.joined
                compared += done.compared
                _update(digests, done.batch)
                progress.advance(task, done.rows)
                yield done.batch

    write(batches(), sink)
    if joined:
        ledger.notes.append(
            f"{joined} answers were joined to their prompt's ids: the template's text "
            "tokenises differently across that boundary"
        )
    if compared:
        ledger.notes.append(f"of {compared} preferences the best answer is trained")
    whole = "".join(digest.hexdigest() for digest in digests)
    return hashlib.sha256(whole.encode()).hexdigest(), ledger


def _update(digests: list[Any], batch: Batch) -> None:
    """Column by column: how the rows were cut into batches makes no difference."""
    ids, targets = batch.column("ids"), batch.column("targets")
    columns = (
        np.asarray(batch.column("record")),
        np.asarray(batch.column("role").indices),
        np.asarray(batch.column("preferred_to").values),
        np.diff(np.asarray(batch.column("preferred_to").offsets)),
        np.asarray(ids.values),
        np.asarray(targets.values),
        np.diff(np.asarray(ids.offsets)),
    )
    for digest, column in zip(digests, columns, strict=True):
        digest.update(np.ascontiguousarray(column).tobytes())


def _work(survey: Survey) -> Iterator[_Work]:
    row = record = 0
    for chunk in chunks(survey.files):
        yield _Work(chunk, row, record)
        after = row + len(chunk.rows)
        record += int(survey.row_records[row:after].sum())
        row = after
    if row != len(survey.row_line):
        hint = "run again when nothing else writes them"
        raise DataError("the files changed while they were read", where="data.path", hint=hint)


class _ChunkRenderer:
    """Renders chunks, in whatever process."""

    def __init__(
        self,
        survey: Survey,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        memories: list[Memory],
        answers: Answers,
        gather: bool,
    ) -> None:
        self.survey, self.data, self.gather = survey, data, gather
        self.answers: Answers = answers
        self.renderer = Renderer(tokenizer, data.template)
        self.book = None
        if data.memories is not None:
            self.book = MemoryBook(memories, data.memories, self.renderer.count)

    def __call__(self, work: _Work) -> _Done:
        """One chunk."""
        self.renderer.joined = 0
        refused: list[Refusal] = []
        records, compared = self._records(work)
        self.renderer.remember([c for _, record in records for c in conversations(record)])
        sequences: list[Sequence] = []
        for number, record in records:
            try:
                _require(record, self.answers)
                sequences += render(record, number, self.renderer, self.data)
            except DataError as error:
                long = isinstance(error, TooLongError)
                what = f"too long: {error.what}" if long else error.what
                refusal = Refusal(error.where, what, error.hint)
                if refusal in refused[-1:]:
                    continue  # another record of the same row
                refused.append(refusal)
                if not self.gather and _is_fatal(refused[-1], self.data):
                    break  # said in order, by the process that started this one
        self.renderer.remember([])  # what was remembered goes with these records
        rows = len(work.chunk.rows)
        return _Done(to_batch(sequences), rows, refused, self.renderer.joined, compared)

    def _records(self, work: _Work) -> tuple[list[tuple[int, Record]], int]:
        """The records of a chunk, numbered, as they are to be rendered."""
        survey, data = self.survey, self.data
        file = survey.files[work.chunk.file]
        number, compared = work.first_record, 0
        found: list[tuple[int, Record]] = []
        for row, (place, raw) in enumerate(work.chunk.rows, work.first_row):
            expected = int(survey.row_records[row])
            if not expected:
                continue
            records = records_of(place, raw, file, data, self.renderer.count)[1]
            if len(records) != expected:
                hint = "run again when nothing else writes it"
                what = "the file changed while it was read"
                raise DataError(what, where=str(place), hint=hint)
            for record in records:
                made = record
                # A bad one is refused in its place.
                if self.answers == "best" and _is_good(record):
                    made = _best_answer(record)
                    compared += bool(record.pairs)
                if self.book is not None:
                    made = self.book.remind(made, int(survey.group[number]))
                found.append((number, made))
                number += 1
        return found, compared


def _require(record: Record, answers: Answers) -> None:
    """Refuse a record that has not the answers that the objective needs.

    Raises:
        DataError: with what would do.
    """
    where = str(record.place)
    compared = isinstance(record, Preference) and bool(record.pairs)
    labelled = isinstance(record, Preference) and record.label is not None
    if answers == "best":
        if labelled:  # a good one has been made a dialogue
            hint = "take it out, or train both kinds with objective.type: kto"
            raise DataError("this answer is labelled as bad", where=where, hint=hint)
    elif answers == "labelled" and not (compared or labelled):
        hint = "kto needs `prompt`, `completion` and `label: true` or `false`, or pairs"
        raise DataError("nothing says whether this answer is good", where=where, hint=hint)
    elif answers in ("pairs", "ranking") and not compared:
        hint = "rows need `chosen` and `rejected`, or candidates; or set objective.type: sft"
        raise DataError("there is only one answer, and none to compare", where=where, hint=hint)
    elif answers == "ranking" and isinstance(record, Preference) and not record.is_ranking:
        hint = "set data.pairs.mode: all, and no two scores within data.pairs.margin; or use dpo"
        raise DataError("the answers are not ranked from best to worst", where=where, hint=hint)


def _is_good(record: Record) -> TypeGuard[Preference]:
    return isinstance(record, Preference) and record.label is not False


def _best_answer(preference: Preference) -> Dialogue:
    return Dialogue(
        kin=preference.kin,
        place=preference.place,
        messages=(*preference.prompt, preference.answers[preference.best]),
        trained=(len(preference.prompt),),
        tools=preference.tools,
        passages=preference.passages,
    )
