"""Every kind of bad row, alone and as one in ten thousand; and what `stemtune check` says."""

import gzip
import json
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard
from rich.cells import cell_len

from stemtune.data.prepare import prepare
from stemtune.data.survey import Survey, survey
from stemtune.errors import DataError
from tests.cli.command import Outcome, stemtune_here
from tests.data.rows import data_of, prepared_of, records_in, write_rows
from tests.data.templates import tokenizer_of
from tests.models import tiny_tokenizer


@dataclass(frozen=True)
class Bad:
    """A row that can't be right, how the complaint begins, and whether it quotes the row."""

    row: bytes
    what: str
    quotes: bool = False


def as_row(**fields: Any) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def with_field(value: bytes) -> bytes:
    """A row that would be good but for one more field."""
    return b'{"context": "q", "target": "a", "x": ' + value + b"}"


def asked(answer: object) -> dict[str, Any]:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


BAD = {
    "malformed": Bad(b"{'context': 'q', 'target': 'a'}", "not valid JSON: Expecting", quotes=True),
    "cut": Bad(b'{"context": "q", "targ', "not valid JSON: ", quotes=True),
    "a BOM within the file": Bad(
        b"\xef\xbb\xbf" + as_row(context="q", target="a"),
        "not valid JSON: Unexpected UTF-8 BOM",
        quotes=True,
    ),
    "invalid UTF-8": Bad(with_field(b'"\xff"'), "not UTF-8: byte 0xff at 38 of the row"),
    "half of a surrogate pair": Bad(
        with_field(b'"\\ud83d"'), "half of a surrogate pair stands alone: ", quotes=True
    ),
    "UTF-16": Bad('{"a": "q"}'.encode("utf-16"), "not UTF-8: byte 0xff at 0 of the row"),
    "NUL": Bad(with_field(b'"\0"'), "not valid JSON: Invalid control character", quotes=True),
    "a key twice": Bad(
        b'{"context": "q", "target": "a", "target": "b"}',
        "not valid JSON: the key 'target' stands twice",
        quotes=True,
    ),
    "NaN": Bad(with_field(b"NaN"), "not valid JSON: NaN is not JSON", quotes=True),
    "a huge integer": Bad(with_field(b"9" * 5000), "not valid JSON: Exceeds", quotes=True),
    "2,000 deep": Bad(with_field(b"[" * 2000 + b"]" * 2000), "nested too deeply"),
    "20 MB": Bad(with_field(b'"' + b"a" * 20 * 2**20 + b'"'), "a row of more than 16 MB"),
    "a list": Bad(b'["q", "a"]', "expected a JSON object, found a list: ", quotes=True),
    "a number for a text": Bad(
        as_row(context=7, target="a"), "`context` should be text, found a number"
    ),
    "a list for a text": Bad(
        as_row(context="q", target=["a"]), "`target` should be text, found a list"
    ),
    "a missing field": Bad(
        as_row(messages=[{"role": "user"}]), "the field `messages[0].content` is missing"
    ),
    "unknown keys": Bad(
        as_row(frage="q", antwort="a"), "unknown kind of row: its keys are antwort, frage"
    ),
    "null": Bad(as_row(context="q", target=None), "`target` should be text, found null"),
    "an empty target": Bad(as_row(context="q", target=""), "`target` is blank"),
    "a blank answer": Bad(as_row(**asked(" \n\u3000")), "`messages[1].content` is blank"),
    "chosen as rejected": Bad(
        as_row(prompt="q", chosen="the same", rejected=" the same"),
        "chosen and rejected are the same: the same",
    ),
    "tied candidates": Bad(
        as_row(prompt="q", candidates=[{"text": "a", "score": 1}, {"text": "b", "score": 1}]),
        "the candidates are tied: their scores are 1, 1",
    ),
    "nothing to train": Bad(
        as_row(messages=[{"role": "user", "content": "q"}]), "nothing in this row can be trained"
    ),
    "only an opening": Bad(
        as_row(dialogue=[{"role": "assistant", "text": "a"}, {"role": "B", "text": "b"}]),
        "nothing in this row can be trained",
    ),
}
bad_rows = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def good(number: int) -> bytes:
    return as_row(context=f"学而时习之 {number}", target=f"不亦说乎 {number}")


def read(path: Path, **settings: Any) -> Survey:
    return survey(data_of(path, **settings), 0)


