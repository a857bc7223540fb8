"""A conversation in a terminal: what is said, and commands."""

import difflib
import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from rich.text import Text

from stemtune.cache import cache_folder
from stemtune.chat import Chat
from stemtune.cli.common import err
from stemtune.cli.reply import clean, show, show_both
from stemtune.data.formats import messages_of
from stemtune.data.memories import read_passages
from stemtune.data.read import parse_line, read_lines
from stemtune.data.row import Row
from stemtune.errors import ConfigError, DataError, DiskError, StemtuneError, printable
from stemtune.sampling import Sampling

NONE = "none"


@dataclass(frozen=True)
class Command:
    """What follows the slash and the name is its argument."""

    run: Callable[[str], None]
    argument: str
    help: str


def talk(
    session: Chat, annotations: dict[str, Any], passage_count: int, *, compare: bool = False
) -> None:
    """Read, answer, until Ctrl-D.

    Args:
        annotations: of the command line's options, by name: those of `Sampling` are commands, too.
        passage_count: how many passages are retrieved for a question.
    """
    from stemtune.cli.terminal import line_editor

    conversation = _Talk(session, annotations, passage_count, compare)
    names = [f"/{name}" for name in conversation.commands]
    read = line_editor("you> ", names, cache_folder() / "chat_history")
    err.print("[dim]/help lists the commands; Ctrl-C stops a reply, Ctrl-D ends[/dim]")
    interrupted = False
    while not conversation.ended:
        try:
            text = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            err.print("[dim]Ctrl-C once more, or Ctrl-D, ends[/dim]")
            continue
        interrupted = False
        try:
            conversation.take(text)
        except StemtuneError as error:
            err.print(f"error: {error}", markup=False)


