"""The work that every contestant gets: the very same token ids and target masks.

A dialogue can be trained in two forms. `windows`: one sample for each turn of the character, with
the whole dialogue so far as its context. `multiturn`: one sample for the whole dialogue, all of
the character's turns scored. Both forms of a workload hold the same turns, so also the same
targets in the same contexts, and their losses are equal. `single`: each turn behind the one before
it and nothing else, no template either: short rows that share nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROFILE_CHARACTERS = 1500
END_OF_TURN = "<|im_end|>"

Message = dict[str, str]


@dataclass(frozen=True)
class Sample:
    """Token ids, and which of them are predicted and scored."""

    input_ids: list[int]
    is_target: list[bool]


@dataclass(frozen=True)
class Work:
    """What a contestant computes in a step.

    Attributes:
        tokens: that go through the decoder, padding included.
        scored: positions that go through the head.
        pairs: (query, key) pairs that causal attention looks at, per layer and head.
    """

    tokens: int
    scored: int
    pairs: int

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens, self.scored + other.scored, self.pairs + other.pairs
        )


def default_data() -> Path:
    """The shared real dialogues where a checkout has them, else those that stemtune ships."""
    shared = ROOT.parent / "shared/data/socrates/dialogues.jsonl"
    return shared if shared.exists() else ROOT / "src/stemtune/starter/hamlet.jsonl"


def load_samples(
    data: Path, character: str | None, form: str, windows: int, tokenizer: Any
) -> list[Sample]:
    """The first `windows` turns of the character, dialogue by dialogue, in one of the two forms.

    Raises:
        ValueError: a form that does not exist, or data with fewer turns than asked for.
    """
    talks = conversations(data, character, form, windows)
    if form == "single":
        return [_single(messages, tokenizer) for messages in talks]
    return [_sample(messages, tokenizer, all_turns=form == "multiturn") for messages in talks]


def conversations(
    data: Path, character: str | None, form: str, windows: int
) -> list[list[Message]]:
    """The messages of each sample.

    Raises:
        ValueError: as `load_samples`.
    """
    rows = data.read_text(encoding="utf-8").splitlines()
    dialogues = [json.loads(row)["dialogue"] for row in rows if row.strip()]
    role = find_character(data, dialogues, character)
    cut = [_messages(data, role, turns) for turns in _first_turns(dialogues, role, windows)]
    if form == "multiturn":
        return cut
    if form not in ("windows", "single"):
        raise ValueError(f"form {form!r} is not one of: windows, multiturn, single")
    return [
        messages[end - 1 if form == "single" else 0 : end + 1]
        for messages in cut
        for end, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def find_character(data: Path, dialogues: list[list[Message]], wanted: str | None) -> str:
    """The role that is trained: the one asked for, or the one the file or its folder is named by.

    Raises:
        ValueError: no role has that name.
    """
    names = [wanted] if wanted else [data.stem, data.parent.name]
    roles = {turn["role"] for turns in dialogues for turn in turns}
    for name in names:
        for role in roles:
            if role.casefold() == name.casefold():
                return role
    raise ValueError(f"no role named {' or '.join(names)} in {data}; give --character")


def _first_turns(dialogues: list[list[Message]], role: str, windows: int) -> list[list[Message]]:
    """Dialogues up to the turn with which `windows` turns of the role are reached."""
    cut: list[list[Message]] = []
    left = windows
    for turns in dialogues:
        own = [at for at, turn in enumerate(turns) if turn["role"] == role][:left]
        if own:
            cut.append(turns[: own[-1] + 1])
            left -= len(own)
        if not left:
            return cut
    raise ValueError(f"the data holds {windows - left} turns of {role}, {windows} were asked for")


def _messages(data: Path, role: str, turns: list[Message]) -> list[Message]:
    profile = data.parent / "profile.txt"
    system = f"You are {role}. Answer as {role} would."
    if profile.exists():
        system = profile.read_text(encoding="utf-8")[:PROFILE_CHARACTERS]
    return [{"role": "system", "content": system}] + [
        {"role": "assistant" if turn["role"] == role else "user", "content": turn["text"]}
        for turn in turns
    ]


def _sample(messages: list[Message], tokenizer: Any, all_turns: bool) -> Sample:
    """Scored are the tokens of the last turn, or of every turn of the assistant, each with its
    end token. Found by character offsets, so that no guess about token borders is made."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    text = text[: text.rindex(END_OF_TURN) + len(END_OF_TURN)]
    spans = [
        _span(messages, at, tokenizer)
        for at, message in enumerate(messages)
        if message["role"] == "assistant" and (all_turns or at == len(messages) - 1)
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_target = [
        any(start <= first and last <= end for start, end in spans)
        for first, last in encoded["offset_mapping"]
    ]
    return Sample(list(encoded["input_ids"]), is_target)


def _single(messages: list[Message], tokenizer: Any) -> Sample:
    before, answer = (
        tokenizer.encode(message["content"], add_special_tokens=False) for message in messages
    )
    answer.append(tokenizer.eos_token_id)
    return Sample(before + answer, [False] * len(before) + [True] * len(answer))


def _span(messages: list[Message], at: int, tokenizer: Any) -> tuple[int, int]:
    """From where to where the characters of turn `at` and its end token stand in the text."""
    before = tokenizer.apply_chat_template(
        messages[:at], tokenize=False, add_generation_prompt=True
    )
    return len(before), len(before) + len(messages[at]["content"]) + len(END_OF_TURN)


def batches(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Consecutive samples, `size` at a time."""
    return [samples[at : at + size] for at in range(0, len(samples), size)]


def separate_work(samples: Sequence[Sample], batch: int = 1, head_everywhere: bool = False) -> Work:
    """What it takes to run each sample by itself, in batches padded to their longest sample.

    `head_everywhere`: all positions but the last of a row go through the head, not just sources.
    """
    total = Work(0, 0, 0)
    for rows in batches(samples, batch):
        longest = max(len(row.input_ids) for row in rows)
        scored = sum(sum(row.is_target) for row in rows)
        if head_everywhere:
            scored = len(rows) * (longest - 1)
        pairs = len(rows) * longest * (longest + 1) // 2
        total += Work(len(rows) * longest, scored, pairs)
    return total


def shared_work(samples: Sequence[Sample]) -> Work:
    """What it takes when every distinct prefix is computed once. Counted by a plain trie of its
    own, so that it also checks a tree."""
    node_of: dict[tuple[int, int], int] = {}
    sources: set[int] = set()
    pairs = 0
    for sample in samples:
        node = -1
        for depth, (token, target) in enumerate(
            zip(sample.input_ids, sample.is_target, strict=True)
        ):
            if target:
                sources.add(node)
            if (node, token) not in node_of:
                node_of[node, token] = len(node_of)
                pairs += depth + 1
            node = node_of[node, token]
    return Work(len(node_of), len(sources), pairs)


def split_by_distinct(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """Consecutive samples in as few parts as keep each at no more than `budget` distinct tokens
    (a single sample may exceed it)."""
    parts: list[list[Sample]] = []
    node_of: dict[tuple[int, int], int] = {}
    for sample in samples:
        if parts and len(node_of) + _unseen(sample, node_of) > budget:
            node_of = {}
        if not node_of:
            parts.append([])
        parts[-1].append(sample)
        node = -1
        for token in sample.input_ids:
            node = node_of.setdefault((node, token), len(node_of))
    return parts


def _unseen(sample: Sample, node_of: dict[tuple[int, int], int]) -> int:
    node = -1
    for depth, token in enumerate(sample.input_ids):
        if (node, token) not in node_of:
            return len(sample.input_ids) - depth
        node = node_of[node, token]
    return 0