def refusal(path: Path, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    error = caught.value
    assert error.exit_code == 2
    assert error.what and error.where and error.hint
    assert all(line.isprintable() for line in str(error).splitlines())
    return error


# -- one file -----------------------------------------------------------------------------------


@bad_rows
def test_alone(tmp_path: Path, bad: Bad) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + bad.row + b"\n")
    error = refusal(path)
    assert error.what.startswith(bad.what)
    assert error.where == f"{path}:2 (byte 1)"
    if bad.quotes:
        excerpt = error.what.rpartition(": ")[2]
        plain = bad.row.decode(errors="replace")
        assert 0 < len(excerpt) <= 80
        assert excerpt.strip("…") in plain
    else:
        assert len(error.what) <= 120
    skipped = refusal(path, on_bad_row="skip")
    assert skipped.what == "nothing to train on: all 1 rows were refused"
    assert skipped.hint == error.what


LINES = {name: 17 + 400 * number for number, name in enumerate(BAD)}


def test_each_as_one_in_ten_thousand(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [good(number) for number in range(10_000)]
    for name, line in LINES.items():
        rows[line - 1] = BAD[name].row
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row) + 1)
    path.write_bytes(b"\n".join(rows) + b"\n")
    ledger = read(path, on_bad_row="skip").ledger
    assert ledger.rows == 10_000
    assert ledger.num_refused == len(BAD)
    assert ledger.formats == {"context_target": 10_000 - len(BAD)}
    assert ledger.notes == []
    assert [refused.place for refused in ledger.refused] == [
        f"{path}:{line} (byte {offsets[line - 1]})" for line in LINES.values()
    ]
    for refused, bad in zip(ledger.refused, BAD.values(), strict=True):
        assert refused.what.startswith(bad.what)
        assert refused.hint
    first = next(iter(LINES.values()))
    assert refusal(path).where == f"{path}:{first} (byte {offsets[first - 1]})"


@pytest.mark.parametrize("line", [1, 4999, 10_000])
@pytest.mark.parametrize("name", ["cut", "invalid UTF-8", "null"])
def test_one_in_ten_thousand_stops_a_run(tmp_path: Path, name: str, line: int) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [good(number) for number in range(10_000)]
    rows[line - 1] = BAD[name].row
    path.write_bytes(b"\n".join(rows))  # and no newline behind the last one
    error = refusal(path)
    assert error.what.startswith(BAD[name].what)
    assert error.where == f"{path}:{line} (byte {sum(len(row) + 1 for row in rows[: line - 1])})"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\n"], ids=["empty", "BOM", "blank"])
def test_an_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for on_bad_row in ("error", "skip"):
        error = refusal(path, on_bad_row=on_bad_row)
        assert str(path) in error.where or error.what.startswith("nothing to train on")


def test_a_byte_order_mark_at_the_start_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good(1) + b"\n")
    assert read(path).ledger.num_refused == 0


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    for name, text in {
        "rows.jsonl": good(1).decode() + "\n" + good(2).decode() + "\n",
        "rows.json": f"[{good(1).decode()}]",
        "rows.csv": "context,target\nq,a\n",
        "rows.txt": "甲：你好\n乙：好\n",
    }.items():
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        refusal(path)


# -- nesting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["[", '{"a":'])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_the_second_pass_refuses_no_more_than_the_first(
    tmp_path: Path, name: str, opened: str
) -> None:
    """How deeply a row may be nested does not depend on who reads it."""
    closed = "]" if opened == "[" else "}"
    deep = [
        json.dumps({"context": f"q{depth}", "target": "a"})[:-1]
        + f', "x": {opened * depth}1{closed * depth}}}'
        for depth in range(880, 1000)
    ]
    path = tmp_path / name
    if name.endswith("l"):
        path.write_text("\n".join([good(0).decode(), *deep]))
    else:
        path.write_text("[" + ",\n".join([good(0).decode(), *deep[:20]]) + "]")
    data = data_of(path, on_bad_row="skip")
    found = survey(data, 0)
    prepared = prepare(found, tiny_tokenizer(), data)
    assert len(prepared.train) == len(found.group)