class _Talk:
    def __init__(
        self, session: Chat, annotations: dict[str, Any], passage_count: int, compare: bool
    ) -> None:
        self.session, self.passage_count, self.compare = session, passage_count, compare
        self.ended = False
        self.commands = {
            "reset": Command(self._reset, "", "forget the conversation"),
            "undo": Command(self._undo, "", "take back the last question and its reply"),
            "regen": Command(self._regen, "", "another reply to the last question"),
            "system": Command(self._system, "[TEXT]", "show or set the system prompt; `none`"),
            "save": Command(self._save, "FILE", "add the conversation to a JSONL file, a row"),
            "load": Command(self._load, "FILE", "go on from the last row of such a file"),
            "passages": Command(
                self._passages, "[FILE or TEXT]", "show or give what answers rely on; `none`"
            ),
            "memories": Command(self._memories, "", "show what was remembered last"),
            "prompt": Command(self._prompt, "[TEXT]", "show the last prompt, or that of a text"),
        }
        for setting in fields(Sampling):
            kind, option = get_args(annotations[setting.name])
            run = _setter(session, setting.name, kind, option)
            self.commands[setting.name] = Command(run, "[NUMBER]", _lower(option.help))
        self.commands["help"] = Command(self._help, "", "this")
        self.commands["exit"] = Command(self._exit, "", "end; Ctrl-D does, too")

    def take(self, text: str) -> None:
        """A command, or something that is said."""
        if not text.startswith("/"):
            if text.strip():
                self._answer(self.session.say(text))
            return
        name, *rest = re.split(r"\s+", text[1:].rstrip(), maxsplit=1)
        name = name.replace("-", "_")  # as on the command line
        command = self.commands.get(name)
        if command is None:
            begun = [one for one in self.commands if name and one.startswith(name)]
            near = begun or difflib.get_close_matches(name, list(self.commands), 1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them."
            what = f"there is no command /{printable(name)}"
            raise ConfigError(what, hint=f"{hint} To say it, begin with a blank")
        command.run(rest[0] if rest else "")

    def _answer(self, pieces: Generator[str]) -> None:
        before = self.session.messages
        try:
            if self.compare:
                show_both(self.session, pieces)
            else:
                show(pieces)
        except KeyboardInterrupt:
            pieces.close()
            print()
            kept = "what was said so far is kept: /regen, /undo"
            if self.session.messages is before:
                kept = "nothing was said yet, and the question is not kept"
            err.print(f"[dim](stopped; {kept})[/dim]")

    def _reset(self, _: str) -> None:
        self.session.reset()

    def _undo(self, _: str) -> None:
        err.print(f"taken back: {_line(self.session.undo())}", markup=False)

    def _regen(self, _: str) -> None:
        sampling = self.session.sampling
        if sampling.temperature == 0 or sampling.seed is not None:
            why = "the temperature is 0" if sampling.temperature == 0 else "a seed is set"
            err.print(f"[dim]{why}: it will be the same[/dim]")
        self._answer(self.session.regenerate())

    def _system(self, text: str) -> None:
        if text:
            self.session.set_system("" if text == NONE else text)
            return
        head = self.session.messages[:1]
        shown = head[0].content if head and head[0].role == "system" else "(none)"
        err.print(shown, markup=False)

    def _save(self, name: str) -> None:
        path = _path(name)
        if not any(message.role == "assistant" for message in self.session.messages):
            raise DataError("there is nothing to save yet", hint="say something first")
        row = {"messages": [message.to_template() for message in self.session.messages]}
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            what = f"can't write: {error.strerror}"
            raise DiskError(what, where=str(path), hint="choose another file") from None
        err.print(f"saved: {path}", markup=False)

    def _load(self, name: str) -> None:
        path = _path(name)
        try:
            with path.open("rb") as file:
                lines = list(read_lines(path, file))
        except OSError as error:
            what = f"can't be read: {error.strerror}"
            raise DataError(what, where=str(path), hint="a file that /save wrote") from None
        if not lines:
            raise DataError("the file holds no rows", where=str(path), hint="/save writes one")
        place, line = lines[-1]
        messages = messages_of(Row(parse_line(place, line), place), "messages")
        if messages[-1].role != "assistant":
            what = "the conversation ends with a question"
            raise DataError(what, where=str(place), hint="its last message is the assistant's")
        self.session.go_on_from(messages)
        err.print(f"{len(messages)} messages", markup=False)

    def _passages(self, text: str) -> None:
        if not text:
            last = self.session.last
            _numbered(None if last is None else last.prompt.passages, "no passages were given")
        elif text == NONE:
            self.session.passages = None
        elif re.search(r"\s", text):
            given = self.session.passages = [part.strip() for part in re.split(r"\n\s*\n", text)]
            _numbered(given, "")
        else:
            book = self.session.passages = read_passages(_path(text), self.passage_count)
            err.print(f"{len(book.memories)} passages, {self.passage_count} at most for a question")

    def _memories(self, _: str) -> None:
        last = self.session.last
        _numbered(None if last is None else last.prompt.memories, "nothing was remembered")

    def _prompt(self, text: str) -> None:
        last = self.session.last
        if not text and last is None:
            raise DataError("nothing was said yet", hint="/prompt TEXT shows that of a text")
        prompt = self.session.prompt_of(text) if text or last is None else last.prompt
        ids = self.session.renderer.prompt(prompt.messages)
        err.print(clean(str(self.session.renderer.tokenizer.decode(ids))), markup=False)
        err.print(f"[dim]({len(ids)} tokens)[/dim]")

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, command in self.commands.items():
            table.add_row(Text(f"/{name} {command.argument}"), Text(command.help))
        err.print(table)
        lines = 'Several lines: Alt-Enter, a backslash at the end, or """ around the whole.'
        err.print(lines, markup=False)

    def _exit(self, _: str) -> None:
        self.ended = True


def _setter(session: Chat, name: str, kind: Any, option: Any) -> Callable[[str], None]:
    """Shows or sets one of the sampling's values, within the bounds of its option."""

    def run(text: str) -> None:
        if text:
            value = parse_number(text, kind, option.min, option.max)
            session.sampling = replace(session.sampling, **{name: value})
        err.print(f"{name} {getattr(session.sampling, name)}", markup=False)

    return run


def parse_number(text: str, kind: Any, low: float, high: float | None) -> float | None:
    """A number of `kind` (int, float, or one of them and None) within bounds.

    Raises:
        ConfigError: it is none.
    """
    kinds = get_args(kind) or (kind,)
    if text == NONE and type(None) in kinds:
        return None
    whole = int in kinds
    bounds = f"{'a whole number' if whole else 'a number'} from {low:g}"
    bounds += "" if high is None else f" to {high:g}"
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise ConfigError(f"{printable(text)!r} is no number", hint=bounds) from None
    if not low <= value <= (value if high is None else high):
        raise ConfigError(f"{text} is out of bounds", hint=bounds)
    return value


def _numbered(texts: list[str] | None, otherwise: str) -> None:
    for number, text in enumerate(texts or [], 1):
        err.print(f"[{number}] {clean(text)}", markup=False)
    if not texts:
        err.print(otherwise)


def _path(name: str) -> Path:
    if not name:
        raise ConfigError("which file?", hint="put its name behind the command")
    return Path(name).expanduser()


def _line(text: str) -> str:
    return printable(text if len(text) < 60 else f"{text[:60]}…")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")
