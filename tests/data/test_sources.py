"""What `data.path` may name: every kind of file, packed or not, whole or damaged, and where a
complaint points; what `limit`, `weight`, `fields` and `eval_path` make of it; and the Hub."""

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from stemtune.config import Data
from stemtune.data.prepare import Prepared, prepare
from stemtune.data.records import Dialogue
from stemtune.data.survey import Survey, survey
from stemtune.errors import DataError, StemtuneError
from stemtune.runfile import load_config
from tests.data.rows import data_of, records_in
from tests.fakehub import TAG, run_python, serve
from tests.models import tiny_tokenizer

Row = dict[str, Any]
ROWS: list[Row] = [{"context": "q1", "target": "a1"}, {"context": "q2", "target": "a2"}]
SAID = [("q1", "a1"), ("q2", "a2")]


# -- files, as bytes --------------------------------------------------------------------------


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: list[Row]) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode()


def separated(rows: list[Row], separator: str = ",") -> bytes:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(separator.join(line) + "\n" for line in lines).encode()


def parquet(rows: list[Row]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=700)
    return sink.getvalue()


def arrow(rows: list[Row], stream: bool = False) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    return sink.getvalue()


def play(rows: list[Row]) -> bytes:
    scenes = (f"Q: {row['context']}\nA: {row['target']}\n" for row in rows)
    return "\n---\n".join(scenes).encode()


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    "rows.jsonl": jsonl,
    "rows.ndjson": jsonl,
    "rows.JSONL": jsonl,
    "rows": jsonl,
    "rows.data": jsonl,
    "lines.json": jsonl,
    "list.json": as_json,
    "pretty.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "rows.csv": separated,
    "rows.tsv": lambda rows: separated(rows, "\t"),
    "rows.parquet": parquet,
    "file.arrow": arrow,
    "stream.arrow": lambda rows: arrow(rows, stream=True),
    "play.txt": play,
}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
every_kind = pytest.mark.parametrize("kind", WRITERS)
every_pack = pytest.mark.parametrize("pack", PACK)
either_pack = pytest.mark.parametrize("pack", [".gz", ".zst"])


def write(folder: Path, kind: str, rows: list[Row] | None = None, pack: str = "") -> Path:
    path = folder / f"{kind}{pack}"
    path.write_bytes(PACK[pack](WRITERS[kind](ROWS if rows is None else rows)))
    return path


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def settings_of(path: Any, **settings: Any) -> Data:
    """As `data_of`, for whatever `data.path` may be."""
    whole = {"path": path, "eval_fraction": 0.0, "character": "A", **settings}
    return Data.model_validate(whole)


def read(path: Any, **settings: Any) -> Survey:
    return survey(settings_of(path, **settings), 0)


def said(path: Any, **settings: Any) -> list[tuple[str, str]]:
    """For each record what is asked and what is answered."""
    data = settings_of(path, **settings)
    found = records_in(survey(data, 0), data)
    assert all(isinstance(record, Dialogue) for record in found)
    return [(record.opening[0].content, record.opening[-1].content) for record in found]