def test_deep_rows_of_a_list_pass_between_processes(tmp_path: Path) -> None:
    rows = [{"context": f"q{i}", "target": "a", "x": 1} for i in range(4001)]
    texts = [json.dumps(row) for row in rows]
    texts[2500] = texts[2500].replace('"x": 1', '"x": ' + "[" * 500 + "]" * 500)
    path = tmp_path / "rows.json"
    path.write_text("[" + ",\n".join(texts) + "]")
    ledger = read(path, on_bad_row="skip").ledger
    assert ledger.rows == 4001
    assert ledger.num_refused <= 1


@pytest.mark.parametrize("depth", [400, 900])
@pytest.mark.parametrize("where", ["arguments", "tools"])
def test_deep_tool_calls(tmp_path: Path, where: str, depth: int) -> None:
    """What is nested ends in the template, and is refused there or rendered."""
    deep: dict[str, Any] = {}
    for _ in range(depth):
        deep = {"a": deep}
    row = asked("done")
    if where == "tools":
        row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    else:
        row["messages"][1]["tool_calls"] = [{"name": "f", "arguments": deep}]
    path = write_rows(tmp_path / "rows.jsonl", row, {"context": "q", "target": "a"})
    prepared = prepared_of(path, tokenizer_of("qwen3"), on_bad_row="skip", max_length=10**6)
    assert len(prepared.train) + prepared.ledger.num_refused == 2


@pytest.mark.parametrize("where", ["arguments", "tools", "function_call"])
@pytest.mark.parametrize("inner", ['"\\ud800"', "NaN", "-Infinity"])
def test_json_within_text_is_held_to_the_same(tmp_path: Path, where: str, inner: str) -> None:
    """Arguments and tools may be JSON text: what no row may hold, they may not hold either."""
    row = asked("done")
    if where == "tools":
        row["tools"] = f'[{{"type": "function", "function": {{"name": {inner}}}}}]'
    elif where == "arguments":
        call = {"name": "f", "arguments": f'{{"a": {inner}}}'}
        row["messages"][1]["tool_calls"] = [call]
    else:
        call_text = f'{{"name": "f", "arguments": {{"a": {inner}}}}}'
        turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": call_text}]
        row = {"conversations": turns}
    path = write_rows(tmp_path / "rows.jsonl", row, {"context": "q", "target": "a"})
    prepared = prepared_of(path, tokenizer_of("qwen3"), on_bad_row="skip")
    (refused,) = prepared.ledger.refused
    assert refused.place == f"{path}:1 (byte 0)"
    assert refused.what.startswith(
        {
            "arguments": "`messages[1].tool_calls[0].arguments` is not valid JSON",
            "tools": "`tools` is not valid JSON",
            "function_call": "`conversations[1].value` is not valid JSON",
        }[where]
    )


# -- other kinds of files -----------------------------------------------------------------------


@pytest.mark.parametrize("behind", ["x", "[1]", ', {"context": "p", "target": "b"}]', "]"])
def test_what_stands_behind_a_list(tmp_path: Path, behind: str) -> None:
    """Two lists in one file: the second is not left out silently."""
    path = tmp_path / "rows.json"
    path.write_text(f'[{{"context": "q", "target": "a"}}]\n{behind}')
    assert "rows.json:2" in refusal(path).where


