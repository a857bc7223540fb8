"""Passages that are like the query, in the prompt of a character's turn."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stemtune.config import Memories
from stemtune.data.read import parse_line, read_lines
from stemtune.data.records import Dialogue, Message, Record
from stemtune.data.row import Row
from stemtune.data.words import search_terms, words
from stemtune.errors import ConfigError, DataError

Scores = NDArray[np.float32]
MEMORIES_FILE = "memories.jsonl"  # in the folder of an adapter


@dataclass(frozen=True)
class Memory:
    """A passage, and the group of the dialogue it comes from (0: from none)."""

    text: str
    group: int = 0


class Likeness(Protocol):
    """Scores every memory against a query."""

    def __call__(self, query: str) -> Scores:
        """[M] the higher the likelier."""
        ...


class Bm25:
    """By the words they share.

    Source:
        Robertson and Zaragoza 2009, as `bm25s` computes it; bigrams of characters where a script
        has no spaces.
    """

    def __init__(self, texts: Seq[str]) -> None:
        # Where JAX is there, bm25s wakes it when imported; by itself it would take most of a GPU.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import bm25s

        self.count = len(texts)
        self.index = bm25s.BM25()
        terms = [search_terms(text) for text in texts]
        self.known = {term for text in terms for term in text}
        if self.known:
            self.index.index(terms, show_progress=False)

    def __call__(self, query: str) -> Scores:
        """See `Likeness`."""
        terms = [term for term in search_terms(query) if term in self.known]
        if not terms:
            return np.zeros(self.count, np.float32)
        return np.asarray(self.index.get_scores(terms), np.float32)


class Embeddings:
    """By the cosine of their embeddings.

    Raises:
        ConfigError: sentence-transformers is not installed, or has no such model.
    """

    def __init__(self, texts: Seq[str], model: str) -> None:
        where = "data.memories.by"
        try:
            from sentence_transformers import SentenceTransformer  # pyright: ignore
        except ImportError:
            hint = "pip install sentence-transformers, or use bm25"
            what = f"the embedding model {model!r} needs sentence-transformers"
            raise ConfigError(what, where=where, hint=hint) from None
        try:
            self.model: Any = SentenceTransformer(model)  # pyright: ignore
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            what = f"can't load the embedding model {model!r}: {reason}"
            raise ConfigError(what, where=where, hint="a folder or a Hub id, or bm25") from error
        self.memories = self._embed(list(texts))

    def __call__(self, query: str) -> Scores:
        """See `Likeness`."""
        return self.memories @ self._embed([query])[0]

    def _embed(self, texts: list[str]) -> Scores:
        return np.asarray(self.model.encode(texts, normalize_embeddings=True), np.float32)


class MemoryBook:
    """All memories of a character, and the settings by which some are chosen.

    Args:
        count_tokens: how long a text is, for `max_tokens`.
    """

    def __init__(
        self,
        memories: Seq[Memory],
        settings: Memories,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        self.memories, self.settings, self.count_tokens = list(memories), settings, count_tokens
        texts = [memory.text for memory in self.memories]
        by = settings.by
        self.likeness: Likeness = Bm25(texts) if by == "bm25" else Embeddings(texts, by)
        self.plain = [_plain(text) for text in texts]
        self.groups = np.array([memory.group for memory in self.memories], np.uint64)

    def choose(self, query: str, answer: str = "", group: int = 0) -> list[str]:
        """The memories that are most like the query, the likest first, within the caps.

        Args:
            answer: what will be trained. A memory that holds it, or that it holds, is never chosen.
            group: of the dialogue. A memory of the same group is never chosen.
        """
        if not self.memories:
            return []
        scores = self.likeness(query)
        own = (self.groups == group) & (self.groups != 0)
        hidden = _plain(answer)
        chosen: list[str] = []
        for number in np.argsort(-scores, kind="stable").tolist():
            if scores[number] <= 0 or len(chosen) == self.settings.count:
                break
            text = self.memories[number].text
            if own[number] or _holds(self.plain[number], hidden) or text in chosen:
                continue
            if self._fits([*chosen, text]):
                chosen.append(text)
        return chosen

    def _fits(self, texts: list[str]) -> bool:
        joined = "\n".join(texts)
        if len(joined) > self.settings.max_characters:
            return False
        most = self.settings.max_tokens
        return most is None or self.count_tokens is None or self.count_tokens(joined) <= most

    def put(self, messages: Seq[Message], chosen: Seq[str]) -> list[Message]:
        """The messages, the last one the query, with memories where `position` says."""
        if not chosen:
            return list(messages)
        text = self.settings.template.replace("{memories}", "\n".join(chosen))
        if self.settings.position == "after_history":
            asked = max(i for i, m in enumerate(messages) if m.role == "user")
            query = replace(messages[asked], content=f"{text}\n\n{messages[asked].content}")
            return [*messages[:asked], query, *messages[asked + 1 :]]
        if messages[0].role == "system":
            system = replace(messages[0], content=f"{messages[0].content}\n\n{text}")
            return [system, *messages[1:]]
        return [Message("system", text), *messages]

    def remind(self, record: Record, group: int) -> Record:
        """A record of one trained turn, with its memories."""
        if not isinstance(record, Dialogue) or len(record.trained) != 1:
            return record
        turn = record.trained[0]
        before, answer = record.messages[:turn], record.messages[turn]
        query = next(m.content for m in reversed(before) if m.role == "user")
        messages = self.put(before, self.choose(query, answer.content, group))
        return replace(record, messages=(*messages, answer), trained=(len(messages),))


def exchanges(record: Record) -> Iterator[str]:
    """What a character's turn could be remembered by: what was said to it, and its answer."""
    if isinstance(record, Dialogue):
        for turn in record.trained:
            asked = record.messages[turn - 1]
            said = record.messages[turn].content
            yield f"{asked.content}\n{said}" if asked.role == "user" else said


def read_memories(path: Path) -> list[Memory]:
    """A text file, a paragraph a memory, or JSONL with a `text`.

    Raises:
        DataError: it can't be read, or holds nothing.
    """
    where = str(path)
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            with path.open("rb") as file:
                rows = [Row(parse_line(p, line), p) for p, line in read_lines(path, file)]
            texts = [row.text("text") for row in rows]
        else:
            paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig"))
            texts = [paragraph.strip() for paragraph in paragraphs]
    except (OSError, UnicodeDecodeError) as error:
        hint = "a text file, a paragraph each, or JSONL; a run file's path is relative to it"
        raise DataError(f"can't be read: {error}", where=where, hint=hint) from None
    memories = [Memory(text) for text in texts if text]
    if not memories:
        raise DataError("the file holds no memories", where=where, hint="a paragraph a memory")
    return memories


def read_passages(path: Path, count: int) -> MemoryBook:
    """Passages to retrieve among, at most `count` for a question, by BM25.

    Raises:
        DataError: see `read_memories`.
    """
    return MemoryBook(read_memories(path), Memories(count=count, max_characters=sys.maxsize))


def memory_lines(memories: Seq[Memory]) -> str:
    """As JSONL, in the form that `read_memories` reads."""
    lines = [json.dumps({"text": memory.text}, ensure_ascii=False) for memory in memories]
    return "".join(f"{line}\n" for line in lines)


def _plain(text: str) -> str:
    return f" {' '.join(words(text))} "


def _holds(memory: str, answer: str) -> bool:
    """One holds the other, word by word."""
    return len(answer) > 2 and (answer in memory or memory in answer)
