"""Rows as nobody should write them: a complaint that a person can use, or a well-formed record.

All draws are seeded: a failure names the setting and the row, and comes again.
"""

import json
import random
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stemtune.config import Data
from stemtune.data.formats import FORMATS
from stemtune.data.prepare import prepare
from stemtune.data.records import Dialogue, Message, Place, Preference, Record
from stemtune.data.sources import File, find_files
from stemtune.data.survey import records_of, survey
from stemtune.errors import DataError
from tests.data.templates import tokenizer_of

Row = dict[str, Any]
TURNS = [("user", "Can virtue be taught?"), ("assistant", "What is it?"), ("user", "Well…")]
CALL = {"type": "function", "function": {"name": "find", "arguments": '{"place": "Athens"}'}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]

GOOD: dict[str, list[Row]] = {
    "context_target": [{"context": "To be", "target": "or not to be"}],
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "You are Socrates."},
                *({"role": role, "content": text} for role, text in TURNS),
                {"role": "assistant", "content": "Tell me.", "reasoning_content": "Ask on."},
            ]
        },
        {
            "tools": TOOLS,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Where is he?"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "name": "find", "content": "in the agora", "tool_call_id": "1"},
                {"role": "assistant", "content": "In the agora."},
            ],
        },
    ],
    "sharegpt": [
        {
            "system": "s",
            "tools": json.dumps(TOOLS),
            "conversations": [
                {"from": "human", "value": "学而时习之"},
                {"from": "human", "value": "是什么？"},
                {"from": "function_call", "value": '{"name": "find", "arguments": {}}'},
                {"from": "observation", "value": "论语"},
                {"from": "gpt", "value": "不亦说乎"},
            ],
        }
    ],
    "alpaca": [
        {
            "instruction": "Sum up.",
            "input": "A long text.",
            "output": "Short.",
            "system": "s",
            "history": [["q", "a"]],
        }
    ],
    "labelled": [
        {"prompt": "Q", "completion": "A", "label": True},
        {"prompt": "Q", "completion": "B", "label": False},
    ],
    "prompt_completion": [
        {"prompt": "Q", "completion": "A"},
        {
            "prompt": [{"role": role, "content": text} for role, text in TURNS],
            "completion": [{"role": "assistant", "content": "So it is."}],
        },
    ],
    "dialogue": [
        {
            "dialogue": [
                {"role": "Meno", "text": "Can it be taught?"},
                {"role": "Socrates", "text": "What is it?"},
                {"role": "Boy", "text": "I know."},
                {"role": "Socrates", "text": "Then tell."},
            ]
        },
        {"dialogue": [{"role": "user", "text": "Q"}, {"role": "assistant", "text": "A"}]},
    ],
    "scene": [{"scene": "Meno: Can it?\n(They sit.)\nSocrates: What is it?\nMENO：「It」\n"}],
    "rag": [
        {"query": "Who?", "retrieval_result": ["He did."], "answer": "He."},
        {"question": "Who?", "documents": [{"text": "a"}, {"body": "b"}], "output": "She."},
    ],
    "preference": [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {
            "chosen": [{"role": r, "content": t} for r, t in (*TURNS, ("assistant", "A"))],
            "rejected": [{"role": r, "content": t} for r, t in (*TURNS, ("assistant", "B"))],
        },
        {"prompt": "Q", "chosen": ["a", "b"], "rejected": [{"text": "c"}]},
    ],
    "rag_preference": [
        {
            "query": "Who?",
            "retrieval_result": ["He did.", {"text": "So they say."}],
            "chosen": {"text": "He."},
            "rejected": {"text": "She."},
        }
    ],
    "candidates": [
        {
            "prompt": "Q",
            "candidates": [
                {"text": t, "score": s} for t, s in zip("abc", (0.5, 1, 0), strict=True)
            ],
        },
        {
            "query": "Q",
            "passages": ["p"],
            "candidates": [{"text": "It is so."}, {"text": "No."}],
            "answer": "It is so, yes.",
        },
    ],
}
# What `data.fields` of two of the settings makes a context and a target, and a preference, of.
MAPPED: list[Row] = [
    {"context": "Q", "turns": [{"content": "Q"}, {"content": "A"}]},
    {"docs": [{"text": "p"}, {"text": "q"}], "best": {"text": "A"}, "others": ["B", "C"]},
]
ALL = [*MAPPED, *(row for rows in GOOD.values() for row in rows)]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"character": "Socrates", "samples": "turn", "history_turns": 2},
    {"character": "Socrates", "system": "Be.", "speaker_names": "always"},
    {"samples": "turn", "history_tokens": 5, "window": "anchored", "memories": {"count": 2}},
    {"pairs": {"mode": "all", "margin": 0.3}},
    {"pairs": {"mode": "best_all"}, "character": "assistant"},
    {"fields": {"context": "context", "target": "turns[1].content"}},
    {
        "fields": {
            "query": "docs[0].text",
            "passages": "docs[].text",
            "chosen": "best.text",
            "rejected": "others",
        }
    },
    *({"format": name, "character": "Socrates"} for name in FORMATS),
]