@pytest.mark.parametrize("spaces", range(1, 4))
def test_a_pretty_object_in_utf8_is_not_called_otherwise(tmp_path: Path, spaces: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text("{\n" + " " * spaces + f'"data": "{"学" * 3000}"\n}}', encoding="utf-8")
    assert refusal(path).what.startswith("expected a list of rows: ")


def test_a_csv_header_that_names_a_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("context,target,target\nq,a,b\n")
    assert "target" in refusal(path).what


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [b"context,target", b"q,a", b"q", b"q,a,b", b'"q" x,a', b"q,", b"q,\xff", b"q,a"]
    path.write_bytes(b"\r\n".join(lines) + b"\r\n")
    ledger = read(path, on_bad_row="skip").ledger
    assert [(refused.place, refused.what.partition(": ")[0]) for refused in ledger.refused] == [
        (f"{path}:3", "1 fields, but the header has 2"),
        (f"{path}:4", "3 fields, but the header has 2"),
        (f"{path}:5", "not valid CSV"),
        (f"{path}:6", "`target` is blank"),
        (f"{path}:7", "text that is not UTF-8, or half of a surrogate pair"),
    ]
    assert ledger.rows == 7
    assert refusal(path).where == f"{path}:3"


def rows_that_do_not_compress() -> bytes:
    draw = random.Random(0)
    return b"".join(
        as_row(context=f"{draw.random()}", target=f"{draw.random()}") + b"\n" for _ in range(9000)
    )


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_that_was_cut(tmp_path: Path, kind: str) -> None:
    """Not the rows that happen to be left, with one bad row at their end."""
    path = tmp_path / f"rows.jsonl.{kind}"
    content = rows_that_do_not_compress()
    squeezed = (
        gzip.compress(content) if kind == "gz" else zstandard.ZstdCompressor().compress(content)
    )
    path.write_bytes(squeezed)
    assert read(path).ledger.rows == 9000
    for part in (0.1, 0.5, 0.99):
        path.write_bytes(squeezed[: int(len(squeezed) * part)])
        error = refusal(path, on_bad_row="skip")
        assert error.what.startswith("can't be read: ")
        assert error.where == str(path)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_with_flipped_bits(tmp_path: Path, kind: str) -> None:
    draw = random.Random(1)
    content = b"".join(good(number) + b"\n" for number in range(50))
    squeeze = gzip.compress if kind == "gz" else zstandard.ZstdCompressor().compress
    squeezed = squeeze(content)
    path = tmp_path / f"rows.jsonl.{kind}"
    refused = 0
    for _ in range(60):
        torn = bytearray(squeezed)
        torn[draw.randrange(len(torn))] ^= 1 << draw.randrange(8)
        path.write_bytes(torn)
        try:
            read(path, on_bad_row="skip")
        except DataError as error:
            assert error.where and error.hint
            refused += 1
    assert refused > 20


HANGS = {
    "a blank line of a play": ("rows.txt", "A: a\n" + " " * 6000 + "x\nA: a\nB: b\n"),
    "a gap in a line of a play": ("rows.txt", "A: a\nAnd" + " " * 6000 + "x\nA: a\nB: b\n"),
    "a rule of a play": ("rows.txt", "A: a\n" + "- " * 6000 + "x\nA: a\nB: b\n"),
    "stars in a play": ("rows.txt", "A: a\n" + "*" * 6000 + "x\n" + "* " * 6000 + "\nA: a\nB: b\n"),
    "brackets in a play": (
        "rows.txt",
        "A: a\n" + "A(" * 6000 + "\n" + "(" * 6000 + "\nA: a\nB: b\n",
    ),
    "spaces in a row": (
        "rows.jsonl",
        json.dumps({"context": "q" + " " * 200_000 + "x", "target": "a" + "\n " * 100_000 + "b"}),
    ),
    "names in a row": ("rows.jsonl", json.dumps({"context": "q", "target": "a b" * 100_000})),
}


@pytest.mark.parametrize(("name", "text"), HANGS.values(), ids=HANGS)
def test_nothing_hangs(tmp_path: Path, name: str, text: str) -> None:
    """A file of a few kilobytes is read at once. The limit is for a hang, not for slowness."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    code = (
        "import sys; from stemtune.config import Data; from stemtune.data.survey import survey; "
        "survey(Data(path=sys.argv[1], eval_fraction=0.0, character='B' if "
        "sys.argv[1].endswith('txt') else None), 0)"
    )
    command = [sys.executable, "-c", code, str(path)]
    try:
        done = subprocess.run(command, timeout=20, check=False, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        pytest.fail("still reading after 20 seconds")
    assert done.returncode == 0, done.stderr


# -- rows whose parts do not fit together -------------------------------------------------------


def conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def test_a_system_message_behind_a_prompt(tmp_path: Path) -> None:
    completion = conversation(("system", "s"), ("assistant", "a"))
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "q", "completion": completion})
    assert refusal(path).what == "`completion[0]`: a system message in the middle"


def test_a_prompt_that_stands_in_both_answers_is_taken_once(tmp_path: Path) -> None:
    stem = (("system", "s"), ("user", "q"))
    row = {
        "prompt": "q",
        "chosen": conversation(*stem, ("assistant", "a")),
        "rejected": conversation(*stem, ("assistant", "b")),
    }
    path = write_rows(tmp_path / "rows.jsonl", row)
    (record,) = records_in(read(path), data_of(path))
    assert [(m.role, m.content) for m in record.opening] == [("system", "s"), ("user", "q")]


def test_answers_that_differ_in_their_calls_are_not_the_same(tmp_path: Path) -> None:
    chosen, rejected = (
        [{"role": "assistant", "tool_calls": [{"name": name, "arguments": {}}]}] for name in "fg"
    )
    row = {"prompt": "q", "chosen": chosen, "rejected": rejected}
    path = write_rows(tmp_path / "rows.jsonl", row)
    assert read(path).ledger.formats == {"preference": 1}


def test_the_best_of_three_candidates_is_trained(tmp_path: Path) -> None:
    """With `best_worst` the one in the middle is compared with none: it is not the best."""
    scores = {"middle": 0.5, "best": 1, "worst": 0}
    candidates = [{"text": text, "score": score} for text, score in scores.items()]
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "q", "candidates": candidates})
    tokenizer = tiny_tokenizer()
    for mode in ("best_worst", "best_all", "all"):
        (sequence,) = prepared_of(path, tokenizer, pairs={"mode": mode}).train.flat
        assert "<|im_start|>assistant\nbest<|im_end|>" in tokenizer.decode(sequence.input_ids)


@pytest.mark.parametrize(
    "score",
    [pytest.param(10**400, id="a huge integer"), True, "1", None, pytest.param([1], id="a list")],
)
def test_a_score_that_is_none(tmp_path: Path, score: object) -> None:
    candidates = [{"text": "a", "score": 0.5}, {"text": "b", "score": score}]
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "q", "candidates": candidates})
    what = refusal(path).what
    assert "should be a number, found a number" not in what


# -- rows that only their tokens show to be bad -------------------------------------------------


def test_a_record_that_is_too_long(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    answer = "virtue " * 50
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"context": "q", "target": "a"},
        {"context": "what", "target": answer},
        {"context": "q", "target": "b"},
    )
    prompt = tokenizer("<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    tail = tokenizer(f"{answer}<|im_end|>")["input_ids"]
    length = len(prompt) + len(tail)
    assert length > 60
    said = f"{length} tokens ({len(tail)} of them the answer), but data.max_length is 60"
    place = f"{path}:2 (byte {len(path.read_bytes().splitlines(keepends=True)[0])})"
    for settings in ({}, {"on_bad_row": "skip"}, {"on_too_long": "trim_context"}):
        with pytest.raises(DataError) as caught:
            prepared_of(path, tokenizer, max_length=60, **settings)
        assert (caught.value.what, caught.value.where) == (said, place)
        assert "data.max_length" in caught.value.hint
    prepared = prepared_of(path, tokenizer, max_length=60, on_too_long="drop")
    (refused,) = prepared.ledger.refused
    assert (refused.place, refused.what) == (place, f"too long: {said}")
    assert len(prepared.train) == 2
    assert len(prepared_of(path, tokenizer, max_length=length).train) == 3


def test_chosen_and_rejected_that_a_template_makes_the_same(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'][:6]"
    )
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"prompt": "q", "chosen": "virtue can", "rejected": "virtue can't"},
        {"prompt": "q", "chosen": "virtue", "rejected": "vice"},
    )
    with pytest.raises(DataError, match="the same, token by token") as caught:
        prepared_of(path, tokenizer, answers="pairs")
    assert caught.value.where == f"{path}:1 (byte 0)"
    assert caught.value.hint
    prepared = prepared_of(path, tokenizer, answers="pairs", on_bad_row="skip")
    assert len(prepared.train) == 1
    assert prepared.ledger.num_refused == 1


def test_a_template_that_refuses(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    turns = conversation(("system", "s"), ("user", "q"), ("assistant", "a"))
    path = write_rows(tmp_path / "rows.jsonl", {"context": "q", "target": "a"}, {"messages": turns})
    with pytest.raises(DataError, match="the chat template refuses this: no system role"):
        prepared_of(path, tokenizer)
    prepared = prepared_of(path, tokenizer, on_bad_row="skip")
    assert [refused.what for refused in prepared.ledger.refused] == [
        "the chat template refuses this: no system role"
    ]


# -- stemtune check -----------------------------------------------------------------------------


def check(tmp_path: Path, base: Path, *arguments: object, **settings: object) -> Outcome:
    """On `rows.jsonl` of a folder, on a page of 80 columns."""
    lines = [f"  {name}: {json.dumps(value)}\n" for name, value in settings.items()]
    (tmp_path / "run.yaml").write_text(
        f"model:\n  base: {base}\ndata:\n  path: rows.jsonl\n  eval_fraction: 0\n{''.join(lines)}"
    )
    return stemtune_here("check", "run.yaml", *arguments, cwd=tmp_path)


def stopped(outcome: Outcome, what: str, count: int, rows: int) -> None:
    """The first of so many refused rows of so many is said, in three lines."""
    more = f" (and {count - 1:,} more of {rows:,} rows)" if count > 1 else ""
    first, where, hint = outcome.err.splitlines()
    assert outcome.code == 2
    assert first.startswith(f"error: {what}") and first.endswith(more)
    assert where.startswith("  at ") and "rows.jsonl:" in where
    assert hint.startswith("hint: ")


def one_line(text: str) -> str:
    """Without the line breaks that a narrow page asks for."""
    return re.sub(r"\s+", "", text)


@pytest.fixture
def all_kinds(tmp_path: Path) -> Path:
    rows = [good(number) for number in range(30)]
    for bad in BAD.values():
        rows += [bad.row, bad.row, good(len(rows))]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


def test_check_lists_every_kind_at_once(tmp_path: Path, all_kinds: Path, tiny_base: Path) -> None:
    outcome = check(tmp_path, tiny_base)
    stopped(outcome, BAD["malformed"].what, 2 * len(BAD), 30 + 3 * len(BAD))
    shown = one_line(outcome.out)
    hidden = [name for name, bad in BAD.items() if one_line(bad.what) not in shown]
    assert not hidden
    skipped = check(tmp_path, tiny_base, on_bad_row="skip")
    assert (skipped.code, skipped.err) == (0, "")
    assert f"{2 * len(BAD):,} refused" in skipped.out
    shown = one_line(skipped.out)
    hidden = [name for name, bad in BAD.items() if one_line(bad.what) not in shown]
    assert not hidden


def test_check_fits_a_page(tmp_path: Path, all_kinds: Path, tiny_base: Path) -> None:
    for settings in ({}, {"on_bad_row": "skip"}):
        lines = check(tmp_path, tiny_base, **settings).out.splitlines()
        assert len(lines) > 20
        assert [line for line in lines if cell_len(line) > 80] == []


@pytest.mark.parametrize("settings", [{}, {"on_bad_row": "skip"}])
def test_check_gives_counts_and_remedies(
    tmp_path: Path, tiny_base: Path, settings: dict[str, object]
) -> None:
    rows = [good(1), *[BAD["an empty target"].row] * 7, BAD["2,000 deep"].row, good(2)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    outcome = check(tmp_path, tiny_base, **settings)
    text = " ".join(outcome.out.split())
    assert "7 rows → fill it in, or leave such rows out with data.on_bad_row: skip" in text
    assert "1 row → flatten it" in text
    if not settings:
        stopped(outcome, "`target` is blank", 8, 10)


@pytest.mark.parametrize("settings", [{}, {"on_bad_row": "skip"}])
def test_check_as_json_is_complete(
    tmp_path: Path, all_kinds: Path, tiny_base: Path, settings: dict[str, object]
) -> None:
    outcome = check(tmp_path, tiny_base, "--json", "--show", 1, **settings)
    assert outcome.code == (0 if settings else 2)
    found = json.loads(outcome.out)
    ledger = read(all_kinds, on_bad_row="skip").ledger
    assert found["rows"] == ledger.rows == 30 + 3 * len(BAD)
    assert found["num_refused"] == 2 * len(BAD)
    assert [(r["place"], r["what"], r["hint"]) for r in found["refused"]] == [
        (r.place, r.what, r.hint) for r in ledger.refused
    ]
    assert found["formats"] == {"context_target": 30 + len(BAD)}
    if settings:
        assert found["train_records"] == 30 + len(BAD)
        assert len(found["samples"]) == 1


@pytest.mark.parametrize("settings", [{}, {"on_bad_row": "skip"}])
def test_check_counts_what_it_does_not_keep(
    tmp_path: Path, tiny_base: Path, settings: dict[str, object]
) -> None:
    """Of refused rows the first thousand are kept, but the kinds are counted over all."""
    rows = [good(1), *[BAD["an empty target"].row] * 1200, *[BAD["2,000 deep"].row] * 5]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    outcome = check(tmp_path, tiny_base, **settings)
    text = " ".join(outcome.out.split())
    assert "1,200 rows → fill it in" in text
    assert "5 rows → flatten it" in text


def test_check_stops_for_a_bad_row_among_dropped_ones(tmp_path: Path, tiny_base: Path) -> None:
    long = as_row(context="q", target="virtue " * 50)
    rows = [good(1), *[long] * 1001]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(rows))
    settings: dict[str, object] = {"max_length": 60, "on_too_long": "drop"}
    dropped = check(tmp_path, tiny_base, **settings)
    assert (dropped.code, dropped.err) == (0, "")
    assert "1,001 refused" in dropped.out
    path.write_bytes(b"\n".join([*rows, BAD["null"].row]))
    stopped(check(tmp_path, tiny_base, **settings), BAD["null"].what, 1, 1003)


@pytest.mark.parametrize("on_too_long", ["error", "drop", "trim_context"])
def test_check_stops_for_what_a_template_refuses(
    tmp_path: Path, tiny_base: Path, on_too_long: str
) -> None:
    """As a run would, which gets to the row when it renders it; plain text is one turn."""
    turns = conversation(("system", "s"), ("user", "q"), ("assistant", "a"))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good(1), as_row(messages=turns)]))
    settings: dict[str, object] = {"template": "plain", "on_too_long": on_too_long}
    with pytest.raises(DataError, match="can't be rendered plainly"):
        prepared_of(path, tiny_tokenizer(), **settings)
    stopped(check(tmp_path, tiny_base, **settings), "can't be rendered plainly", 1, 2)
    assert check(tmp_path, tiny_base, **settings, on_bad_row="skip").code == 0


def test_check_names_what_is_too_long(tmp_path: Path, tiny_base: Path) -> None:
    long = as_row(context="q", target="virtue " * 50)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good(1), long, long, good(2)]))
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n" + "virtue " * 50 + "<|im_end|>"
    length = len(tiny_tokenizer()(text)["input_ids"])
    outcome = check(tmp_path, tiny_base, max_length=60)
    stopped(outcome, f"too long: {length} tokens", 2, 4)
    assert one_line(f"too long: {length} tokens") in one_line(outcome.out)
    dropped = check(tmp_path, tiny_base, max_length=60, on_too_long="drop")
    assert (dropped.code, dropped.err) == (0, "")
    assert one_line(f"too long: {length} tokens") in one_line(dropped.out)
    assert "4 read (4 context_target), 2 refused" in dropped.out


def test_check_stops_where_a_run_would(tmp_path: Path, tiny_base: Path) -> None:
    """`on_bad_row: skip` is not about length: what is too long would stop the run."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good(1), as_row(context="q", target="virtue " * 50)]))
    with pytest.raises(DataError):
        prepared_of(path, tiny_tokenizer(), max_length=60, on_bad_row="skip")
    assert check(tmp_path, tiny_base, max_length=60, on_bad_row="skip").code == 2


def test_check_gathers_what_trimming_can_not_help(tmp_path: Path, tiny_base: Path) -> None:
    long = as_row(context="q", target="virtue " * 50)
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good(1), long, good(2), long]))
    outcome = check(tmp_path, tiny_base, max_length=60, on_too_long="trim_context")
    assert outcome.code == 2
    assert "and 1 more of 4 rows" in outcome.err


