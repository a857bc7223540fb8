"""What is kept for the next run, and work over several processes: the same results, whoever made
them, and no trace of what went wrong."""

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as some
from transformers import PreTrainedTokenizerBase

import stemtune as st
from stemtune.config import Answers, Data
from stemtune.data import kept, parallel
from stemtune.data.parallel import map_chunks
from stemtune.data.prepare import Prepared, prepare
from stemtune.data.records import Finding, Ledger, Refusal
from stemtune.data.render import TooLongError
from stemtune.data.store import Store, to_batch, write
from stemtune.data.survey import ARRAYS, Survey, survey
from stemtune.errors import DataError, DiskError, OutOfMemoryError, StemtuneError
from tests.data.rows import data_of, write_rows
from tests.models import tiny_tokenizer

SENTENCE = "I know only this one thing, that I know nothing at all, my dear friend, number"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries are; everything is worth keeping."""
    monkeypatch.setattr(kept, "WORTH_KEEPING", 0)
    monkeypatch.setenv("STEMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def several_processes(monkeypatch: pytest.MonkeyPatch, rows: int = 7) -> None:
    """Small chunks over three workers, however many cores there are."""
    monkeypatch.setattr("stemtune.data.survey.CHUNK_ROWS", rows)
    monkeypatch.setattr(parallel, "cores", lambda: 3)


def rows_of_all_kinds(count: int = 60) -> list[dict[str, Any]]:
    """Dialogues, preferences, duplicates, rows to refuse and rows that look wrong."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        query = f"question {number // 2}"
        rows.append({"context": query, "target": f"{SENTENCE} {number % 9}."})
        if number % 5 == 0:
            turns = [("user", query), ("assistant", "Yes?"), ("user", "No."), ("assistant", "So.")]
            rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
        if number % 7 == 0:
            rows.append({"prompt": query, "chosen": f"good {number}", "rejected": "bad"})
        if number % 11 == 0:
            rows.append({"context": query, "target": ""})
        if number % 13 == 0:
            rows.append({"context": query, "target": f"ends in the middle of {'a word ' * 40}"})
    return rows


SETTINGS: dict[str, Any] = {
    "eval_fraction": 0.3,
    "on_bad_row": "skip",
    "on_too_long": "drop",
    "max_length": 150,
}


def write_all(folder: Path) -> Data:
    path = write_rows(folder / "rows.jsonl", *rows_of_all_kinds())
    return data_of(path, **SETTINGS)


def make(data: Data, seed: int = 0, answers: Answers = "best") -> Prepared:
    return prepare(survey(data, seed), tiny_tokenizer(), data, answers=answers)


def shown(sequence: st.Sequence) -> tuple[Any, ...]:
    ids, targets = sequence.input_ids.tolist(), sequence.is_target.tolist()
    return ids, targets, sequence.record, sequence.role


def contents(prepared: Prepared) -> dict[str, Any]:
    """All that there is to compare."""
    found = prepared.train.survey
    return {
        "train": [shown(sequence) for sequence in prepared.train.flat],
        "eval": [shown(sequence) for sequence in prepared.eval.flat],
        "numbers": [prepared.train.numbers.tolist(), prepared.eval.numbers.tolist()],
        "places": [str(prepared.train.place(record)) for record in range(len(prepared.train))],
        "ledger": asdict(prepared.ledger),
        "fingerprint": prepared.fingerprint,
        "survey": {name: getattr(found, name).tolist() for name in ARRAYS},
        "kinds": {name: str(getattr(found, name).dtype) for name in ARRAYS},
    }


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def refuse_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be read or rendered fails."""

    def fail(*_arguments: object, **_more: object) -> None:
        raise AssertionError("work that was kept is done again")

    monkeypatch.setattr("stemtune.data.survey.survey_chunk", fail)
    monkeypatch.setattr("stemtune.data.prepare._ChunkRenderer.__call__", fail)


_barrier: Any = None


def _share(barrier: Any) -> None:
    global _barrier  # noqa: PLW0603 (it can only be inherited)
    _barrier = barrier


def elsewhere(function: Callable[[Any], Any], *values: object) -> list[Any]:
    """Each value in a process of its own, all at once."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    count = len(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        barrier = context.Barrier(count)
        with ProcessPoolExecutor(count, context, initializer=_share, initargs=(barrier,)) as pool:
            futures = [pool.submit(function, value) for value in values]
            return [future.result() for future in futures]


# -- the second time --------------------------------------------------------------------------


def test_the_second_run_takes_what_is_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_all(tmp_path)
    first = contents(make(data))
    assert len(entries(cache)) == 2
    ledger = first["ledger"]
    assert ledger["num_refused"] > 6
    assert ledger["findings"] and ledger["scripts"] and ledger["formats"]
    assert any(refused["what"].startswith("too long") for refused in ledger["refused"])
    refuse_work(monkeypatch)
    assert contents(make(data)) == first
    assert len(entries(cache)) == 2
    with pytest.raises(AssertionError, match="done again"):
        make(data, seed=1)


def test_what_is_kept_equals_what_is_made_in_memory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_all(tmp_path)
    made = contents(make(data))
    loaded = contents(make(data))
    monkeypatch.setattr(kept, "WORTH_KEEPING", 1 << 40)
    before = entries(cache)
    in_memory = make(data)
    assert in_memory.train.survey.key == ""
    assert entries(cache) == before
    assert contents(in_memory) == made == loaded


def test_only_what_is_large_is_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files together count."""
    data = write_all(tmp_path)
    size = (tmp_path / "rows.jsonl").stat().st_size
    monkeypatch.setattr(kept, "WORTH_KEEPING", size + 1)
    assert survey(data, 0).key == ""
    assert entries(cache) == []
    other = write_rows(tmp_path / "other.jsonl", {"context": "q", "target": "a"})
    more = Data.model_validate({"path": [str(tmp_path / "rows.jsonl"), str(other)], **SETTINGS})
    key = survey(more, 0).key
    assert entries(cache) == [key]


def test_what_is_kept_outlives_its_folder(tmp_path: Path, cache: Path) -> None:
    """Whoever still reads it keeps its mapping."""
    made = make(write_all(tmp_path))
    expected = contents(made)
    for path in sorted(cache.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    made.train.store._batch.cache_clear()
    assert contents(made) == expected


def test_rows_in_a_file_whose_name_is_no_text(tmp_path: Path, cache: Path) -> None:
    """A name in another encoding, as old disks have them. It stands in the ledger's places."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/rows\xe9.jsonl"))
    write_rows(path, *rows_of_all_kinds())
    data = data_of(path, **SETTINGS)
    first = contents(make(data))
    assert str(path) in first["ledger"]["refused"][0]["place"]
    assert contents(make(data)) == first
    assert len(entries(cache)) == 2


# -- keys -------------------------------------------------------------------------------------


def test_other_contents_of_the_same_size_and_time_are_read(tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"context": "q", "target": "one"})
    data = data_of(path)
    before = path.stat()
    first = make(data)
    write_rows(path, {"context": "q", "target": "two"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = make(data)
    assert second.train.survey.key != first.train.survey.key
    assert shown(second.train.flat[0]) != shown(first.train.flat[0])
    assert second.fingerprint != first.fingerprint


def test_the_same_contents_have_the_same_key(tmp_path: Path, cache: Path) -> None:
    data = write_all(tmp_path)
    key = survey(data, 0).key
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    assert survey(data, 0).key == survey(Data.model_validate(data.model_dump()), 0).key == key
    assert len(entries(cache)) == 1


def test_any_other_setting_has_another_key(tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *rows_of_all_kinds())
    held_out = write_rows(tmp_path / "eval.jsonl", {"context": "new", "target": "a"})
    settings: list[dict[str, Any]] = [
        {},
        {"eval_fraction": 0.2},
        {"eval_path": str(held_out)},
        {"limit": 20},
        {"format": "context_target"},
        {"fields": {"context": "target"}},
        {"system": "You are Socrates."},
        {"system": "You are Meno."},
        {"samples": "turn"},
        {"samples": "turn", "history_turns": 2},
        {"samples": "turn", "history_tokens": 9},
        {"pairs": {"margin": 0.5}},
        {"path": [str(path), str(held_out)]},
        {"path": [str(held_out), str(path)]},
        {"path": {"path": str(path), "weight": 2.0}},
        {"path": {"path": str(path), "weight": 0.5}},
        {"path": {"path": str(path), "limit": 5}},
        {"path": {"path": str(path), "format": "context_target"}},
    ]
    keys = []
    for more in settings:
        whole = {"path": str(path), **SETTINGS, **more}
        keys.append(survey(Data.model_validate(whole), 0).key)
    keys.append(survey(Data.model_validate({"path": str(path), **SETTINGS}), 1).key)
    path.rename(tmp_path / "renamed.jsonl")  # places name the file
    keys.append(survey(data_of(tmp_path / "renamed.jsonl", **SETTINGS), 0).key)
    assert len(set(keys)) == len(keys) == len(settings) + 2
    assert entries(cache) == sorted(keys)


def test_what_renders_rows_has_an_entry_of_its_own(tmp_path: Path, cache: Path) -> None:
    """The first pass is the same for all of these, the second is not."""
    path = write_rows(tmp_path / "rows.jsonl", *rows_of_all_kinds())
    lore = tmp_path / "lore.txt"
    lore.write_text("question 3 is hard")
    turns: dict[str, Any] = {"samples": "turn"}
    settings: list[dict[str, Any]] = [
        {},
        {"thinking": "mask"},
        {"max_length": 151},
        {"rag": {"max_tokens": 7}},
        {"memories": {"path": str(lore)}},
        {"memories": {"path": str(lore), "position": "before_history"}},
        {"memories": {"path": str(lore), "template": "<{memories}>"}},
    ]
    keys: set[str] = set()
    for number, more in enumerate(settings, 1):
        data = Data.model_validate({"path": str(path), **SETTINGS, **turns, **more})
        keys.add(make(data).train.survey.key)
        assert len(entries(cache)) == 1 + number
    assert len(keys) == 1


def test_other_code_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = kept.make_key("a", 1)
    assert key == kept.make_key("a", 1) != kept.make_key("a", 2)
    monkeypatch.setattr(kept, "_code", lambda: "other")
    assert key != kept.make_key("a", 1)


def add_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["question"])


def add_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "question"]})