CONTROL = "".join(map(chr, range(32))) + "\x7f\x85\x9b\u200b\u2028\u202e\ufeff\ufffe\ufffd"
KEYS = sorted({key for row in ALL for key in row} | {"role", "content", "text", "from", "value"})
ROLES = ["system", "user", "assistant", "tool", "human", "gpt", "function_call", "Socrates", "旁白"]


def value(draw: random.Random) -> Any:
    """What might stand anywhere."""
    kind = draw.randrange(14)
    if kind < 4:
        return draw.choice(["", " ", "\n\u3000", "nan", "NaN", "null", "1", "[]", "{}", "\u200b"])
    if kind < 6:
        return draw.choice([None, True, False, 0, -1, 1.5, 1e308, -1e308, 10**400, 2**63])
    if kind == 6:
        return draw.choice(ROLES)
    if kind == 7:
        return "".join(draw.choice(CONTROL) for _ in range(draw.randrange(1, 9)))
    if kind == 8:
        return draw.choice(["\ud800", "a\udfff", "\ud83d\ude00", "\U0001f600"])
    if kind == 9:
        return draw.choice(
            ["a", "学", "🙂", " ", "\n", "<think>", "e\u0301", "A: b\n", "(", "*"]
        ) * (draw.choice([1, 80, 3000]))
    if kind == 10:
        return draw.choice([[], {}, [[]], [{}], [None], {"": ""}, {"text": "x"}, ["x", "x"]])
    if kind == 11:
        return [value(draw) for _ in range(draw.randrange(4))]
    if kind == 12:
        return {draw.choice(KEYS): value(draw) for _ in range(draw.randrange(4))}
    nested: Any = draw.choice([1, "x", None])
    for _ in range(draw.choice([3, 30, 120])):
        nested = [nested] if draw.random() < 0.5 else {draw.choice(KEYS): nested}
    return nested


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list of a row, and each of its keys."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, part in inner:
        yield tree, key
        if isinstance(part, dict | list):
            yield from nodes(part)


def mutated(row: Row, draw: random.Random) -> Row:
    """A copy with a few things changed."""
    copy: Row = json.loads(json.dumps(row))
    for _ in range(draw.choice([1, 1, 1, 2, 3, 6])):
        places = list(nodes(copy))
        if not places:
            break
        holder, key = draw.choice(places)
        kind = draw.randrange(7)
        if kind < 3:
            holder[key] = value(draw)
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[draw.choice(KEYS)] = holder.pop(key)
        elif kind == 5 and isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif isinstance(holder, dict):
            holder[draw.choice(KEYS)] = value(draw)
        else:
            draw.shuffle(holder)
    return copy


