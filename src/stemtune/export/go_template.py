"""A chat template in Ollama's language: found by looking at what training's own template writes.

Ollama renders with Go's text/template, https://github.com/ollama/ollama/blob/main/docs/template.md.
What a template puts around each turn, and where it puts a system prompt, shows in a few short
conversations; the result is compared with the template's own writing of longer ones.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError

from stemtune.errors import ModelError

Turn = tuple[str, str]
Write = Callable[[Seq[Turn], bool], str]
"""Writes a conversation; true: up to where an answer begins. Raises TemplateError."""

SYSTEM: Turn = ("system", "told-3c55")
ASKED: Turn = ("user", "asked-6f1d")
SAID: Turn = ("assistant", "said-90ab")
AGAIN: Turn = ("user", "again-17e2")
LONG = (
    'Mr. 苏格拉底:\n\n- {{ what }} is "virtue"?\n- I don\'t know 🦉',
    "It's 3 < 4 & so on.\nNo?",
)
U, V, S = ("user", LONG[0]), ("user", "Why?"), ("system", f"You are Socrates.\n{LONG[1]}")
A, B = ("assistant", LONG[1]), ("assistant", "So be it.")
CHECKED: list[list[Turn]] = [
    [U],
    [S, U],
    [U, A, V],
    [S, V, B, U],
    [U, A, V, B, U],
    [S, U, A, V, B, V],
    [A, U],
    [S, A, U],
]


@dataclass(frozen=True)
class Turns:
    """What a template writes around texts.

    Attributes:
        start: before all, where no system prompt is given.
        place: where a system prompt stands: in a turn of its own, in the user's first or last turn,
            or nowhere, if the template takes none.
        answer: what an answer begins behind.
    """

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    place: Literal["turn", "first", "last", "nowhere"]

    def write(self, turns: Seq[Turn]) -> str:
        """The prompt, as the Go template writes it."""
        system = "\n\n".join(text for role, text in turns if role == "system")
        written = "" if system and self.place == "turn" else self.start
        for number, (role, text) in enumerate(turns):
            if role == "user":
                here = number <= 1 if self.place == "first" else number == len(turns) - 1
                told = system if here and self.place in ("first", "last") else ""
                head = self.system[0] + told + self.system[1] if told else ""
                written += self.user[0] + head + text + self.user[1]
            elif role == "assistant":
                written += self.assistant[0] + text + self.assistant[1]
            elif self.place == "turn":
                written += self.system[0] + text + self.system[1]
        return written + self.answer

    def in_go(self) -> str:
        """The template."""
        start, answer = _literal(self.start), _literal(self.answer)
        user, assistant = _around(self.user, ".Content"), _around(self.assistant, ".Content")
        if self.place in ("turn", "nowhere"):
            head = (
                f"{{{{ if not .System }}}}{start}{{{{ end }}}}" if self.place == "turn" else start
            )
            head = head if self.start else ""
            told = f'{{{{ else if eq .Role "system" }}}}{_around(self.system, ".Content")}'
            told = told if self.place == "turn" else ""
            return (
                f'{head}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
                f'{{{{ else if eq .Role "assistant" }}}}{assistant}{told}'
                f"{{{{ end }}}}{{{{ end }}}}{answer}"
            )
        here = "(le $i 1)" if self.place == "first" else "(eq (len (slice $.Messages $i)) 1)"
        told = f"{{{{ if and $.System {here} }}}}{_around(self.system, '$.System')}{{{{ end }}}}"
        before, after = (_literal(part) for part in self.user)
        return (
            f'{start}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}'
            f"{before}{told}{{{{ .Content }}}}{after}"
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{answer}'
        )


# A prompt that is the last text alone.
LAST_TEXT = (
    "{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}{{ .Content }}"
    "{{ end }}{{ end }}"
)


def _around(parts: tuple[str, str], name: str) -> str:
    return f"{_literal(parts[0])}{{{{ {name} }}}}{_literal(parts[1])}"


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def turns_of(write: Write, where: str) -> Turns:
    """What a template writes around turns.

    Raises:
        ModelError: it writes what Ollama's language, or this way to it, can't.
    """
    try:
        found = _turns(write)
    except (_Unlike, TemplateError) as error:
        raise _refusal(str(error), where) from None
    for turns in CHECKED:
        if found.place == "nowhere" and turns[0][0] == "system":
            continue
        try:
            expected = write(turns, True)
        except TemplateError:
            continue  # an order of roles that it does not take
        if found.write(turns) != expected:
            roles = ", ".join(role for role, _ in turns)
            raise _refusal(f"its turns ({roles}) depend on more than roles and order", where)
    return found


class _Unlike(Exception):
    """A template of another kind."""


def _refusal(reason: str, where: str) -> ModelError:
    hint = (
        "`stemtune export gguf` writes the file with its own template, for llama.cpp and LM Studio"
    )
    return ModelError(f"no template for Ollama: {reason}", where=where, hint=hint)


def _turns(write: Write) -> Turns:
    start, asked = _pieces(write, [ASKED], True)
    _, closed = _pieces(write, [ASKED], False)
    _, answered, again, last = _pieces(write, [ASKED, SAID, AGAIN], True)
    ended = _pieces(write, [ASKED, SAID], False)[2]
    if last != asked:
        raise _Unlike("the last turn is written unlike the first")
    after_user = _shared(closed, answered, asked)
    after_answer = _shared(ended, again)
    if not start.endswith(again[len(after_answer) :]):
        # What a next turn begins with stands behind an answer.
        shared = _shared(start[::-1], again[::-1])
        after_answer = again[: len(again) - len(shared)]
    user = (again[len(after_answer) :], after_user)
    start = start[: len(start) - len(user[0])]
    assistant = (answered[len(after_user) :], after_answer)
    system, place = _system(write, start, user, asked)
    return Turns(start, system, user, assistant, asked[len(after_user) :], place)


def _shared(*texts: str) -> str:
    """What all of them begin with."""
    same = next(
        (i for i, letters in enumerate(zip(*texts, strict=False)) if len({*letters}) > 1), None
    )
    return min(texts, key=len)[:same]


def _system(
    write: Write, start: str, user: tuple[str, str], asked: str
) -> tuple[tuple[str, str], Literal["turn", "first", "last", "nowhere"]]:
    try:
        before, between, last = _pieces(write, [SYSTEM, ASKED], True)
        whole = write([SYSTEM, ASKED, SAID, AGAIN], True)
    except TemplateError:
        return ("", ""), "nowhere"
    if last != asked:
        raise _Unlike("a system prompt changes what stands behind a question")
    if between.endswith(user[0]) and whole.index(SYSTEM[1]) < whole.index(ASKED[1]):
        return (before, between[: len(between) - len(user[0])]), "turn"
    if not before.startswith(start + user[0]):
        raise _Unlike("the system prompt stands in no turn")
    told = (before[len(start + user[0]) :], between)
    in_first = whole.index(SYSTEM[1]) < whole.index(ASKED[1])
    return told, "first" if in_first else "last"


def _pieces(write: Write, turns: list[Turn], prompt: bool) -> list[str]:
    """What is written before, between and behind the texts of turns.

    Raises:
        _Unlike: they do not stand there once each, in their order.
    """
    rest = write(turns, prompt)
    pieces: list[str] = []
    for _, text in turns:
        if rest.count(text) != 1:
            raise _Unlike("texts are not written once each, in their order")
        piece, _, rest = rest.partition(text)
        pieces.append(piece)
    return [*pieces, rest]