def test_check_says_why_when_no_row_is_good(tmp_path: Path, tiny_base: Path) -> None:
    rows = [BAD["null"].row, BAD["an empty target"].row]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    outcome = check(tmp_path, tiny_base)
    assert outcome.code == 2
    assert "nothing to train on: all 2 rows were refused" in outcome.err
    assert BAD["null"].what in outcome.err


@pytest.mark.parametrize("settings", [{}, {"on_bad_row": "skip"}])
def test_nothing_in_a_row_reaches_the_terminal(
    tmp_path: Path, tiny_base: Path, settings: dict[str, object]
) -> None:
    """Neither an excerpt, nor a finding, nor a sample moves the cursor or sets a title."""
    escape = "\x1b]0;title\x07\x1b[2J\x9b\u202e"
    rows = [
        as_row(context=f"q{escape}", target=f"answer{escape}"),
        as_row(messages=[{"role": f"user{escape}", "content": "q"}]),
        as_row(**{f"key{escape}": 1}),
        f'{{"a": {escape}}}'.encode(),
        f'["{escape}"'.encode(),
        good(1),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    outcome = check(tmp_path, tiny_base, **settings)
    assert outcome.code == (0 if settings else 2)
    if settings:
        assert "control characters: 1 row" in outcome.out
    odd = {c for c in outcome.out + outcome.err if not c.isprintable() and c != "\n"}
    assert not odd