def change_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = str(tokenizer.chat_template).replace("\n", " ")


def change_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = "<|im_start|>"


TOKENIZERS = [add_token, add_special_token, change_template, change_end]


@pytest.mark.parametrize("change", TOKENIZERS)
def test_another_tokenizer_renders_anew(
    tmp_path: Path, cache: Path, change: Callable[[PreTrainedTokenizerBase], None]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"context": "question q", "target": "an answer"})
    data = data_of(path)
    found = survey(data, 0)
    prepare(found, tiny_tokenizer(), data)
    before = entries(cache)
    prepare(found, tiny_tokenizer(), data)
    assert entries(cache) == before
    other = tiny_tokenizer()
    change(other)
    prepare(found, other, data)
    assert len(entries(cache)) == len(before) + 1


def test_preferences_and_memories_render_anew(tmp_path: Path, cache: Path) -> None:
    told = tmp_path / "memories.txt"
    told.write_text("One question can be asked.\n")
    memories = {"path": str(told), "count": 1}
    path = write_rows(tmp_path / "rows.jsonl", *rows_of_all_kinds(8))
    data = data_of(path, **{**SETTINGS, "samples": "turn", "memories": memories})
    seen = [make(data, answers=answers) for answers in ("pairs", "best")]
    told.write_text("No question can be asked.\n")
    seen.append(make(data))
    assert len({one.fingerprint for one in seen}) == 3
    assert len(entries(cache)) == 4  # of one survey
    assert contents(make(data)) == contents(seen[-1])


