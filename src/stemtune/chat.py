"""A conversation with a tuned model."""

from collections.abc import Iterator
from pathlib import Path

from stemtune.config import Memories
from stemtune.data.memories import MEMORIES_FILE, MemoryBook, read_memories
from stemtune.data.persona import Window
from stemtune.data.records import Message
from stemtune.data.renderer import Renderer
from stemtune.errors import DataError
from stemtune.generate import Sampling, fit_history, stream_reply
from stemtune.model.adapter import adapter_folder
from stemtune.model.save import load_adapter


class Chat:
    """Keeps the history; the prompt is built as in training.

    Args:
        run: the folder of a run or of an adapter.
        adapter: false to hear the base.
    """

    def __init__(self, run: Path, sampling: Sampling, *, adapter: bool = True) -> None:
        self.model, tokenizer, self.prompt = load_adapter(adapter_folder(run), "auto")
        self.renderer = Renderer(tokenizer, self.prompt["template"])
        self.book = None
        if self.prompt.get("memories"):
            memories = read_memories(adapter_folder(run) / MEMORIES_FILE)
            settings = Memories.model_validate(self.prompt["memories"])
            self.book = MemoryBook(memories, settings, self.renderer.count)
        self.sampling = sampling
        self.adapter = adapter
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        system = self.prompt["system"]
        self.messages = [Message("system", system)] if system else []

    def say(self, text: str) -> Iterator[str]:
        """The reply, piece by piece.

        Raises:
            DataError: nothing was said.
        """
        if not text.strip():
            raise DataError("the prompt is empty", hint="say something")
        before = self.messages
        self.messages = [*before, Message("user", text)]
        # The history keeps what was said, not what was remembered.
        memories = self.book.choose(text) if self.book is not None else []
        shown = fit_history(
            self._window_of(self.messages),
            self.renderer,
            self.prompt["max_length"] - self.renderer.count("\n".join(memories)),
            self.sampling.max_new_tokens,
        )
        shown = self.book.put(shown, memories) if self.book else shown
        reply = ""
        pieces = stream_reply(self.model, self.renderer, shown, self.sampling, adapter=self.adapter)
        try:
            for piece in pieces:
                reply += piece
                yield piece
        except Exception:
            self.messages = before  # as if it had not been asked
            raise
        self.messages.append(Message("assistant", reply or " "))

    def _window_of(self, messages: list[Message]) -> list[Message]:
        """What training would have kept of this conversation."""
        head = 1 if messages[0].role == "system" else 0
        turns = messages[head:]
        window = Window(**self.prompt.get("window", {}))
        start = window.start(turns, window.lengths(turns, self.renderer.count))
        return [*messages[:head], *turns[start:]]
