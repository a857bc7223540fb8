"""Replies on stdout, as they come or side by side."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from stemtune.cli.common import err, out

if TYPE_CHECKING:
    from stemtune.chat import Chat

WIDE = 80  # columns, for two replies side by side
# What moves a cursor or colours a terminal; tabs and line breaks may.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(pieces: Iterator[str]) -> None:
    """A reply as it comes."""
    for piece in pieces:
        print(clean(piece), end="", flush=True)
    print()


def show_both(session: "Chat", pieces: Iterator[str]) -> None:
    """The base's reply and the tuned one: side by side where there is room, else in turn.

    Args:
        pieces: of the tuned one.
    """
    if out.is_terminal and out.width >= WIDE:
        with err.status("two replies …"):
            tuned = "".join(pieces)
            base = "".join(session.say_as_base())
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
        table.add_column("base", ratio=1)
        table.add_column("tuned", ratio=1)
        table.add_row(Text(clean(base)), Text(clean(tuned)))
        out.print(table)
        return
    print("tuned> ", end="")
    show(pieces)
    print("base> ", end="")
    show(session.say_as_base())


def clean(text: str) -> str:
    """Nothing that a model writes moves a terminal's cursor. Into a pipe it goes as it is."""
    return CONTROL.sub("", text) if out.is_terminal else text
