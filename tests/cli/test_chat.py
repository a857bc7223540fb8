"""`stemtune chat`, as a person and as a script use it."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stemtune as st
from stemtune.chat import Chat
from stemtune.cli.chat import chat as command
from stemtune.cli.reply import clean
from stemtune.cli.talk import _Talk, parse_number
from stemtune.cli.terminal import is_open, without_marks
from stemtune.data.formats import to_records
from stemtune.data.records import Dialogue, Place
from stemtune.errors import ConfigError
from stemtune.sampling import Sampling
from tests.cli.command import Outcome, refused, stemtune_here
from tests.runs import IGNORED, make_config, write_rows

pytestmark = IGNORED
ANSWERS = {"What is virtue?": "I know not.", "Can it be taught?": "Let us see, my friend."}
GREEDY = ("--temperature", "0", "--repetition-penalty", "1", "--max-new-tokens", "24")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run that knows two answers by heart."""
    folder = tmp_path_factory.mktemp("by-heart")
    overrides = ["train.max_steps=60", "train.learning_rate=0.02", "train.batch_size=2"]
    config = make_config(folder, tiny_base, *overrides, "data.system=You are Socrates.")
    rows = [{"context": question, "target": answer} for question, answer in ANSWERS.items()]
    write_rows(folder / "rows.jsonl", rows)
    return st.train(config).output_dir


def chat(run: Path, *arguments: str, stdin: str = "") -> Outcome:
    given = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    with patch.object(sys, "stdin", given):
        return stemtune_here("chat", run, *GREEDY, *arguments, cwd=run)


# -- scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (("--prompt", "What is virtue?"), ""),
        (("--prompt", "-"), "What is virtue?\n"),
        ((), "What is virtue?\n"),
    ],
)
def test_one_question(run: Path, arguments: tuple[str, ...], stdin: str) -> None:
    outcome = chat(run, *arguments, stdin=stdin)
    assert (outcome.code, outcome.out) == (0, "I know not.\n"), outcome.err


def test_rows_from_a_pipe(run: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "What is virtue?"},
        {"query": "Can it be taught?", "passages": ["A lamp.", {"text": "The sea."}]},
        {
            "messages": [
                {"role": "user", "content": "What is virtue?"},
                {"role": "assistant", "content": "I know not."},
                {"role": "user", "content": "Can it be taught?"},
            ]
        },
    ]
    outcome = chat(run, "--json", stdin="\n".join(map(json.dumps, rows)) + "\n\n")
    assert outcome.code == 0, outcome.err
    replies = [json.loads(line) for line in outcome.out.splitlines()]
    assert replies[0].pop("seconds") >= 0
    tokenizer = st.load_model(st.load_config(run / "config.yaml").model)[1]
    asked = [
        {"role": "system", "content": "You are Socrates."},
        {"role": "user", "content": "What is virtue?"},
    ]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    answer = tokenizer("I know not.<|im_end|>")["input_ids"]
    assert replies[0] == {
        "reply": "I know not.",
        "prompt_tokens": len(prompt),
        "new_tokens": len(answer),
        "stopped_by": "end",
    }
    assert replies[1]["passages"] == ["A lamp.", "The sea."]
    # Each row is a conversation of its own: the third is longer by what it brings along.
    told = [*asked, *rows[2]["messages"][1:]]
    whole = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=False)
    assert replies[2]["prompt_tokens"] == len(whole)


def test_passages_from_a_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "sea.txt").write_text("The sea is deep.\n\nHorses run.\n")
    arguments = ("--passages", str(tmp_path / "sea.txt"), "--json", "--prompt", "The sea?")
    assert json.loads(chat(run, *arguments).out)["passages"] == ["The sea is deep."]


def test_compare(run: Path) -> None:
    outcome = chat(run, "--compare", "--prompt", "What is virtue?")
    tuned, _, base = outcome.out.partition("\nbase> ")
    assert tuned == "tuned> I know not."
    figures = json.loads(chat(run, "--compare", "--json", "--prompt", "What is virtue?").out)
    assert figures["reply"] == "I know not."
    assert figures["base_reply"] == base.removesuffix("\n") != "I know not."
    alone = chat(run, "--base", "--prompt", "What is virtue?")
    assert alone.out == base


def test_a_system_prompt_of_ones_own(run: Path) -> None:
    def length(*arguments: str) -> int:
        outcome = chat(run, "--json", "--prompt", "Hm?", *arguments)
        return int(json.loads(outcome.out)["prompt_tokens"])

    assert length("--system", "You are Socrates.") == length()
    assert length("--system", "") < length() < length("--system", "You are Socrates. 有朋自远方来")


