"""A conversation with a tuned model."""

import time
from collections.abc import Generator
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from stemtune.config import Memories, Rag
from stemtune.data.memories import MEMORIES_FILE, MemoryBook, read_memories
from stemtune.data.persona import Window
from stemtune.data.rag import fewer, fit, put_in
from stemtune.data.records import Message
from stemtune.data.renderer import Renderer
from stemtune.errors import DataError
from stemtune.generate import Counts, fit_history, stream_reply
from stemtune.model.adapter import adapter_folder
from stemtune.model.save import load_adapter
from stemtune.sampling import Sampling


@dataclass(frozen=True)
class Prompt:
    """What is put before the model.

    Attributes:
        memories: that it shows.
        passages: that it shows; None where none were looked for.
    """

    messages: list[Message]
    memories: list[str]
    passages: list[str] | None


@dataclass
class Exchange:
    """A question and its reply, as far as it has come."""

    question: str
    given: Seq[str] | None
    prompt: Prompt
    reply: str = ""
    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0


class Chat:
    """Keeps the conversation; prompts are built as in training. What is kept is what was said, not
    what was remembered or retrieved for it.

    Args:
        run: the folder of a run or of an adapter.
        adapter: false to hear the base.

    Attributes:
        passages: where a question comes with none: the same for all, or a book to choose from.
    """

    def __init__(self, run: Path, sampling: Sampling, *, adapter: bool = True) -> None:
        folder = adapter_folder(run)
        self.model, tokenizer, self.settings = load_adapter(folder, "auto")
        self.renderer = Renderer(tokenizer, self.settings["template"])
        self.rag = Rag.model_validate(self.settings.get("rag", {}))
        self.book = None
        if self.settings.get("memories"):
            memories = read_memories(folder / MEMORIES_FILE)
            chosen_by = Memories.model_validate(self.settings["memories"])
            self.book = MemoryBook(memories, chosen_by, self.renderer.count)
        self.passages: Seq[str] | MemoryBook | None = None
        self.sampling = sampling
        self.adapter = adapter
        self.messages: list[Message] = []
        self.last: Exchange | None = None
        self.system: str = self.settings["system"] or ""
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.go_on_from([])

    def set_system(self, text: str) -> None:
        """Another system prompt, or none; the conversation goes on."""
        self.system = text
        self.go_on_from([message for message in self.messages if message.role != "system"])

    def go_on_from(self, messages: Seq[Message]) -> None:
        """Take over a conversation. One without a system prompt gets the run's, as in training."""
        begins = bool(messages) and messages[0].role == "system"
        head = [Message("system", self.system)] if self.system and not begins else []
        self.messages = [*head, *messages]

    def say(self, text: str, passages: Seq[str] | None = None) -> Generator[str]:
        """The reply, piece by piece. Closed early, it ends there, and what came of it is kept.

        Args:
            passages: retrieved for this question.

        Raises:
            DataError: nothing was said.
        """
        if not text.strip():
            raise DataError("the prompt is empty", hint="say something")
        prompt = self.prompt_of(text, passages)
        exchange = self.last = Exchange(text, passages, prompt)
        started = time.perf_counter()
        try:
            yield from self._stream(exchange)
        except Exception:
            raise  # as if it had not been asked
        except BaseException:  # whoever listens has heard enough
            if exchange.reply:
                self._keep(exchange)
            raise
        exchange.seconds = time.perf_counter() - started
        self._keep(exchange)

    def _stream(self, exchange: Exchange) -> Generator[str]:
        reply = stream_reply(
            self.model,
            self.renderer,
            exchange.prompt.messages,
            self.sampling,
            adapter=self.adapter,
            counts=exchange.counts,
        )
        with closing(reply) as pieces:
            for piece in pieces:
                exchange.reply += piece
                yield piece

    def _keep(self, exchange: Exchange) -> None:
        said = Message("user", exchange.question), Message("assistant", exchange.reply or " ")
        self.messages = [*self.messages, *said]

    def say_as_base(self) -> Generator[str]:
        """What the base says to the last prompt. The conversation does not keep it."""
        assert self.last is not None
        messages = self.last.prompt.messages
        return stream_reply(self.model, self.renderer, messages, self.sampling, adapter=False)

    def undo(self) -> str:
        """Take back the last question and its reply.

        Returns:
            The question.

        Raises:
            DataError: there is none.
        """
        asked = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise DataError("nothing was said yet", hint="say something first")
        question = self.messages[asked[-1]].content
        self.messages = self.messages[: asked[-1]]
        return question

    def regenerate(self) -> Generator[str]:
        """Another reply to the last question.

        Raises:
            DataError: there is none.
        """
        before, last = self.messages, self.last
        question = self.undo()
        given = last.given if last is not None and last.question == question else None
        try:
            yield from self.say(question, given)
        finally:
            if len(self.messages) < len(before):  # it failed, or was stopped before it began
                self.messages = before

    def prompt_of(self, text: str, passages: Seq[str] | None = None) -> Prompt:
        """What would be put before the model for a question.

        Args:
            passages: retrieved for this question; else `Chat.passages` has them.
        """
        memories = self.book.choose(text) if self.book is not None else []
        found = self._retrieve(text) if passages is None else passages
        count, most = self.renderer.count, self.rag.max_tokens
        kept = None if found is None else fit(found, self.rag, count, most)
        said = self._window_of([*self.messages, Message("user", text)])
        reminded = said if self.book is None else self.book.put(said, memories)
        while True:
            filled = reminded if kept is None else put_in(reminded, kept, self.rag)
            longest = self.settings["max_length"]
            shown = fit_history(filled, self.renderer, longest, self.sampling.max_new_tokens)
            # How long the answer gets is not known, as it is in training: passages give way to
            # its beginning, not to `max_new_tokens`.
            if not kept or len(self.renderer.prompt(shown)) < longest:
                return Prompt(shown, memories, kept)
            kept = fewer(kept)

    def _retrieve(self, text: str) -> Seq[str] | None:
        return (
            self.passages.choose(text) if isinstance(self.passages, MemoryBook) else self.passages
        )

    def _window_of(self, messages: list[Message]) -> list[Message]:
        """What training would have kept of this conversation."""
        head = 1 if messages[0].role == "system" else 0
        turns = messages[head:]
        window = Window(**self.settings.get("window", {}))
        start = window.start(turns, window.lengths(turns, self.renderer.count))
        return [*messages[:head], *turns[start:]]