def refusal(path: Any, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value


def refusals(path: Any, **settings: Any) -> list[tuple[str, str]]:
    """For each row that is left out its place and the complaint."""
    ledger = read(path, on_bad_row="skip", **settings).ledger
    assert ledger.num_refused == len(ledger.refused)
    assert all(refused.hint for refused in ledger.refused)
    return [(refused.place, refused.what) for refused in ledger.refused]


def many(count: int, words: int = 30) -> list[Row]:
    """Rows that can't be packed to little."""
    rng = random.Random(count)
    return [
        {"context": f"q{i}", "target": " ".join(f"{rng.getrandbits(48):x}" for _ in range(words))}
        for i in range(count)
    ]


# -- whole files ------------------------------------------------------------------------------


@every_pack
@every_kind
def test_every_kind_of_file(tmp_path: Path, kind: str, pack: str) -> None:
    path = write(tmp_path, kind, pack=pack)
    assert said(str(path)) == SAID


@every_pack
@every_kind
def test_every_kind_of_file_over_several_blocks(tmp_path: Path, kind: str, pack: str) -> None:
    """More than one block of a compressor, batch of rows, and chunk of work."""
    rows = many(2100, words=20)
    found = said(str(write(tmp_path, kind, rows, pack)))
    assert found == [(row["context"], row["target"]) for row in rows]


@either_pack
@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.csv", "play.txt"])
def test_packed_parts_one_after_the_other(tmp_path: Path, kind: str, pack: str) -> None:
    """As `cat a.gz b.gz` makes them."""
    content = WRITERS[kind](ROWS)
    half = len(content) // 2
    path = tmp_path / f"{kind}{pack}"
    path.write_bytes(PACK[pack](content[:half]) + PACK[pack](content[half:]))
    assert said(str(path)) == SAID


def test_the_last_suffixes_tell_the_kind(tmp_path: Path) -> None:
    assert said(str(put(tmp_path / "a.csv.b.jsonl", jsonl(ROWS)))) == SAID
    assert said(str(put(tmp_path / "A.CSV.GZ", gzip.compress(separated(ROWS))))) == SAID
    assert said(str(put(tmp_path / "rows.gz", gzip.compress(jsonl(ROWS))))) == SAID


@pytest.mark.parametrize("kind", ["rows.jsonl", "list.json", "lines.json", "rows.csv", "play.txt"])
def test_a_byte_order_mark_at_the_start(tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / kind, b"\xef\xbb\xbf" + WRITERS[kind](ROWS))
    assert said(str(path)) == SAID


@pytest.mark.parametrize("kind", ["rows.jsonl", "pretty.json", "rows.csv", "rows.tsv", "play.txt"])
def test_line_ends_of_windows(tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / kind, WRITERS[kind](ROWS).replace(b"\n", b"\r\n"))
    assert said(str(path)) == SAID


def test_columns_keep_their_structure(tmp_path: Path) -> None:
    turns = [[("user", question), ("assistant", answer)] for question, answer in SAID]
    rows = [{"messages": [{"role": role, "content": text} for role, text in t]} for t in turns]
    for kind in ("rows.parquet", "file.arrow", "stream.arrow"):
        assert said(str(write(tmp_path, kind, rows))) == SAID


# -- damaged files ----------------------------------------------------------------------------


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@either_pack
@every_kind
def test_a_packed_file_that_is_cut(tmp_path: Path, kind: str, pack: str, on_bad_row: str) -> None:
    """It must not pass for a shorter one."""
    path = write(tmp_path, kind, many(700), pack)
    content = path.read_bytes()
    for share in (0.99, 0.5):
        path.write_bytes(content[: int(len(content) * share)])
        error = refusal(str(path), on_bad_row=on_bad_row)
        assert error.what.startswith("can't be read: ")
        assert error.where.startswith(str(path))


@either_pack
@every_kind
def test_a_packed_file_that_is_damaged(tmp_path: Path, kind: str, pack: str) -> None:
    path = write(tmp_path, kind, many(700), pack)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    error = refusal(str(path))
    assert error.where.startswith(str(path))


@either_pack
@every_kind
def test_a_file_that_is_not_packed_at_all(tmp_path: Path, kind: str, pack: str) -> None:
    path = put(tmp_path / f"{kind}{pack}", WRITERS[kind](ROWS))
    error = refusal(str(path))
    assert error.what.startswith("can't be read: ")
    assert error.where == str(path)


@pytest.mark.parametrize("kind", ["rows.parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_columns_that_are_cut(tmp_path: Path, kind: str, share: float) -> None:
    content = WRITERS[kind](many(700))
    path = put(tmp_path / kind, content[: int(len(content) * share)])
    error = refusal(str(path), on_bad_row="skip")
    assert error.what.startswith("can't be read: ")
    assert error.where == str(path)


@every_pack
@every_kind
def test_an_empty_file(tmp_path: Path, kind: str, pack: str) -> None:
    path = put(tmp_path / f"{kind}{pack}", PACK[pack](b""))
    error = refusal(str(path))
    assert error.where.startswith(str(path))


# -- JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        pytest.param('[\n{"context": "q", "target": "a"},\n', 3, "not valid JSON", id="cut"),
        pytest.param('[\n{"context": "q", "target": "a"}\n', 2, "the list is cut off", id="ends"),
        pytest.param('[\n{"context": "q", "tar', 2, "not valid JSON: Unterm", id="cut in a row"),
        pytest.param(
            '[\n{"context": "q", "target": "a"}\n{"context": "r", "target": "b"}]',
            2,
            "the list is cut off or a comma is missing",
            id="no comma",
        ),
        pytest.param('\n {\n "data": []}', 2, "expected a list of rows", id="one object"),
        pytest.param('"text"', 1, 'expected a list of rows: "text"', id="text"),
        pytest.param("3", 1, "expected a list of rows: 3", id="a number"),
        pytest.param("null", 1, "expected a list of rows: null", id="null"),
        pytest.param('[\n\n{"a": 1, "a": 2}]', 3, "not valid JSON: the key 'a'", id="key twice"),
        pytest.param('[\n{"a": NaN}]', 2, "not valid JSON: NaN is not JSON", id="NaN"),
        pytest.param('[\n{"a":' + "[" * 5000, 2, "nested too deeply", id="deep"),
        pytest.param('[\n{"a": ' + "9" * 5000 + "}]", 2, "not valid JSON: Exceeds", id="huge"),
        pytest.param(b'[\n{"a":\n "\xff"}]', 3, "not UTF-8: byte 0xff at byte", id="not UTF-8"),
        pytest.param('[{"context": "q", "target": "a"},\n3]', 2, "expected a JSON", id="no object"),
        pytest.param(
            '[{"context": "q", "target": "a"},\n\n{"context":\n "q\\ud800", "target": "b"}]',
            3,
            "text that is not UTF-8, or half of a surrogate pair",
            id="half of a pair",
        ),
        pytest.param(
            '[{"context": "q", "target": "a"},\n{"context": "r",\n"target": ""}]',
            2,
            "`target` is blank",
            id="a blank field",
        ),
        pytest.param(
            '[{"context": "q", "target": "a"}]\n[{"context": "r", "target": "b"}]',
            2,
            "",
            id="a second list",
        ),
        pytest.param('[{"context": "q", "target": "a"}]\nmore', 2, "", id="something behind"),
    ],
)
def test_json_that_is_wrong(tmp_path: Path, content: str | bytes, line: int, what: str) -> None:
    path = put(tmp_path / "rows.json", content)
    error = refusal(str(path))
    assert error.what.startswith(what)
    assert error.where == f"{path}:{line}"


def test_one_json_object_on_a_line_is_a_row(tmp_path: Path) -> None:
    assert said(str(put(tmp_path / "rows.json", json.dumps(ROWS[0])))) == SAID[:1]


@pytest.mark.parametrize("pad", range(4))
def test_a_large_object_is_called_no_list_whatever_its_letters(tmp_path: Path, pad: int) -> None:
    """Its start is looked at alone, and may end inside a character."""
    content = json.dumps({"data": ["x" * pad, "学" * 3000]}, ensure_ascii=False, indent=1)
    error = refusal(str(put(tmp_path / "rows.json", content)))
    assert error.what.startswith("expected a list of rows: {")


@pytest.mark.parametrize("content", [as_json(ROWS), jsonl(ROWS)], ids=["list", "lines"])
def test_json_behind_many_blanks(tmp_path: Path, content: bytes) -> None:
    assert said(str(put(tmp_path / "rows.json", b" \n" * 5000 + content))) == SAID


def test_an_empty_list(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.json", " [ \n] ")
    error = refusal(str(path))
    assert error.what == "the file holds no rows"
    assert error.where == str(path)


def test_lines_in_a_json_file_are_placed_as_lines(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.json", jsonl(ROWS) + b'{"context": "q3"\n')
    error = refusal(str(path))
    assert error.where == f"{path}:3 (byte {len(jsonl(ROWS))})"


# -- CSV and TSV ------------------------------------------------------------------------------


def test_fields_with_quotes_separators_and_line_breaks(tmp_path: Path) -> None:
    text = 'context,target\n"a, ""b""\n\nc","d\r\ne"\n\n" f ",\tg\n'
    found = said(str(put(tmp_path / "rows.csv", text)))
    assert found == [('a, "b"\n\nc', "d\r\ne"), (" f ", "\tg")]
    tabs = 'context\ttarget\n"a\tb"\tc, d\n'
    assert said(str(put(tmp_path / "rows.tsv", tabs))) == [("a\tb", "c, d")]


BAD_CSV = 'context,target\nq,"a\n\nb"\n\nr,c,d\nt\n"u\nv",\n"x"y,z\nw,ok\n'


@every_pack
def test_a_bad_csv_row_is_placed_where_it_begins(tmp_path: Path, pack: str) -> None:
    path = put(tmp_path / f"rows.csv{pack}", PACK[pack](BAD_CSV.encode()))
    assert refusal(str(path)).where == f"{path}:6"
    assert refusals(str(path)) == [
        (f"{path}:6", "3 fields, but the header has 2"),
        (f"{path}:7", "1 fields, but the header has 2"),
        (f"{path}:8", "`target` is blank"),
        (f"{path}:10", "not valid CSV: ',' expected after '\"'"),
    ]
    assert said(str(path), on_bad_row="skip") == [("q", "a\n\nb"), ("w", "ok")]


def test_a_quote_that_never_closes(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.csv", 'context,target\nq,a\nr,"b\ns,c\n')
    error = refusal(str(path))
    assert error.what == "not valid CSV: unexpected end of data"
    assert error.where == f"{path}:3"


@pytest.mark.parametrize("kind", ["rows.csv", "rows.tsv"])
def test_csv_that_is_not_utf8(tmp_path: Path, kind: str) -> None:
    content = WRITERS[kind]([*ROWS, {"context": "q3", "target": "é"}]).decode().encode("latin-1")
    path = put(tmp_path / kind, content)
    error = refusal(str(path))
    assert error.what.startswith("text that is not UTF-8")
    assert error.where == f"{path}:4"
    assert said(str(path), on_bad_row="skip") == SAID


@pytest.mark.parametrize("kind", ["rows.csv", "rows.tsv"])
def test_a_header_alone(tmp_path: Path, kind: str) -> None:
    path = put(tmp_path / kind, WRITERS[kind](ROWS).splitlines()[0] + b"\n")
    error = refusal(str(path))
    assert error.what == "the file holds no rows"
    assert error.where == str(path)


def test_another_separator_names_the_keys(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.csv", "context;target\nq;a\n")
    error = refusal(str(path))
    assert error.what == "unknown kind of row: its keys are context;target"
    assert error.where == f"{path}:2"


def test_a_huge_field(tmp_path: Path) -> None:
    """One that is large is read, one that is more than a row may be is refused."""
    large = "x" * (1 << 20)
    path = put(tmp_path / "rows.csv", f"context,target\nq,{large}\nr,{large * 17}\ns,b\n")
    ((place, what),) = refusals(str(path))
    assert place == f"{path}:3"
    assert what.startswith("not valid CSV: field larger than")
    assert [answer[:3] for _, answer in said(str(path), on_bad_row="skip")] == ["xxx", "b"]


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    """As a key that stands twice in a JSON row: one of the two would be lost."""
    path = put(tmp_path / "rows.csv", "context,target,target\nq,a,b\n")
    error = refusal(str(path))
    assert "target" in error.what
    assert error.where.startswith(f"{path}:")


# -- Parquet, Arrow, plays --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows.parquet", "file.arrow", "stream.arrow"])
def test_a_bad_row_of_columns_has_its_number(tmp_path: Path, kind: str) -> None:
    """Counted over row groups and batches."""
    rows = many(1500, words=1)
    rows[3]["target"] = " "
    rows[1401]["target"] = None
    path = write(tmp_path, kind, rows)
    assert refusal(str(path)).where == f"{path}:4"
    assert refusals(str(path)) == [
        (f"{path}:4", "`target` is blank"),
        (f"{path}:1402", "`target` should be text, found null"),
    ]


@pytest.mark.parametrize("value", [b"bytes", 3, 2.5, True, ["a"], {"a": "b"}], ids=repr)
def test_a_column_of_another_kind_is_named(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path, "rows.parquet", [{"context": "q", "target": value}])
    error = refusal(str(path))
    assert error.what.startswith("`target` should be text, found ")
    assert "null" not in error.what
    assert error.where == f"{path}:1"


def test_a_play_is_a_row_a_scene(tmp_path: Path) -> None:
    text = (
        "# Act I\n\n(Enter both.)\nQ: Who is there?\nA: Nay, answer me.\nStand!\n"
        "---\n\nQ: Hail.\n---\nA：「Hail.」\nQ: Farewell.\nA: 「Go.」\n"
    )
    path = put(tmp_path / "play.txt", text)
    assert said(str(path)) == [("Who is there?", "Nay, answer me.\nStand!"), ("Hail.", "Go.")]
    found = read(str(path))
    assert [found.place(row).line for row in range(len(found.row_line))] == [2, 8, 11]
    assert found.ledger.formats == {"scene": 3}
    assert found.ledger.num_refused == 0
    (note,) = found.ledger.notes
    assert note.startswith("1 scenes have no turn")


def test_a_play_that_is_not_utf8_has_the_line_of_its_scene(tmp_path: Path) -> None:
    content = b"Q: one\nA: two\n---\nQ: three\nA: \xe9\n"
    error = refusal(str(put(tmp_path / "play.txt", content)))
    assert error.what.startswith("text that is not UTF-8")
    assert error.where == f"{tmp_path / 'play.txt'}:4"


def test_a_play_needs_a_character(tmp_path: Path) -> None:
    path = put(tmp_path / "play.txt", play(ROWS))
    error = refusal(str(path), character=None)
    assert error.what == "which of the roles is trained?"
    assert error.where == f"{path}:1"


# -- several files ----------------------------------------------------------------------------


def tree(folder: Path) -> Path:
    """Files whose only answer is their own name."""
    for name in [
        "b.jsonl",
        "a.csv",
        "z/deep/c.jsonl.gz",
        "z/d.txt.bak",
        "z/README.md",
        "z/e.jsonl",
        ".hidden.jsonl",
        ".git/f.jsonl",
        "z/.cache/deep/g.jsonl",
        "no-suffix",
    ]:
        row = [{"context": f"q {name}", "target": name}]
        content = separated(row) if name.endswith(".csv") else jsonl(row)
        put(folder / name, gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def answers(path: Any, **settings: Any) -> list[str]:
    return [answer for _, answer in said(path, **settings)]


def test_a_folder_with_all_below_it(tmp_path: Path) -> None:
    expected = ["a.csv", "b.jsonl", "z/deep/c.jsonl.gz", "z/e.jsonl"]
    assert answers(str(tree(tmp_path / "rows"))) == expected
    assert answers(str(tree(tmp_path / ".work" / "rows"))) == expected


def test_a_folder_without_data(tmp_path: Path) -> None:
    put(tmp_path / "rows" / "README.md", "text")
    put(tmp_path / "rows" / ".hidden" / "rows.jsonl", jsonl(ROWS))
    error = refusal(str(tmp_path / "rows"))
    assert error.what == "no data files in this folder"
    assert error.where == str(tmp_path / "rows")
    assert ".parquet" in error.hint and ".zst" in error.hint


def test_globs(tmp_path: Path) -> None:
    folder = str(tree(tmp_path))
    assert answers(f"{folder}/*.jsonl") == ["b.jsonl"]
    assert answers(f"{folder}/?.[cj]s*") == ["a.csv", "b.jsonl"]
    assert answers(f"{folder}/**/*.jsonl*") == ["b.jsonl", "z/deep/c.jsonl.gz", "z/e.jsonl"]
    assert answers(f"{folder}/z/**/*.gz") == ["z/deep/c.jsonl.gz"]
    assert answers(f"{folder}/no-*") == ["no-suffix"]


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    pattern = f"{tmp_path}/*.jsonl"
    error = refusal(pattern)
    assert error.what == "no file matches"
    assert error.where == pattern
    assert "data.path" in error.hint
    put(tmp_path / "train", jsonl(ROWS))
    assert "data.eval_path" in refusal(str(tmp_path / "train"), eval_path=pattern).hint


def test_a_name_with_brackets_is_a_name_first(tmp_path: Path) -> None:
    put(tmp_path / "rows[1].jsonl", jsonl(ROWS[:1]))
    put(tmp_path / "rows1.jsonl", jsonl(ROWS[1:]))
    assert said(str(tmp_path / "rows[1].jsonl")) == SAID[:1]


def test_lists_of_these_in_their_order(tmp_path: Path) -> None:
    folder = str(tree(tmp_path))
    paths = [f"{folder}/z", {"path": f"{folder}/b.jsonl"}, f"{folder}/*.csv"]
    assert answers(paths) == ["z/deep/c.jsonl.gz", "z/e.jsonl", "b.jsonl", "a.csv"]


def test_one_bad_file_among_many(tmp_path: Path) -> None:
    folder = tree(tmp_path)
    put(folder / "z" / "empty.jsonl", b"")
    error = refusal(str(folder))
    assert error.what == "the file holds no rows"
    assert error.where == str(folder / "z" / "empty.jsonl")


@pytest.mark.parametrize(
    "path", ["rows.jsonl", "*.jsonl", ".", "../data [1]", "../*/rows.jsonl", "**/rows.jsonl"]
)
def test_paths_are_relative_to_the_run_file_in_any_folder(tmp_path: Path, path: str) -> None:
    """The folder's own name is no pattern."""
    folder = tmp_path / "data [1]"
    put(folder / "rows.jsonl", jsonl(ROWS))
    put(folder / "run.yaml", f"data: {{path: '{path}', eval_fraction: 0}}\n")
    config = load_config(folder / "run.yaml")
    assert survey(config.data, 0).ledger.rows == 2


# -- limit, format, fields --------------------------------------------------------------------


@every_pack
@every_kind
def test_limit_takes_the_first_rows(tmp_path: Path, kind: str, pack: str) -> None:
    rows = many(50, words=2)
    path = write(tmp_path, kind, rows, pack)
    assert said(str(path), limit=3) == [(row["context"], row["target"]) for row in rows[:3]]
    assert len(said(str(path), limit=51)) == 50


def three_files(folder: Path) -> Path:
    for name in "abc":
        rows = [{"context": f"{name}{number}", "target": "t"} for number in range(4)]
        put(folder / f"{name}.jsonl", jsonl(rows))
    return folder


def asked(path: Any, **settings: Any) -> list[str]:
    return [question for question, _ in said(path, **settings)]


def test_limit_of_each_source(tmp_path: Path) -> None:
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    three_files(tmp_path)
    assert asked([a, b], limit=2) == ["a0", "a1", "b0", "b1"]
    assert asked([{"path": a, "limit": 1}, b], limit=2) == ["a0", "b0", "b1"]
    assert asked([{"path": a, "limit": 3}, b, c], limit=1) == ["a0", "a1", "a2", "b0", "c0"]
    assert asked([{"path": a, "limit": 1}, b]) == ["a0", "b0", "b1", "b2", "b3"]


@pytest.mark.parametrize("below", ["", "/*.jsonl"], ids=["folder", "glob"])
@pytest.mark.parametrize(("limit", "last"), [(2, "a1"), (4, "a3"), (6, "b1"), (99, "c3")])
def test_limit_counts_over_all_files_of_a_source(
    tmp_path: Path, below: str, limit: int, last: str
) -> None:
    """`limit` is of the source, whatever files it names."""
    source = {"path": f"{three_files(tmp_path)}{below}", "limit": limit}
    found = asked([source])
    assert len(found) == min(limit, 12)
    assert found[-1] == last


def test_limit_leaves_out_what_comes_after_even_if_it_is_bad(tmp_path: Path) -> None:
    path = put(tmp_path / "rows.jsonl", jsonl(ROWS) + b"bad\n")
    assert said(str(path), limit=2) == SAID
    assert refusal(str(path), limit=3).where.startswith(f"{path}:3")


def test_evaluation_rows_have_the_limit_too(tmp_path: Path) -> None:
    three_files(tmp_path)
    found = read(str(tmp_path / "a.jsonl"), eval_path=str(tmp_path / "b.jsonl"), limit=1)
    assert found.is_eval.tolist() == [False, True]


def test_a_source_with_its_own_format(tmp_path: Path) -> None:
    """A row that two formats know: its source says which one is meant."""
    row = {"context": "q1", "target": "a1", "prompt": "q2", "completion": "a2"}
    path = str(put(tmp_path / "rows.jsonl", jsonl([row])))
    for form, expected in [("context_target", SAID[:1]), ("prompt_completion", SAID[1:])]:
        assert said(path, format=form) == expected
        assert said([{"path": path, "format": form}]) == expected
    two = [{"path": path, "format": "context_target"}, path]
    assert said(two, format="prompt_completion") == SAID
    found = read(two)
    assert found.ledger.formats == {"context_target": 1, "prompt_completion": 1}
    wrong = refusal([{"path": path, "format": "dialogue"}])
    assert wrong.where.startswith(f"{path}:1")


DEEP: Row = {
    "question": {"text": "What?"},
    "docs": [{"body": "One."}, {"body": "Two."}],
    "answers": ["First.", "Second."],
    "votes": [[{"t": "a"}, {"t": "b"}], [{"t": "c"}]],
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"context": "question.text", "target": "answers[0]"}, ("What?", "First.")),
        ({"context": "question.text", "target": "answers[1]"}, ("What?", "Second.")),
        ({"context": "docs[1].body", "target": "votes[0][1].t"}, ("Two.", "b")),
    ],
)
def test_fields_are_followed(
    tmp_path: Path, fields: dict[str, str], expected: tuple[str, str]
) -> None:
    path = str(put(tmp_path / "rows.jsonl", jsonl([DEEP])))
    assert said(path, fields=fields) == [expected]


def test_passages_are_taken_of_every_item(tmp_path: Path) -> None:
    fields = {"query": "question.text", "passages": "docs[].body", "answer": "answers[0]"}
    path = put(tmp_path / "rows.jsonl", jsonl([DEEP]))
    data = data_of(path, fields=fields)
    (record,) = records_in(survey(data, 0), data)
    assert record.passages == ("One.", "Two.")
    assert record.opening[-1].content == "First."


def test_fields_of_preferences(tmp_path: Path) -> None:
    row = {"q": "Who?", "best": {"text": "I."}, "rest": [{"text": "You."}]}
    fields = {"prompt": "q", "chosen": "best.text", "rejected": "rest[0].text"}
    data = data_of(put(tmp_path / "rows.jsonl", jsonl([row])), fields=fields)
    (record,) = records_in(survey(data, 0), data)
    assert [answer.content for answer in record.answers] == ["I.", "You."]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("answer", "nothing stands at `answer`: there is no 'answer'"),
        ("question.body", "nothing stands at `question.body`: there is no 'body'"),
        ("question.text.x", "nothing stands at `question.text.x`: text has no field 'x'"),
        ("question[0]", "nothing stands at `question[0]`: an object is not a list"),
        ("question[]", "nothing stands at `question[]`: an object is not a list"),
        ("answers[2]", "nothing stands at `answers[2]`: the list has 2 items"),
        ("docs[].text", "nothing stands at `docs[].text`: there is no 'text'"),
        ("docs.body", "nothing stands at `docs.body`: a list has no field 'body'"),
        ("question", "`target` should be text, found an object"),
        ("answers[]", "`target` should be text, found a list"),
    ],
)
def test_fields_that_lead_nowhere(tmp_path: Path, target: str, what: str) -> None:
    path = put(tmp_path / "rows.jsonl", b"\n" + jsonl([DEEP]))
    fields = {"context": "question.text", "target": target}
    error = refusal(str(path), fields=fields)
    assert error.what == what
    assert error.where == f"{path}:2 (byte 1)"
    if what.startswith("nothing"):
        assert f"data.fields.target is {target}" in error.hint
        assert "question, docs, answers, votes" in error.hint


@pytest.mark.parametrize(
    "target", ["", ".", "answer[", "answer]", "[0]", "answer[x]", "answer..x", "answer.", ".answer"]
)
def test_what_is_no_path_of_a_field_is_refused(tmp_path: Path, target: str) -> None:
    """Not read as one that it resembles: `answer[x]` is not `answer.x`."""
    put(tmp_path / "rows.jsonl", jsonl([{"context": "q", "answer": {"x": "a"}, "target": "b"}]))
    fields = json.dumps({"context": "context", "target": target})
    put(tmp_path / "run.yaml", f"data: {{path: rows.jsonl, eval_fraction: 0, fields: {fields}}}\n")
    with pytest.raises(StemtuneError, match=r"fields|nothing stands") as caught:
        survey(load_config(tmp_path / "run.yaml").data, 0)
    assert caught.value.exit_code == 2


def test_fields_of_csv_are_columns(tmp_path: Path) -> None:
    path = str(put(tmp_path / "rows.csv", "Question,My Answer\nq1,a1\n"))
    assert said(path, fields={"context": "Question", "target": "My Answer"}) == SAID[:1]


# -- eval -------------------------------------------------------------------------------------


def test_a_source_that_is_only_trained_on(tmp_path: Path) -> None:
    """What is held out of the other source stays the same."""
    a, b = (str(put(tmp_path / f"{n}.jsonl", jsonl(pairs_of_rows(20, n)))) for n in "ab")
    alone = survey(settings_of([a], eval_fraction=0.3), 0)
    both = survey(settings_of([a, {"path": b, "eval": False}], eval_fraction=0.3), 0)
    assert 4 <= both.is_eval.sum() <= 20
    assert both.is_eval.tolist() == [*alone.is_eval.tolist(), *[False] * 40]
    free = survey(settings_of([a, b], eval_fraction=0.3), 0)
    assert free.is_eval[40:].any()


def test_what_is_like_a_row_that_is_only_trained_on_is_not_held_out(tmp_path: Path) -> None:
    rows = pairs_of_rows(4)
    a = str(put(tmp_path / "a.jsonl", jsonl(rows)))
    b = str(put(tmp_path / "b.jsonl", jsonl([row for row in rows if row["context"] != "q2"])))
    found = survey(settings_of([a, {"path": b, "eval": False}], eval_fraction=0.9), 0)
    held_out = {rows[i]["context"] for i in np.flatnonzero(found.is_eval[:8])}
    assert held_out <= {"q2"}


def test_nothing_may_be_held_out(tmp_path: Path) -> None:
    path = str(put(tmp_path / "a.jsonl", jsonl(pairs_of_rows(4))))
    found = survey(settings_of([{"path": path, "eval": False}], eval_fraction=0.5), 0)
    assert not found.is_eval.any()
    assert any("nothing is held out" in note for note in found.ledger.notes)


# -- weight -----------------------------------------------------------------------------------


def pairs_of_rows(groups: int, name: str = "q") -> list[Row]:
    """Two rows that ask the same, for each group."""
    return [{"context": f"{name}{i}", "target": f"t{i} {j}"} for i in range(groups) for j in "ab"]


def prepared(path: Any, seed: int = 0, **settings: Any) -> Prepared:
    data = settings_of(path, **settings)
    return prepare(survey(data, seed), tiny_tokenizer(), data)


def times_seen(made: Prepared) -> list[int]:
    """How often each record is trained on in an epoch."""
    return np.bincount(made.train.numbers, minlength=len(made.train.survey.group)).tolist()


def test_weight_2_shows_each_record_twice(tmp_path: Path) -> None:
    a, b = (str(put(tmp_path / f"{n}.jsonl", jsonl(pairs_of_rows(5, n)))) for n in "ab")
    made = prepared([{"path": a, "weight": 2}, b])
    assert times_seen(made) == [2] * 10 + [1] * 10
    assert len(made.train) == len(made.train.sequences) == 30
    assert [s.record for s in made.train.flat] == list(range(30))
    twice = [made.train.sequences[i][0].input_ids.tolist() for i in (0, 1, 2)]
    assert twice[0] == twice[1] != twice[2]
    assert made.train.place(0).line == made.train.place(1).line == 1
    assert made.fingerprint != prepared([a, b]).fingerprint


def test_weight_one_half_takes_half_of_the_groups(tmp_path: Path) -> None:
    """Within four standard deviations of a binomial draw, and none in part."""
    path = str(put(tmp_path / "rows.jsonl", jsonl(pairs_of_rows(200))))
    made = prepared([{"path": path, "weight": 0.5}])
    seen = times_seen(made)
    assert seen[::2] == seen[1::2]
    assert set(seen) == {0, 1}
    assert 72 <= sum(seen[::2]) <= 128
    again = prepared([{"path": path, "weight": 0.5}])
    assert times_seen(again) == seen
    assert again.fingerprint == made.fingerprint
    other = prepared([{"path": path, "weight": 0.5}], seed=1)
    assert times_seen(other) != seen
    assert other.fingerprint != made.fingerprint


@pytest.mark.parametrize(
    ("weight", "least", "most"), [(0.1, 1, 1.1), (1.5, 1.2, 1.8), (2.9, 2.7, 3)]
)
def test_weights_that_are_no_whole_number(
    tmp_path: Path, weight: float, least: float, most: float
) -> None:
    path = str(put(tmp_path / "rows.jsonl", jsonl(pairs_of_rows(200))))
    seen = times_seen(prepared([{"path": path, "weight": weight}]))
    assert set(seen) == {int(weight), int(weight) + 1}
    mean = sum(seen) / len(seen)
    assert abs(mean - weight) < 0.15
    assert weight < 1 or least <= mean <= most


def test_a_weight_leaves_other_sources_alone(tmp_path: Path) -> None:
    a, b = (str(put(tmp_path / f"{n}.jsonl", jsonl(pairs_of_rows(40, n)))) for n in "ab")
    alone = read([{"path": a, "weight": 0.5}])
    both = read([b, {"path": a, "weight": 0.5}])
    assert both.repeats.tolist() == [1] * 80 + alone.repeats.tolist()


@pytest.mark.parametrize("weight", [0.5, 2, 3.5])
def test_a_weight_does_not_touch_what_is_held_out(tmp_path: Path, weight: float) -> None:
    path = str(put(tmp_path / "rows.jsonl", jsonl(pairs_of_rows(100))))
    plain = prepared(path, eval_fraction=0.3)
    weighted = prepared([{"path": path, "weight": weight}], eval_fraction=0.3)
    assert len(plain.eval) > 20
    assert weighted.eval.numbers.tolist() == plain.eval.numbers.tolist()
    found = weighted.eval.survey
    assert set(found.repeats[found.is_eval]) == {1}
    assert set(weighted.train.numbers) <= set(plain.train.numbers)


def test_a_weight_of_evaluation_files_means_nothing(tmp_path: Path) -> None:
    train = str(put(tmp_path / "train.jsonl", jsonl(pairs_of_rows(5, "t"))))
    held_out = str(put(tmp_path / "eval.jsonl", jsonl(pairs_of_rows(20, "e"))))
    for weight in (0.5, 3):
        made = prepared(train, eval_path=[{"path": held_out, "weight": weight}])
        assert made.eval.numbers.tolist() == list(range(10, 50))
        assert made.train.numbers.tolist() == list(range(10))


@pytest.mark.parametrize("weight", [0.5, 0.01])
def test_a_small_source_is_never_left_out_as_a_whole(tmp_path: Path, weight: float) -> None:
    """Of the groups that are trained on at least one stays, whatever is held out."""
    path = str(put(tmp_path / "rows.jsonl", jsonl(pairs_of_rows(3))))
    for seed in range(20):
        data = settings_of([{"path": path, "weight": weight}], eval_fraction=0.4)
        found = survey(data, seed)
        assert found.is_eval.any()
        assert found.repeats[~found.is_eval].any(), f"seed {seed}: nothing to train on"


@pytest.mark.parametrize("count", [1, 2])
def test_one_group_with_a_weight(tmp_path: Path, count: int) -> None:
    path = str(put(tmp_path / "rows.jsonl", jsonl(pairs_of_rows(1)[:count])))
    assert read([{"path": path, "weight": 0.1}]).repeats.tolist() == [1] * count


# -- the split --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows.jsonl", "pretty.json", "rows.csv", "rows.parquet"])
def test_evaluation_files_that_overlap(tmp_path: Path, kind: str) -> None:
    names = {"train": "abc", "eval": "xbyc"}
    paths = {}
    for side, letters in names.items():
        (tmp_path / side).mkdir()
        rows = [{"context": letter, "target": f"{side} {letter}"} for letter in letters]
        paths[side] = write(tmp_path / side, kind, rows)
    error = refusal(str(paths["train"]), eval_path=str(paths["eval"]))
    line = {"rows.jsonl": 2, "pretty.json": 6, "rows.csv": 3, "rows.parquet": 2}[kind]
    assert error.where.partition(" ")[0] == f"{paths['eval']}:{line}"
    assert error.what.startswith("2 groups of the evaluation data are in the training data")
    assert "data.allow_leaks: true" in error.hint
    found = read(str(paths["train"]), eval_path=str(paths["eval"]), allow_leaks=True)
    assert found.is_eval.tolist() == [False] * 3 + [True] * 4
    (note,) = found.ledger.notes
    assert note.startswith("2 groups") and "data.allow_leaks" in note


def test_evaluation_files_that_do_not_overlap_make_no_note(tmp_path: Path) -> None:
    train = put(tmp_path / "train.jsonl", jsonl(ROWS[:1]))
    held_out = put(tmp_path / "eval.jsonl", jsonl(ROWS[1:]))
    for allowed in (True, False):
        found = read(str(train), eval_path=str(held_out), allow_leaks=allowed)
        assert found.ledger.notes == []


def nearly(words: int, count: int) -> list[tuple[str, str]]:
    """Pairs of texts of distinct words of which one was changed."""
    rng = random.Random(words)
    found = []
    for _ in range(count):
        text = rng.sample([f"word{i}" for i in range(9000)], words)
        changed = list(text)
        changed[rng.randrange(words)] = "another"
        found.append((" ".join(text), " ".join(changed)))
    return found


def sides(path: str, seeds: int = 40) -> np.ndarray:
    """[seeds, records] what is held out."""
    data = settings_of(path, eval_fraction=0.3)
    return np.array([survey(data, seed).is_eval for seed in range(seeds)])


@pytest.mark.parametrize(("words", "least"), [(30, 14), (60, 18), (120, 20), (400, 20)])
def test_nearly_the_same_answers_are_on_one_side(tmp_path: Path, words: int, least: int) -> None:
    """To different questions. Of short ones MinHash misses some: a word is a larger part."""
    rows = [
        {"context": f"q{number} {side}", "target": text}
        for number, pair in enumerate(nearly(words, 20))
        for side, text in enumerate(pair)
    ]
    path = str(put(tmp_path / "rows.jsonl", jsonl(rows)))
    drawn = sides(path).reshape(40, 20, 2)
    together = (drawn[..., 0] == drawn[..., 1]).all(0)
    assert together.sum() >= least
    assert len({side.tobytes() for side in drawn[..., 0].T}) == 20
    assert read(path).ledger.findings["near duplicates"].count == together.sum()


def test_the_same_answer_in_other_letters_is_nearly_the_same(tmp_path: Path) -> None:
    text = "I know only this one thing that I know nothing at all, my friend Meno."
    rows = [{"context": "a", "target": text}, {"context": "b", "target": text.upper() + "!!"}]
    path = str(put(tmp_path / "rows.jsonl", jsonl([*rows, *ROWS])))
    drawn = sides(path)
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert drawn[:, 0].any() and not drawn[:, 0].all()
    assert read(path).ledger.findings["near duplicates"].count == 1


def test_short_answers_may_be_alike(tmp_path: Path) -> None:
    """Eleven words: too few to tell anything."""
    text = "one two three four five six seven eight nine ten eleven"
    rows = [{"context": question, "target": text} for question in "ab"]
    path = str(put(tmp_path / "rows.jsonl", jsonl([*rows, *ROWS])))
    drawn = sides(path)
    assert (drawn[:, 0] != drawn[:, 1]).any()
    assert "near duplicates" not in read(path).ledger.findings


def test_nearly_the_same_answers_on_both_sides_are_a_leak(tmp_path: Path) -> None:
    ((text, changed),) = nearly(120, 1)
    train = put(tmp_path / "train.jsonl", jsonl([*ROWS, {"context": "q", "target": text}]))
    held_out = put(tmp_path / "eval.jsonl", jsonl([{"context": "p", "target": changed}]))
    error = refusal(str(train), eval_path=str(held_out))
    assert error.what.startswith("1 groups")
    assert error.where.startswith(f"{held_out}:1")


def test_rows_that_are_appended_leave_the_split_of_the_others(tmp_path: Path) -> None:
    old = many(150, words=20)
    new = [{"context": f"new {i}", "target": f"something else, number {i}"} for i in range(60)]
    path = tmp_path / "rows.jsonl"
    for seed in range(5):
        put(path, jsonl(old))
        data = settings_of(str(path), eval_fraction=0.2)
        before = survey(data, seed).is_eval.tolist()
        assert 0 < sum(before) < 150
        put(path, jsonl([*old, *new]))
        after = survey(data, seed).is_eval.tolist()
        assert after[:150] == before
        assert 0 < sum(after[150:]) < 60
        first = str(put(tmp_path / "first.jsonl", jsonl(new)))
        put(path, jsonl(old))
        both = survey(settings_of([first, str(path)], eval_fraction=0.2), seed).is_eval.tolist()
        assert both == after[150:] + before


# -- the Hub ----------------------------------------------------------------------------------

SURVEY = """
import json
from stemtune.config import Data
from stemtune.data.survey import survey
from stemtune.errors import StemtuneError

def tell(values):
    try:
        found = survey(Data.model_validate(values), 0)
    except StemtuneError as error:
        kind = type(error).__name__
        return [kind, error.exit_code, error.what, error.where, error.hint]
    return {
        "rows": found.ledger.rows,
        "is_eval": found.is_eval.tolist(),
        "places": [str(found.place(row)) for row in range(found.ledger.rows)],
        "refused": [[r.place, r.what] for r in found.ledger.refused],
    }

print("\\n" + json.dumps([tell(values) for values in json.loads(ASKED)]))
"""


IMPATIENT = """
import time
time.sleep = lambda _: None  # the Hub's own client waits for seconds between its tries
from stemtune import network
network.TRYING = 3.0
"""


def surveys(folder: Path, endpoint: str, *asked: dict[str, Any], **variables: str) -> list[Any]:
    """What surveys with these settings say, in a process of their own."""
    values = json.dumps([{"eval_fraction": 0.0, **settings} for settings in asked])
    code = f"ASKED = {values!r}\n{IMPATIENT}\n{SURVEY}"
    done = run_python(code, folder, HF_ENDPOINT=endpoint, **variables)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_refusal(found: Any, *parts: str) -> None:
    """A `ModelError` for a person."""
    kind, code, what, where, hint = found
    assert (kind, code, where) == ("ModelError", 3, "data.path")
    assert all(part in what for part in parts), what
    assert "name" in hint and "network" in hint


def test_datasets_of_the_hub(tmp_path: Path) -> None:
    repos = {
        "me/lines": {"train.jsonl": jsonl(ROWS), "README.md": b"# Rows\n"},
        "me/list": {"data/train.json": as_json(ROWS)},
        "me/csv": {"train.csv": separated(ROWS)},
        "me/parquet": {"data/train-00000-of-00001.parquet": parquet(ROWS)},
    }
    with serve(repos) as hub:
        found = surveys(tmp_path, hub, *({"path": name} for name in repos))
    assert [(one["rows"], one["refused"]) for one in found] == [(2, [])] * 4


def test_split_revision_and_limit_of_the_hub(tmp_path: Path) -> None:
    new = [{"context": "q new", "target": "a"}]
    repos = {"me/rows": {"train.jsonl": jsonl(many(9, words=2)), "test.jsonl": jsonl(new)}}
    source = {"path": "me/rows", "revision": TAG}
    with serve(repos) as hub:
        limited, both, split, revision, name = surveys(
            tmp_path,
            hub,
            {"path": [{**source, "limit": 4}]},
            {"path": source, "eval_path": {**source, "split": "test"}},
            {"path": {**source, "split": "validation"}},
            {"path": {"path": "me/rows", "revision": "v9"}},
            {"path": {**source, "name": "large"}},
        )
    assert limited["rows"] == 4
    assert both["is_eval"] == [False] * 9 + [True]
    check_refusal(split, "me/rows", "validation")
    check_refusal(revision, "me/rows", "v9")
    check_refusal(name, "me/rows", "large")


def test_rows_of_the_hub_have_places(tmp_path: Path) -> None:
    """The split is part of it: a run may use several."""
    bad = [*ROWS, {"context": "q3", "target": ""}]
    leak = {"path": "me/rows", "eval_path": {"path": "me/rows", "split": "test"}, "limit": 2}
    with serve({"me/rows": {"train.jsonl": jsonl(bad), "test.jsonl": jsonl(ROWS)}}) as hub:
        (stopped, kept, leaking) = surveys(
            tmp_path, hub, {"path": "me/rows"}, {"path": "me/rows", "on_bad_row": "skip"}, leak
        )
    assert stopped[0] == "DataError"
    assert stopped[3] == "me/rows/train:3"
    assert kept["refused"] == [["me/rows/train:3", "`target` is blank"]]
    assert kept["places"] == [f"me/rows/train:{row}" for row in (1, 2, 3)]
    assert leaking[0] == "DataError"
    assert leaking[3] == "me/rows/test:1"


def test_what_changes_on_the_hub_is_read_anew(tmp_path: Path) -> None:
    """Datasets of the Hub are kept whatever their size, and what is kept is never stale."""
    repos = {"me/rows": {"train.jsonl": jsonl(ROWS)}}
    with serve(repos) as hub:
        first, again = surveys(tmp_path, hub, {"path": "me/rows"}, {"path": "me/rows"})
        assert first == again
        repos["me/rows"] = {"train.jsonl": jsonl(many(5))}
        (after,) = surveys(tmp_path, hub, {"path": "me/rows"})
    assert (first["rows"], after["rows"]) == (2, 5)


def test_what_the_hub_does_not_have(tmp_path: Path) -> None:
    with serve({"me/empty": {"README.md": b"# Rows\n"}, "me/words": {"train.txt": b"q\n"}}) as hub:
        names = ["me/none", "me/empty", "me/words"]
        found = surveys(tmp_path, hub, *({"path": name} for name in names))
    for name, one in zip(names, found, strict=True):
        check_refusal(one, name)


def test_the_hub_is_down_for_a_while(tmp_path: Path) -> None:
    """For longer than its own client tries."""
    with serve({"me/rows": {"train.jsonl": jsonl(ROWS)}}, {"train.jsonl": ["503"] * 9}) as hub:
        (found,) = surveys(tmp_path, hub, {"path": "me/rows"})
    assert found["rows"] == 2


def test_the_hub_stays_down(tmp_path: Path) -> None:
    with serve({"me/rows": {"train.jsonl": jsonl(ROWS)}}, {"train.jsonl": ["503+"]}) as hub:
        (found,) = surveys(tmp_path, hub, {"path": "me/rows"})
    check_refusal(found, "me/rows")


def test_no_network(tmp_path: Path) -> None:
    (found,) = surveys(tmp_path, "http://127.0.0.1:9", {"path": "me/rows"}, HF_HUB_OFFLINE="1")
    check_refusal(found, "me/rows")


def test_code_of_the_hub_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    script = f"import pathlib\npathlib.Path({str(canary)!r}).write_text('ran')\n".encode()
    compile(script, "script.py", "exec")
    repos = {
        "me/script": {"script.py": script},
        "me/other": {"load.py": script, "README.md": b"# Rows\n"},
        "me/both": {"both.py": script, "train.jsonl": jsonl(ROWS)},
        "me/beside": {"load.py": script, "train.jsonl": jsonl(ROWS)},
    }
    with serve(repos) as hub:
        found = surveys(tmp_path, hub, *({"path": name} for name in repos))
    for name, one in zip(("me/script", "me/other", "me/both"), found[:3], strict=True):
        check_refusal(one, name)
    assert found[3]["rows"] == 2
    assert not canary.exists()


def test_a_folder_of_that_name_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dataset is asked for, and there is no network here to ask."""
    monkeypatch.setattr("stemtune.data.sources._load_hub", lambda source: pytest.fail("asked"))
    put(tmp_path / "me" / "rows" / "a.jsonl", jsonl(ROWS))
    put(tmp_path / "run.yaml", "data: {path: me/rows, eval_fraction: 0}\n")
    assert survey(load_config(tmp_path / "run.yaml").data, 0).ledger.rows == 2
    put(tmp_path / "run.yaml", "data: {path: me/rows.jsonl, eval_fraction: 0}\n")
    with pytest.raises(DataError, match="there is no such file"):
        survey(load_config(tmp_path / "run.yaml").data, 0)