@pytest.mark.parametrize(
    ("arguments", "stdin", "what"),
    [
        (("--prompt", ""), "", "the prompt is empty"),
        (("--prompt", "-"), " \n", "the prompt is empty"),
        ((), "", "the prompt is empty"),
        (("--base", "--compare", "--prompt", "x"), "", "one of --base and --compare"),
        (("--json",), '{"prompt": "a"}\nplain\n', "not valid JSON"),
        (("--json",), '{"answer": "a"}\n', "nothing is asked"),
        (("--json",), '{"messages": [{"role": "assistant", "content": "a"}]}', "it does not end"),
        (("--passages", "nowhere.txt", "--prompt", "x"), "", "can't be read"),
    ],
)
def test_refused_before_weights_load(
    run: Path, arguments: tuple[str, ...], stdin: str, what: str
) -> None:
    outcome = chat(run, *arguments, stdin=stdin)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {what}") and "hint: " in outcome.err
    assert "loaded in" not in outcome.err


def test_a_row_is_named_by_its_line(run: Path) -> None:
    outcome = chat(run, "--json", stdin='{"prompt": "a"}\nplain\n')
    refused(outcome, 2, "not valid JSON", "<stdin>:2 (byte 16)")


# -- what is typed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "goes_on", "meant"),
    [
        ("a", False, "a"),
        ("a\\", True, None),
        ("a\\\nb", False, "a\nb"),
        ('"""', True, None),
        ('"""a', True, None),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\na\n\nb\n"""', False, "a\n\nb"),
        ('say """', False, 'say """'),
        ("", False, ""),
    ],
)
def test_several_lines(text: str, goes_on: bool, meant: str | None) -> None:
    assert is_open(text) == goes_on
    assert meant is None or without_marks(text) == meant


def test_every_setting_of_sampling_is_an_option_with_bounds() -> None:
    options = get_type_hints(command, include_extras=True)
    for name in Sampling.__dataclass_fields__:
        kind, option = options[name].__args__[0], options[name].__metadata__[0]
        lowest = parse_number(str(option.min), kind, option.min, option.max)
        assert lowest == option.min
        with pytest.raises(ConfigError, match="out of bounds"):
            parse_number(str(option.min - 1), kind, option.min, option.max)
        for text in ("warm", "nan" if kind is float else "0.5"):
            with pytest.raises(ConfigError, match=r"no number|out of bounds"):
                parse_number(text, kind, option.min, option.max)


def test_a_seed_can_be_taken_back() -> None:
    assert parse_number("none", int | None, 0, None) is None
    assert parse_number("7", int | None, 0, None) == 7
    with pytest.raises(ConfigError, match="'none' is no number"):
        parse_number("none", float, 0, None)


def test_what_a_model_writes_moves_no_cursor() -> None:
    with patch("stemtune.cli.reply.out") as out:
        out.is_terminal = True
        assert clean("a\x1b[2J\rb\tc\n\u3000好\x9b1m") == "a[2Jb\tc\n\u3000好1m"
        out.is_terminal = False
        assert clean("a\x1b[2J") == "a\x1b[2J"


class Terminal:
    """The command at a terminal of 100 columns."""

    def __init__(self, cwd: Path, *arguments: str | Path) -> None:
        self.end, inner = pty.openpty()
        environment = {
            **os.environ,
            "TERM": "xterm",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "STEMTUNE_CACHE": str(cwd / "cache"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stemtune", *map(str, arguments)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
        os.close(inner)
        self.shown = ""

    def until(self, pattern: str) -> str:
        """All that was shown since, up to a pattern."""
        deadline = time.monotonic() + 40
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} was not shown:\n{self.shown}"
            self.shown += self._read()
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def _read(self) -> str:
        try:
            text = os.read(self.end, 4096).decode(errors="replace")
        except OSError:  # it has ended
            text = ""
        assert text, f"it ended:\n{self.shown}"
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", text)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def enter(self, text: str) -> None:
        """Typed at the prompt, which has to be there."""
        self.until("you>")
        self.type(f"{text}\r")

    def code(self) -> int:
        return self.process.wait(timeout=60)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)


@pytest.fixture
def terminal_of(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Opens a terminal in which `stemtune chat` runs; all are closed in the end."""
    with ExitStack() as opened:

        def start(*arguments: str | Path) -> Terminal:
            terminal = Terminal(tmp_path, "chat", *arguments)
            opened.callback(terminal.close)
            return terminal

        yield start


@pytest.fixture
def terminal(run: Path, terminal_of: Callable[..., Terminal]) -> Terminal:
    return terminal_of(run, *GREEDY)


def test_a_session(terminal: Terminal, run: Path, tmp_path: Path) -> None:
    terminal.enter("/undo")
    terminal.until("error: nothing was said yet")
    terminal.enter("What is virtue?")
    terminal.until(r"\nI know not\.\n")
    terminal.enter("/regne")
    terminal.until("there is no command /regne\nhint: did you mean /regen")
    terminal.enter("/temp 1")
    terminal.until("there is no command /temp\nhint: did you mean /temperature")
    terminal.enter("/regen")
    terminal.until("the temperature is 0: it will be the same\nI know not")
    terminal.enter("/prompt")
    shown = terminal.until(r"\(\d+ tokens\)")
    assert "<|im_start|>user\nWhat is virtue?<|im_end|>\n<|im_start|>assistant\n" in shown
    terminal.enter("/save said.jsonl")
    terminal.until(r"saved: said\.jsonl")
    terminal.enter("/top-p 0.9")
    terminal.until("top_p 0.9")
    terminal.enter("/temperature 7")
    terminal.until(r"temperature 7\.0")
    terminal.enter("/top_p 2")
    terminal.until("2 is out of bounds\nhint: a number from 0 to 1")
    terminal.enter("/max_new_tokens 5")
    terminal.until("max_new_tokens 5")
    terminal.enter('"""Can it\rbe taught?"""')
    terminal.until(r'taught\?"""\n')
    terminal.enter("/load said.jsonl")
    terminal.until("3 messages")
    terminal.enter("/system")
    terminal.until("You are Socrates")
    terminal.enter("/help")
    terminal.until("/exit")
    terminal.until("you>")
    terminal.type("half a line\x03")
    terminal.until("Ctrl-C once more")
    terminal.until("you>")
    terminal.type("\x04")
    assert terminal.code() == 0
    (row,) = (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()
    data = st.load_config(run / "config.yaml").data
    (record,) = to_records(json.loads(row), Place(Path("said.jsonl"), 1), data)[1]
    assert isinstance(record, Dialogue)
    said = [(message.role, message.content) for message in record.messages]
    assert said[1:] == [("user", "What is virtue?"), ("assistant", "I know not.")]
    history = tmp_path / "cache" / "chat_history"
    assert "+What is virtue?" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0


def that_never_ends(run: Path, folder: Path) -> Path:
    """A copy of the run's adapter, on a copy of its base that never ends a turn: that token's logit
    is 0, and of hundreds of random ones the largest is not."""
    copy = folder / "endless"
    shutil.copytree(run / "adapter", copy)
    settings = json.loads((copy / "stemtune.json").read_text(encoding="utf-8"))
    base = shutil.copytree(settings["model"]["base"], folder / "endless-base")
    settings["model"]["base"] = str(base)
    (copy / "stemtune.json").write_text(json.dumps(settings), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(base)
    end = AutoTokenizer.from_pretrained(base).eos_token_id
    with torch.no_grad():
        model.get_output_embeddings().weight[end] = 0
    model.save_pretrained(base)
    return copy


def test_ctrl_c_stops_a_reply(
    run: Path, tmp_path: Path, terminal_of: Callable[..., Terminal]
) -> None:
    copy = that_never_ends(run, tmp_path)
    greedy = ["--base", "--temperature", "0", "--max-new-tokens", "2000000"]
    terminal = terminal_of(copy, *greedy)
    terminal.enter("Can it be taught?")
    terminal.until(r"taught\?\n\s*\S")  # it has begun
    terminal.interrupt()
    terminal.until("what was said so far is kept")
    terminal.until("you>")
    terminal.type("/undo\r")
    terminal.until("taken back: Can it be taught")


def test_ctrl_c_before_a_reply_begins(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says of the conversation is what is kept of it."""
    session = Chat(run, Sampling(temperature=0, max_new_tokens=24))
    talk = _Talk(session, get_type_hints(command, include_extras=True), 5, compare=False)
    real = session._stream

    def stopped(after: int) -> Any:
        def stream(exchange: Any) -> Iterator[str]:
            for number, piece in enumerate(real(exchange)):
                if number == after:
                    raise KeyboardInterrupt
                yield piece

        return stream

    def told(text: str, after: int) -> str:
        monkeypatch.setattr(session, "_stream", stopped(after))
        talk.take(text)
        return capsys.readouterr().err

    assert "nothing was said yet, and the question is not kept" in told("What is virtue?", 0)
    assert [message.role for message in session.messages] == ["system"]
    assert "what was said so far is kept" in told("What is virtue?", 1)
    assert [message.role for message in session.messages] == ["system", "user", "assistant"]
    said = session.messages
    assert "nothing was said yet" in told("/regen", 0)
    assert session.messages == said


def test_two_replies_side_by_side_and_ctrl_c_twice(
    run: Path, terminal_of: Callable[..., Terminal]
) -> None:
    terminal = terminal_of(run, "--compare", *GREEDY)
    terminal.enter("What is virtue?")
    assert re.search(r"base {20,}tuned", terminal.until("tuned"))
    terminal.until("I know not")
    terminal.until("you>")
    terminal.type("\x03")
    terminal.until("Ctrl-C once more")
    terminal.until("you>")
    terminal.type("\x03")
    terminal.until("you>")  # once more as it was, and then nothing
    assert terminal.code() == 0
