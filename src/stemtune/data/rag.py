"""The prompt of rows with retrieved passages, within a budget of tokens."""

import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from stemtune.config import Rag
from stemtune.data.records import Message

Count = Callable[[str], int]
# Behind the stop, and closing quotes; scripts without spaces need none behind it.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)|[。！？；][」』”’）]*|\n")


def fill(query: str, passages: Seq[str], rag: Rag, count: Count, budget: int | None = None) -> str:
    """The user's turn: as many passages as fit, and the query.

    Args:
        count: how many tokens a text has.
        budget: for the passages, instead of `rag.max_tokens`.
    """
    return put(query, fit(passages, rag, count, rag.max_tokens if budget is None else budget), rag)


def put(query: str, passages: Seq[str], rag: Rag) -> str:
    """Passages and query in `rag.template`."""
    return _filled(rag.template, passages=_joined(passages, rag), query=query)


def put_in(messages: Seq[Message], passages: Seq[str], rag: Rag) -> list[Message]:
    """A conversation with the passages in the last of the user's turns."""
    asked = max(i for i, m in enumerate(messages) if m.role == "user")
    filled = replace(messages[asked], content=put(messages[asked].content, passages, rag))
    return [*messages[:asked], filled, *messages[asked + 1 :]]


def fewer(passages: Seq[str]) -> list[str]:
    """Without the last passage, or without the last sentence of the only one."""
    shorter = shorten(passages[-1]) if len(passages) == 1 else ""
    return [shorter] if shorter else list(passages[:-1])


def fit(passages: Seq[str], rag: Rag, count: Count, budget: int) -> list[str]:
    """Whole passages from the start, as many as fit; of a first one that alone is too long, whole
    sentences; perhaps nothing."""
    kept: list[str] = []
    for text in passages:
        if count(_joined([*kept, text], rag)) > budget:
            break
        kept.append(text)
    if kept or not passages:
        return kept
    cut = cut_at_sentence(passages[0], budget, lambda text: count(_joined([text], rag)))
    return [cut] if cut else []


def cut_at_sentence(text: str, budget: int, count: Count) -> str:
    """The longest start of a text that ends with a sentence and fits; empty if none does."""
    ends = _sentence_ends(text)
    low, high = 0, len(ends)
    while low < high:  # the most sentences that fit
        middle = (low + high + 1) // 2
        if count(text[: ends[middle - 1]].rstrip()) <= budget:
            low = middle
        else:
            high = middle - 1
    return text[: ends[low - 1]].rstrip() if low else ""


def shorten(text: str) -> str:
    """Without its last sentence; empty if it has but one."""
    ends = [end for end in _sentence_ends(text) if text[end:].strip()]
    return text[: ends[-1]].rstrip() if ends else ""


def _sentence_ends(text: str) -> list[int]:
    return [match.end() for match in _SENTENCE_END.finditer(text)]


def _joined(passages: Seq[str], rag: Rag) -> str:
    return rag.separator.join(
        _filled(rag.passage, number=str(number), text=text)
        for number, text in enumerate(passages, 1)
    )


def _filled(template: str, **values: str) -> str:
    """Every `{name}` at once: a value that holds one stays as it is."""
    names = "|".join(values)
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)