# -- writing ----------------------------------------------------------------------------------


def fill_with(size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / "file").write_bytes(b"x" * size) and None


def test_an_entry_is_there_whole_or_not_at_all(cache: Path) -> None:
    def fill(folder: Path) -> None:
        assert kept.find("key") is None
        assert folder.parent == cache
        fill_with(3)(folder)
        assert kept.find("key") is None

    assert kept.find("key") is None
    assert kept.keep("key", fill) == cache / "key" == kept.find("key")
    assert entries(cache) == ["key"]
    assert (cache / "key" / "file").read_bytes() == b"xxx"


def test_who_is_slower_takes_what_is_there(cache: Path) -> None:
    def fill(folder: Path) -> None:
        kept.keep("key", fill_with(3))  # another process, in the meantime
        fill_with(5)(folder)

    assert kept.keep("key", fill) == cache / "key"
    assert (cache / "key" / "file").read_bytes() == b"xxx"
    assert entries(cache) == ["key"]


@pytest.mark.parametrize("error", [DataError("wrong", where="w", hint="h"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing(cache: Path, error: BaseException) -> None:
    def fill(folder: Path) -> None:
        fill_with(3)(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        kept.keep("key", fill)
    assert caught.value is error
    assert entries(cache) == []


def test_a_record_that_is_too_long_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"context": "q", "target": "word " * 200})
    data = data_of(path, max_length=50)
    for _ in range(2):
        with pytest.raises(TooLongError):
            make(data)
    assert len(entries(cache)) == 1  # of the survey


def test_a_full_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = write_all(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        with pytest.raises(DiskError, match="No space left on device") as caught:
            make(data)
        assert caught.value.exit_code == 7
        assert caught.value.where == str(cache)
        assert "STEMTUNE_CACHE" in caught.value.hint
    assert entries(cache) == []
    found = survey(data, 0)
    with monkeypatch.context() as patched:
        patched.setattr(pa.ipc.RecordBatchFileWriter, "write_batch", full, raising=False)
        with pytest.raises(DiskError, match="No space left on device"):
            prepare(found, tiny_tokenizer(), data)
    assert entries(cache) == [found.key]
    expected = contents(make(data))
    assert len(entries(cache)) == 2
    assert contents(make(data)) == expected


def limited(rows: Path) -> tuple[int, str]:
    """In a process that may not write more than 100 kB into a file."""
    import resource

    kept.WORTH_KEEPING = 0
    data = data_of(rows)
    found = survey(data, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        prepare(found, tiny_tokenizer(), data)
    except DiskError as error:
        return error.exit_code, error.what
    return 0, ""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
def test_a_file_that_can_not_grow(tmp_path: Path, cache: Path) -> None:
    """What a real writer says, not one of ours."""
    rows = [{"context": f"q{i}", "target": "word " * 100} for i in range(400)]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    ((code, what),) = elsewhere(limited, path)
    assert code == 7
    assert what.startswith("can't keep prepared data: ")
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("below", ["", "data"])
def test_a_cache_that_is_no_folder(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    place = tmp_path / "other" / below
    place.parent.mkdir(exist_ok=True)
    place.write_text("not a folder")
    monkeypatch.setenv("STEMTUNE_CACHE", str(tmp_path / "other"))
    with pytest.raises(DiskError) as caught:
        make(write_all(tmp_path))
    assert caught.value.exit_code == 7
    assert caught.value.where == str(tmp_path / "other" / "data")
    assert "STEMTUNE_CACHE" in caught.value.hint
    assert place.read_text() == "not a folder"


# -- room -------------------------------------------------------------------------------------


def test_what_was_not_used_for_longest_goes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 350)
    for age, key in enumerate(["a", "b", "c"]):
        kept.keep(key, fill_with(100))
        os.utime(cache / key, (1000 + age, 1000 + age))
    assert entries(cache) == ["a", "b", "c"]
    kept.find("a")  # used just now
    kept.keep("d", fill_with(100))
    assert entries(cache) == ["a", "c", "d"]
    kept.keep("e", fill_with(1000))  # the newest always stays
    assert entries(cache) == ["e"]


def test_room_is_not_made_where_another_process_writes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST", 150)

    def fill(folder: Path) -> None:
        fill_with(100)(folder)
        kept.keep("other", fill_with(100))
        assert folder.is_dir()

    kept.keep("key", fill)
    assert (cache / "key" / "file").stat().st_size == 100


# -- two processes ----------------------------------------------------------------------------


def keep_together(rows: Path) -> tuple[str, int, str]:
    """Both processes have written all of an entry before either puts it in its place."""
    kept.WORTH_KEEPING = 0
    keep = kept.keep

    def keep_after_both(key: str, fill: Callable[[Path], None]) -> Path:
        def filled(folder: Path) -> None:
            fill(folder)
            _barrier.wait(120)

        return keep(key, filled)

    kept.keep = keep_after_both
    data = data_of(rows, **SETTINGS)
    _barrier.wait(120)
    made = prepare(survey(data, 0), tiny_tokenizer(), data)
    return made.fingerprint, len(made.train.flat), str(os.getpid())


def test_two_processes_at_once(tmp_path: Path, cache: Path) -> None:
    data = write_all(tmp_path)
    path = tmp_path / "rows.jsonl"
    one, two = elsewhere(keep_together, path, path)
    assert one[2] != two[2]
    assert one[:2] == two[:2]
    assert len(entries(cache)) == 2
    assert not any(name.startswith(".") for name in entries(cache))
    made = prepare(survey(data, 0), tiny_tokenizer(), data)
    assert (made.fingerprint, len(made.train.flat)) == one[:2]
    assert len(entries(cache)) == 2


# -- several workers --------------------------------------------------------------------------


def test_several_processes_make_what_one_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_all(tmp_path)
    expected = contents(make(data))
    several_processes(monkeypatch)
    assert contents(make(data)) == expected


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_how_rows_are_cut_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    data = write_all(tmp_path)
    expected = contents(make(data))
    monkeypatch.setattr("stemtune.data.survey.CHUNK_ROWS", rows)
    monkeypatch.setattr(parallel, "cores", lambda: 1)
    assert contents(make(data)) == expected
    monkeypatch.setattr("stemtune.data.survey.CHUNK_ROWS", 2000)
    monkeypatch.setattr("stemtune.data.survey.CHUNK_BYTES", rows * 100)
    assert contents(make(data)) == expected


def test_several_processes_keep_what_one_keeps(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_all(tmp_path)
    with monkeypatch.context() as patched:
        several_processes(patched)
        expected = contents(make(data))
    refuse_work(monkeypatch)
    assert contents(make(data)) == expected


def skewed(number: int) -> tuple[int, int]:
    """Early chunks take longest."""
    total = sum(range(200_000 // (number + 1)))
    return number + 0 * total, os.getpid()


def test_chunks_are_worked_on_elsewhere_and_come_in_order() -> None:
    found = list(map_chunks(skewed, range(40), workers=3))
    assert [number for number, _ in found] == list(range(40))
    pids = {pid for _, pid in found}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 3
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("chunks", "workers"), [(0, 3), (1, 3), (20, 1)])
def test_a_little_work_stays_here(chunks: int, workers: int) -> None:
    found = list(map_chunks(skewed, range(chunks), workers=workers))
    assert found == [(number, os.getpid()) for number in range(chunks)]


def test_few_chunks_are_in_memory() -> None:
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = map_chunks(skewed, numbers(), workers=2)
    for number in range(20):
        assert next(results)[0] == number
        assert taken <= number + 1 + 2 * 2 + 1
    results.close()  # type: ignore[attr-defined]
    assert taken < 30
    assert multiprocessing.active_children() == []


def fail_at_seven(number: int) -> int:
    if number == 7:
        raise DataError("what is wrong", where="file:7 (byte 3)", hint="what to do")
    return number


def test_an_error_of_a_worker_comes_whole_and_in_its_turn() -> None:
    found = []
    with pytest.raises(DataError) as caught:
        for number in map_chunks(fail_at_seven, range(40), workers=3):
            found.append(number)
    assert found == list(range(7))
    error = caught.value
    assert type(error) is DataError
    assert (error.what, error.where, error.hint) == (
        "what is wrong",
        "file:7 (byte 3)",
        "what to do",
    )
    assert multiprocessing.active_children() == []


def all_errors(kind: type[StemtuneError]) -> list[type[StemtuneError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in all_errors(child))]


def raise_it(kind: type[StemtuneError]) -> None:
    raise kind("what", where="where", hint="hint")


@pytest.mark.parametrize("kind", all_errors(StemtuneError))
def test_every_error_crosses_a_process(kind: type[StemtuneError]) -> None:
    with pytest.raises(kind) as caught:
        list(map_chunks(raise_it, [kind] * 2, workers=2))
    assert type(caught.value) is kind
    assert str(caught.value) == "what\n  at where\nhint: hint"


def test_an_error_of_the_reader_comes_as_it_is() -> None:
    def numbers() -> Iterator[int]:
        yield from range(10)
        raise DataError("cut off", where="file", hint="copy it again")

    with pytest.raises(DataError, match="cut off"):
        list(map_chunks(skewed, numbers(), workers=2))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("bad", "settings"),
    [
        pytest.param({"context": "q", "target": ""}, {}, id="a bad row"),
        pytest.param({"context": "q", "target": "word " * 200}, {"max_length": 99}, id="too long"),
    ],
)
def test_the_first_bad_row_is_told_the_same_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    good = [{"context": f"q{i}", "target": f"a{i}"} for i in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", *good[:40], bad, *good[40:], {**bad, "context": "z"})
    data = data_of(path, **settings)
    told: list[StemtuneError] = []
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            make(data)
        told.append(caught.value)
        several_processes(monkeypatch)
    assert type(told[0]) is type(told[1])
    assert [str(error) for error in told] == [str(told[0])] * 2
    assert told[1].what and told[1].hint
    assert told[1].where.startswith(f"{path}:41 ")
    assert multiprocessing.active_children() == []


# -- the store --------------------------------------------------------------------------------

ROLES = some.sampled_from(["answer", "chosen", "rejected"])
IDS = some.integers(0, 2**31 - 1)
FIRST = some.lists(some.tuples(IDS, some.just(False)), min_size=1, max_size=1)
TOKENS = some.builds(list.__add__, FIRST, some.lists(some.tuples(IDS, some.booleans()), max_size=5))


@given(some.lists(some.lists(some.tuples(TOKENS, ROLES), max_size=3), max_size=5))
def test_a_store_gives_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[Any, str]]]
) -> None:
    """From a file as from memory, however many are in a batch, and if there is none."""
    made = [
        [
            st.Sequence([i for i, _ in tokens], [t for _, t in tokens], record=7 + n, role=role)
            for n, (tokens, role) in enumerate(batch)
        ]
        for batch in batches
    ]
    path = tmp_path_factory.mktemp("store") / "sequences.arrow"
    sink = pa.BufferOutputStream()
    write((to_batch(batch) for batch in made), sink)
    write((to_batch(batch) for batch in made), str(path))
    flat = [sequence for batch in made for sequence in batch]
    for store in (Store(path), Store(sink.getvalue())):
        assert len(store) == len(flat)
        assert store.record.tolist() == [sequence.record for sequence in flat]
        assert store.length.tolist() == [len(sequence) for sequence in flat]
        assert store.targets.tolist() == [int(sequence.is_target.sum()) for sequence in flat]
        read = [store.sequence(n, sequence.record) for n, sequence in enumerate(flat)]
        assert [shown(sequence) for sequence in read] == [shown(sequence) for sequence in flat]


def test_a_part_is_a_sequence_of_its_records(tmp_path: Path, cache: Path) -> None:
    part = make(write_all(tmp_path), answers="pairs").train
    every = [[shown(sequence) for sequence in part.sequences[i]] for i in range(len(part))]
    assert any(len(sequences) == 2 for sequences in every)  # of preferences
    assert all({s[2] for s in sequences} == {i} for i, sequences in enumerate(every))
    assert [[shown(s) for s in sequences] for sequences in part.sequences[2:5]] == every[2:5]
    assert [shown(s)[:2] for s in part.sequences[-1]] == [s[:2] for s in every[-1]]
    for index in (len(part), -len(part) - 1):
        with pytest.raises(IndexError):
            part.sequences[index]
    longest = max(len(s[0]) for sequences in every for s in sequences)
    assert len(part.longest()) == longest


# -- the ledger -------------------------------------------------------------------------------

TEXT = some.text(max_size=9)
FINDINGS = some.dictionaries(
    TEXT,
    some.builds(Finding, some.integers(0, 9), some.lists(some.tuples(TEXT, TEXT), max_size=3)),
    max_size=3,
)


@given(
    some.builds(
        Ledger,
        rows=some.integers(0, 1 << 40),
        refused=some.lists(some.builds(Refusal, TEXT, TEXT, TEXT), max_size=3),
        num_refused=some.integers(0, 1 << 40),
        formats=some.dictionaries(TEXT, some.integers(0, 9), max_size=3),
        notes=some.lists(TEXT, max_size=3),
        findings=FINDINGS,
        scripts=FINDINGS,
    )
)
def test_a_ledger_is_what_it_was(ledger: Ledger) -> None:
    again = Ledger.from_json(ledger.to_json())
    assert again == ledger
    assert again.to_json() == ledger.to_json()
    assert json.loads(ledger.to_json())["rows"] == ledger.rows
    for one in (again, ledger):
        one.refuse(Refusal("place", "what", "hint"))
        for finding in one.findings.values():
            finding.merge(Finding(1, [("place", "text")]))
    assert again == ledger


def test_a_ledger_counts_all_and_keeps_some(tmp_path: Path, cache: Path) -> None:
    rows = [{"context": "q", "target": ""}] * 1500 + [{"context": "q", "target": "a"}]
    data = data_of(write_rows(tmp_path / "rows.jsonl", *rows), on_bad_row="skip")
    found: list[Survey] = [survey(data, 0), survey(data, 0)]
    assert found[0].ledger == found[1].ledger
    assert found[1].ledger.num_refused == 1500
    assert len(found[1].ledger.refused) == Ledger.MOST
    assert str(found[1].place(1500)).startswith(f"{tmp_path / 'rows.jsonl'}:1501 ")


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
@pytest.mark.parametrize("name", ["survey.npz", "ledger.json", "sequences.arrow", "rendered.json"])
def test_a_damaged_entry_is_made_anew(
    tmp_path: Path, cache: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_all(tmp_path)
    first = make(data)
    (file,) = cache.rglob(name)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage == "cut" else b"")
    again = make(data)
    assert again.fingerprint == first.fingerprint
    assert "damaged" in caplog.text
    caplog.clear()
    assert make(data).fingerprint == first.fingerprint
    assert "damaged" not in caplog.text


def kill_itself(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_process_that_is_killed_is_an_error_for_people() -> None:
    with pytest.raises(OutOfMemoryError, match="killed") as caught:
        list(map_chunks(kill_itself, range(8), workers=2))
    assert caught.value.hint and caught.value.exit_code == 8


def test_what_a_killed_process_left_goes_after_a_week(cache: Path) -> None:
    old, new = cache / ".abandoned", cache / ".being-written"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x")
    week_ago = time.time() - 8 * 86_400
    os.utime(old, (week_ago, week_ago))
    kept.keep("k" * 64, lambda folder: (folder / "whole").touch())
    assert entries(cache) == [".being-written", "k" * 64]