def torn(line: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut out, put in, or stood elsewhere."""
    content = bytearray(line)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at : at + draw.choice([1, 1, 3, 40])]
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            content[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice([1, 4])))
        elif kind == 4:
            extra = [
                b'"',
                b"}",
                b"[" * 400,
                b"\\ud800",
                b"NaN",
                b"\0",
                b"9" * 4400,
                b"\xef\xbb\xbf",
            ]
            content[at:at] = draw.choice(extra)
        else:
            content[at:at] = content[at // 2 : at]
    return bytes(content).replace(b"\n", b" ")


def as_line(row: Row, draw: random.Random) -> bytes:
    """Half of them with escapes, without which no half of a surrogate pair can be written."""
    try:
        return json.dumps(row, ensure_ascii=draw.random() < 0.5).encode()
    except UnicodeEncodeError:
        return json.dumps(row).encode()


# -- what must hold -----------------------------------------------------------------------------


def check_complaint(error: DataError) -> None:
    assert type(error).exit_code == 2
    assert error.what.strip() and error.where.strip() and error.hint.strip(), repr(str(error))
    lines = str(error).split("\n")
    assert len(lines) == 3, lines
    for line in lines:
        assert line.isprintable(), ascii(line)
        assert len(line) <= 600, len(line)


def speaks(message: Message) -> bool:
    return bool(message.content.strip() or message.tool_calls)


def check_records(records: list[Record]) -> None:
    for record in records:
        opening = record.opening
        assert all(message.role != "system" for message in opening[1:]), opening
        assert all(len(key) == 16 for key in record.kin) and record.kin
        assert all(passage.strip() for passage in record.passages or ())
        if isinstance(record, Dialogue):
            assert record.trained and record.trained == tuple(sorted(set(record.trained)))
            assert record.trained[-1] == len(record.messages) - 1
            for turn in record.trained:
                assert record.messages[turn].role == "assistant"
                assert speaks(record.messages[turn])
                assert any(m.role == "user" and m.content.strip() for m in opening[:turn])
        else:
            assert isinstance(record, Preference)
            assert bool(record.pairs) == (record.label is None)
            assert any(m.role == "user" for m in record.prompt)
            for better, worse in record.pairs:
                one, other = record.answers[better], record.answers[worse]
                assert speaks(one) and speaks(other)
                assert (one.content.strip(), one.tool_calls) != (
                    other.content.strip(),
                    other.tool_calls,
                )
            assert any(better == record.best for better, _ in record.pairs) == bool(record.pairs)
        for message in opening:
            message.content.encode()
            json.dumps(message.to_template(), ensure_ascii=False, allow_nan=False).encode()
        json.dumps(record.tools, ensure_ascii=False, allow_nan=False).encode()


Problems = dict[str, str]


def outcome(raw: bytes, file: File, data: Data, place: Place, problems: Problems) -> str:
    """What became of a row, well-formed whichever it is; or else a problem, the first of a kind."""
    try:
        try:
            name, records = records_of(place, raw, file, data, len)
        except DataError as error:
            check_complaint(error)
            assert error.where.startswith("rows.jsonl:7"), error.where
            return "refused"
        check_records(records)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} at {Path(at.filename).name}: {at.line}"
        problems.setdefault(kind, f"{error}\nrow: {raw[:2000]!r}")
        return "a problem"
    return name if records else "silent"


def assert_none(problems: Problems) -> None:
    told = [f"{kind}\n{example}" for kind, example in problems.items()]
    if told:
        pytest.fail("\n\n".join(told), pytrace=False)


def setting(number: int) -> tuple[Data, File]:
    data = Data(path="rows.jsonl", **SETTINGS[number])
    (file,) = find_files(data.sources, "data.path")
    return data, file


ROWS = 800  # of each kind, for each of the settings


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_rows(number: int) -> None:
    data, file = setting(number)
    draw = random.Random(number)
    seen: Counter[str] = Counter()
    problems: Problems = {}
    for count in range(2 * ROWS):
        row = MAPPED[number - 6] if number in (6, 7) and count % 3 == 0 else draw.choice(ALL)
        line = as_line(mutated(row, draw) if count % 2 else row, draw)
        if count % 2 == 0:
            line = torn(line, draw)
        # Where it stands matters: at the very start of a file a byte order mark is no fault.
        seen[outcome(line, file, data, Place(file.path, 7, draw.choice([0, 99])), problems)] += 1
    assert_none(problems)
    assert sum(seen.values()) == 2 * ROWS
    assert seen["refused"] > 100
    assert len(seen) > 1, "no row was understood: nothing was tested"


def test_all_formats_are_there_and_good() -> None:
    assert set(GOOD) == set(FORMATS)
    problems: Problems = {}
    for name, rows in GOOD.items():
        for row in rows:
            data, file = setting(0 if row in GOOD["dialogue"][1:] else 2)
            line = json.dumps(row).encode()
            made = outcome(line, file, data, Place(file.path, 7, 1), problems)
            assert made in (name, "a problem")
    assert_none(problems)
    assert len(SETTINGS) * 2 * ROWS >= 20_000


@pytest.mark.parametrize("depth", [50, 250, 500])
@pytest.mark.parametrize("opened", ["[", '{"text":', '[{"content":'])
def test_deep_rows(depth: int, opened: str) -> None:
    data, file = setting(0)
    closed = {"[": "]", '{"text":': "}", '[{"content":': "}]"}[opened]
    part = opened * (depth // opened.count("{") if "{" in opened else depth)
    deep = f"{part}1{closed * (len(part) // len(opened))}"
    problems: Problems = {}
    for row in ALL:
        text = json.dumps(row)
        for key in row:
            line = json.dumps({**row, key: "@"}).replace('"@"', deep)
            outcome(line.encode(), file, data, Place(file.path, 7, 1), problems)
        line = f'{text[:-1]}, "x": {deep}}}'
        assert outcome(line.encode(), file, data, Place(file.path, 7, 1), problems)
    assert_none(problems)


# -- whole files --------------------------------------------------------------------------------


def whole_file(path: Path, **settings: Any) -> str:
    """Read, audited, grouped, split and rendered; refused rows are counted."""
    tokenizer = tokenizer_of("qwen3")
    answers = settings.pop("answers", "best")
    data = Data(path=str(path), on_bad_row="skip", max_length=100_000, **settings)
    try:
        found = survey(data, 0)
        prepared = prepare(found, tokenizer, data, answers=answers)
    except DataError as error:
        check_complaint(error)
        return "refused"
    ledger = prepared.ledger
    assert ledger.rows >= ledger.num_refused
    assert sum(ledger.formats.values()) + found.ledger.num_refused == ledger.rows
    for refusal in ledger.refused:
        check_complaint(DataError(refusal.what, where=refusal.place, hint=refusal.hint))
    for sequence in prepared.train.flat:
        assert sequence.is_target.any() and not sequence.is_target[0]
    json.loads(ledger.to_json())
    return "read"


def lines_of(draw: random.Random, count: int) -> list[bytes]:
    lines = []
    for number in range(count):
        row = draw.choice(ALL)
        line = as_line(mutated(row, draw) if number % 2 else row, draw)
        lines.append(torn(line, draw) if number % 5 == 4 else line)
    return lines


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_jsonl_files(tmp_path: Path, number: int) -> None:
    path = tmp_path / "rows.jsonl"
    for seed in range(3):
        draw = random.Random(f"{number} {seed}")
        path.write_bytes(b"\n".join(lines_of(draw, 60)))
        assert whole_file(path, **SETTINGS[number], answers="pairs" if seed == 1 else "best") in (
            "read",
            "refused",
        )
        if number < 6:
            assert whole_file(path, **SETTINGS[number]) == "read"


def test_json_lists(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    draw = random.Random(0)
    seen: Counter[str] = Counter()
    for number in range(60):
        rows = b",\n".join(as_line(mutated(draw.choice(ALL), draw), draw) for _ in range(12))
        content = b"[" + rows + b"]"
        path.write_bytes(torn(content, draw) if number % 3 == 0 else content)
        seen[whole_file(path)] += 1
    assert seen["read"] > 20
    assert seen["refused"]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_csv_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    mark = "," if suffix == "csv" else "\t"
    cells = ["q", "a", '"a, b"', '"two\nlines"', "", " ", '"', "é", "学", "NaN", "\0", '""', "\r"]
    draw = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(60):
        lines = [mark.join(draw.sample(["context", "target", "id", "history"], 4))]
        for _ in range(12):
            width = draw.choice([4, 4, 4, 4, 3, 5])
            lines.append(mark.join(draw.choice(cells) for _ in range(width)))
        content = "\r\n".join(["context,target,id,x".replace(",", mark), *lines]).encode()
        if draw.random() < 0.5:
            at = draw.randrange(len(content))
            content = content[:at] + draw.choice([b"\xff", b'"', b"", b"\n"]) + content[at + 1 :]
        path.write_bytes(content)
        seen[whole_file(path)] += 1
    assert seen["read"] > 20


def test_plays(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    parts = [
        *["Socrates: What is it?\n", "Meno: It is so.\n", "苏格拉底：「什么？」\n", "Meno:\n"],
        *["(Exit.)\n", "[Exit", "# Act\n", "---\n", "ACT I\n", "第一幕\n", "\n", "and so on\n"],
        *["*Socrates*: x\n", "Socrates (aside): y\n", ":", "：\n", "A" * 300 + ": b\n", "\0\n"],
        *["\x1b[2J: x\n", "\u2028", "Meno: Socrates: Meno:\n", "  ", "“", "」\n", "\r"],
    ]
    draw = random.Random(0)
    seen: Counter[str] = Counter()
    for number in range(150):
        content = "".join(draw.choice(parts) for _ in range(draw.randrange(1, 40))).encode()
        path.write_bytes(torn(content, draw) if number % 4 == 0 else content)
        samples = draw.choice(["dialogue", "turn"])
        seen[whole_file(path, character="Socrates", samples=samples)] += 1
    assert seen["read"] > 30
    assert seen["refused"]
