"""Records: rows that were understood."""

import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Kin = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a row stands: `line` counts from 1; `offset` is in bytes, -1 where a file's rows have
    none (Parquet, Arrow)."""

    file: Path
    line: int
    offset: int = -1

    def __str__(self) -> str:
        at = f" (byte {self.offset})" if self.offset >= 0 else ""
        return f"{self.file}:{self.line}{at}"


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user, assistant or tool."""

    role: str
    content: str
    thinking: str = ""
    """What an assistant thinks before it speaks."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str = ""
    """Of the tool whose result this is."""
    tool_call_id: str = ""

    def to_template(self) -> dict[str, Any]:
        """As chat templates know it."""
        known: dict[str, Any] = {
            "reasoning_content": self.thinking,
            "tool_calls": list(self.tool_calls),
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        given = {key: value for key, value in known.items() if value}
        return {"role": self.role, "content": self.content, **given}


@dataclass(frozen=True)
class Record:
    """What dialogues and preferences have in common.

    Attributes:
        kin: what it has in common with those that must stay with it: its query, its first exchange.
        place: of its row.
        tools: the tools that its prompt offers, as JSON schemas.
        passages: retrieved ones, for the last of the user's turns: none may have been found. None
            where a row is not of that kind.
        speakers: who speaks in a dialogue or a play, the character included.
    """

    kin: Kin
    place: Place
    tools: tuple[dict[str, Any], ...] = field(default=(), kw_only=True)
    passages: tuple[str, ...] | None = field(default=None, kw_only=True)
    speakers: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def opening(self) -> tuple[Message, ...]:
        """The messages that its first prompt begins with."""
        raise NotImplementedError

    @property
    def persona(self) -> str:
        """The system prompt, which names the persona; empty without one."""
        first = self.opening[0]
        return first.content if first.role == "system" else ""


@dataclass(frozen=True)
class Dialogue(Record):
    """Messages, and which of them are trained."""

    messages: tuple[Message, ...]
    trained: tuple[int, ...]

    @property
    def opening(self) -> tuple[Message, ...]:
        """See `Record`."""
        return self.messages


@dataclass(frozen=True)
class Preference(Record):
    """One prompt and several answers to it; or one answer that is labelled as good or bad."""

    prompt: tuple[Message, ...]
    answers: tuple[Message, ...]
    pairs: tuple[tuple[int, int], ...]
    """Which answer is preferred to which: indices of the better and the worse."""
    label: bool | None = None
    """Of a single answer: whether it is good."""

    @property
    def opening(self) -> tuple[Message, ...]:
        """See `Record`."""
        return self.prompt

    @cached_property
    def best(self) -> int:
        """The answer that none is preferred to."""
        worse = {worse for _, worse in self.pairs}
        return next((better for better, _ in self.pairs if better not in worse), 0)

    def role_of(self, answer: int) -> str:
        """`chosen` for one that is good or preferred to another, `rejected` for the others."""
        wanted = self.label or any(answer == better for better, _ in self.pairs)
        return "chosen" if wanted else "rejected"

    def preferred_to(self, answer: int) -> tuple[int, ...]:
        """The answers that this one is better than."""
        return tuple(worse for better, worse in self.pairs if better == answer)

    @property
    def is_ranking(self) -> bool:
        """Whether each two answers are a pair."""
        return 2 * len(self.pairs) == len(self.answers) * (len(self.answers) - 1)


@dataclass(frozen=True)
class Refusal:
    """A row that was left out, and why."""

    place: str
    what: str
    hint: str = ""

    @property
    def kind(self) -> str:
        """What is wrong, without what differs from row to row."""
        head, _, rest = self.what.partition(": ")
        if head in ("not valid JSON", "too long"):  # of several kinds, told by what follows
            head = f"{head}: {rest.partition(':')[0]}"
        return re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"|[\d,]+", "…", head)

    @property
    def too_long(self) -> bool:
        """Not wrong, but longer than `data.max_length`."""
        return self.what.startswith("too long: ")


@dataclass
class Ledger:
    """What became of the rows."""

    MOST = 1000
    OF_A_KIND = 3
    """So many refusals are kept: the first ones, and the first ones of each kind; all are
    counted."""

    rows: int = 0
    refused: list[Refusal] = field(default_factory=list[Refusal])
    num_refused: int = 0
    kinds: dict[str, int] = field(default_factory=dict[str, int])
    """How many were refused, by what is wrong with them."""
    formats: dict[str, int] = field(default_factory=dict[str, int])
    notes: list[str] = field(default_factory=list[str])
    findings: dict[str, "Finding"] = field(default_factory=dict)  # pyright: ignore[reportUnknownVariableType]
    """What looks wrong in rows that were kept."""
    scripts: dict[str, "Finding"] = field(default_factory=dict)  # pyright: ignore[reportUnknownVariableType]
    """Rows by the script that their answers are written in."""

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Ledger":
        """What `to_json` wrote."""
        values = json.loads(text)
        for name in ("findings", "scripts"):
            values[name] = {
                kind: Finding(f["count"], [(place, shown) for place, shown in f["examples"]])
                for kind, f in values[name].items()
            }
        values["refused"] = [Refusal(**refusal) for refusal in values["refused"]]
        return Ledger(**values)

    def refuse(self, refusal: Refusal) -> None:
        """One more row that was left out."""
        self.num_refused += 1
        kind = refusal.kind
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if len(self.refused) < self.MOST or self.kinds[kind] <= self.OF_A_KIND:
            self.refused.append(refusal)


@dataclass
class Finding:
    """One kind of trouble: how many rows have it, and the first few."""

    MOST = 3

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Place and excerpt."""

    def add(self, place: str, text: str) -> None:
        """One more row."""
        self.count += 1
        if len(self.examples) < self.MOST:
            self.examples.append((place, text))

    def merge(self, other: "Finding") -> None:
        """Those of later rows as well."""
        self.count += other.count
        self.examples += other.examples[: self.MOST - len(self.examples)]
