"""A line editor: history, several lines, completion of commands."""

import sys
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

QUOTES = '"""'


def line_editor(prompt: str, commands: Seq[str], history: Path) -> Callable[[], str]:
    """A function that reads what somebody types, Enter at its end.

    Alt-Enter, a backslash at the end of a line, and three quotes around the whole go on in the next
    line. Ctrl-C raises KeyboardInterrupt, Ctrl-D in an empty line EOFError.

    Args:
        commands: that Tab completes at the beginning.
        history: a file that keeps what was typed, for the next time.
    """
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:  # pyright: ignore[reportUnusedFunction]
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:  # pyright: ignore[reportUnusedFunction]
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        prompt,
        multiline=True,  # Enter would begin a line, but for the keys above
        prompt_continuation="." * (len(prompt) - 1) + " ",
        key_bindings=keys,
        completer=WordCompleter(list(commands), sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,
        history=_history(history),
        output=create_output(sys.stderr),  # replies alone go to stdout
    )
    return lambda: without_marks(session.prompt())


def _history(file: Path) -> History:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)  # what is said is nobody else's business
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


def is_open(text: str) -> bool:
    """Whether a text goes on in the next line: it ends with a backslash, or opens quotes that are
    not closed."""
    if text.startswith(QUOTES):
        return not text[len(QUOTES) :].rstrip().endswith(QUOTES)
    return text.endswith("\\")


def without_marks(text: str) -> str:
    """What was meant: without quotes around it, without backslashes before line breaks."""
    inner = text.strip().removeprefix(QUOTES)
    if inner != text.strip():
        return inner.removesuffix(QUOTES).strip("\n")
    return text.replace("\\\n", "\n")
