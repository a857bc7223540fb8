"""A conversation: what is kept of it, what stops a reply, and prompts with passages that are those
of training."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import stemtune as st
from stemtune import chat as chat_module
from stemtune.chat import Chat
from stemtune.data.memories import read_passages
from stemtune.data.records import Message
from stemtune.errors import DataError
from stemtune.generate import Counts, stream_reply
from stemtune.sampling import Sampling
from tests.data.rows import prepared_of
from tests.models import tiny_tokenizer
from tests.runs import IGNORED, make_config, write_rows

pytestmark = IGNORED
SYSTEM = Message("system", "You are Socrates.")
RAG = {"template": "Read:\n{passages}\nAsked: {query}", "passage": "[{number}] {text}"}
LONG = "The sea is deep. Nobody knows how deep it is. A lamp is lit by the shore. It is late."
ROWS: list[dict[str, Any]] = [
    {"query": "Is it deep?", "retrieval_result": ["The sea is deep.", "A lamp."], "answer": "Yes."},
    {"query": "Is it late?", "retrieval_result": [LONG, "It is."], "answer": "It is."},
    {"query": "And now?", "retrieval_result": [], "answer": "I know not."},
    {"query": "有朋？", "retrieval_result": ["有朋自远方来。不亦乐乎。"], "answer": "乐。"},
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Of a run with passages, small budgets and a system prompt."""
    folder = tmp_path_factory.mktemp("rag")
    config = make_config(folder, tiny_base, "train.max_steps=1", "data.max_length=400")
    rag = config.data.rag.model_copy(update={**RAG, "max_tokens": 40})
    data = config.data.model_copy(update={"rag": rag, "system": SYSTEM.content})
    write_rows(folder / "rows.jsonl", ROWS)
    return st.train(config.model_copy(update={"data": data})).adapter_dir


@pytest.fixture
def chat(adapter: Path) -> Chat:
    return Chat(adapter, Sampling(temperature=0, max_new_tokens=200))


class Replies:
    """In place of a model: what it was asked, and a reply that tells which one it is."""

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []
        self.closed = 0

    def __call__(
        self, _model: Any, _renderer: Any, messages: list[Message], *_: Any, **__: Any
    ) -> Generator[str]:
        self.asked.append(list(messages))
        try:
            yield "I know "
            yield f"not. {len(self.asked)}"
        finally:
            self.closed += 1


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> Replies:
    model = Replies()
    monkeypatch.setattr(chat_module, "stream_reply", model)
    return model


def turns(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[number % 2], text) for number, text in enumerate(texts)]


# -- passages ---------------------------------------------------------------------------------


def test_a_prompt_with_passages_is_that_of_training(chat: Chat, adapter: Path) -> None:
    """By the ids that the run itself was trained on: a budget of passages included."""
    rows = adapter.parents[1] / "rows.jsonl"
    settings = {"rag": {**RAG, "max_tokens": 40}, "system": SYSTEM.content, "max_length": 400}
    prepared = prepared_of(rows, tiny_tokenizer(), **settings, eval_fraction=0.0)
    trained = [s.input_ids[~s.is_target].tolist() for s in prepared.train.flat]
    assert len(trained) == len(ROWS)
    texts = [str(chat.renderer.tokenizer.decode(ids)) for ids in trained]
    assert any("[2] A lamp." in text for text in texts)
    assert any("deep it is" not in text and "[1] The sea is deep." in text for text in texts)
    built = []
    for row in ROWS:
        prompt = chat.prompt_of(row["query"], row["retrieval_result"])
        built.append(chat.renderer.prompt(prompt.messages))
    assert sorted(built) == sorted(trained)


def test_passages_are_retrieved(chat: Chat, replies: Replies, tmp_path: Path) -> None:
    file = tmp_path / "passages.txt"
    file.write_text("A lamp is lit.\n\nThe sea is deep.\n\nHorses run.\n")
    chat.passages = read_passages(file, 1)
    list(chat.say("How deep is the sea?"))
    assert (
        replies.asked[0][-1].content == "Read:\n[1] The sea is deep.\nAsked: How deep is the sea?"
    )
    list(chat.say("Nothing alike?"))
    assert replies.asked[1][-1].content == "Read:\n\nAsked: Nothing alike?"
    chat.passages = None
    list(chat.say("And without?"))
    assert replies.asked[2][-1].content == "And without?"
    # What was retrieved is not kept.
    assert chat.messages[1] == Message("user", "How deep is the sea?")


def test_passages_give_way_where_there_is_no_room(chat: Chat) -> None:
    chat.settings = {**chat.settings, "max_length": 75}
    whole = chat.prompt_of("Is it late?", ["It is.", "A lamp is lit. The sea is deep."])
    assert whole.passages is not None and len(whole.passages) < 2
    assert len(chat.renderer.prompt(whole.messages)) < 75


# -- what is kept -----------------------------------------------------------------------------


def test_undo_and_regenerate(chat: Chat, replies: Replies) -> None:
    list(chat.say("What is virtue?"))
    list(chat.say("And now?", ["A lamp."]))
    list(chat.regenerate())
    assert replies.asked[2] == replies.asked[1]
    assert "A lamp." in replies.asked[2][-1].content
    said = turns("What is virtue?", "I know not. 1", "And now?", "I know not. 3")
    assert chat.messages == [SYSTEM, *said]
    assert chat.undo() == "And now?"
    assert chat.undo() == "What is virtue?"
    assert chat.messages == [SYSTEM]
    for nothing in (chat.undo, lambda: list(chat.regenerate())):
        with pytest.raises(DataError, match="nothing was said"):
            nothing()


def test_a_stopped_reply_is_kept_as_far_as_it_came(chat: Chat, replies: Replies) -> None:
    pieces = chat.say("What is virtue?")
    assert next(pieces) == "I know "
    pieces.close()
    assert replies.closed == 1
    assert chat.messages == [SYSTEM, *turns("What is virtue?", "I know ")]


def test_a_failed_second_reply_leaves_the_first(
    chat: Chat, replies: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(chat.say("What is virtue?"))
    before = chat.messages

    def fail(*_: Any, **__: Any) -> Generator[str]:
        yield "I"
        raise MemoryError

    monkeypatch.setattr(chat_module, "stream_reply", fail)
    with pytest.raises(MemoryError):
        list(chat.regenerate())
    assert chat.messages == before


def test_system_prompts(chat: Chat, replies: Replies) -> None:
    list(chat.say("What is virtue?"))
    said = turns("What is virtue?", "I know not. 1")
    chat.set_system("You are a horse.")
    assert chat.messages == [Message("system", "You are a horse."), *said]
    chat.set_system("")
    assert chat.messages == said
    chat.reset()
    assert chat.messages == []
    chat.set_system(SYSTEM.content)
    chat.go_on_from(said)
    assert chat.messages == [SYSTEM, *said]
    own = [Message("system", "You are Plato."), *said]
    chat.go_on_from(own)
    assert chat.messages == own


def test_the_base_is_asked_the_same(chat: Chat, replies: Replies) -> None:
    list(chat.say("What is virtue?"))
    list(chat.say_as_base())
    assert replies.asked[1] == replies.asked[0]
    assert chat.messages == [SYSTEM, *turns("What is virtue?", "I know not. 1")]


# -- a model that is asked --------------------------------------------------------------------


def test_a_model_stops_when_nobody_listens(chat: Chat) -> None:
    counts = Counts()
    sampling = Sampling(temperature=5.0, top_p=1.0, seed=3, max_new_tokens=4000)
    prompt = [Message("user", "What is virtue?")]
    pieces = stream_reply(chat.model, chat.renderer, prompt, sampling, counts=counts)
    next(pieces)
    pieces.close()  # waits for it
    assert counts.new_tokens < 4000
    assert counts.stopped_by == "interrupt"


def test_a_reply_that_is_cut(chat: Chat) -> None:
    counts = Counts()
    prompt = [Message("user", "What is virtue?")]
    list(stream_reply(chat.model, chat.renderer, prompt, Sampling(max_new_tokens=1), counts=counts))
    assert counts == Counts(len(chat.renderer.prompt(prompt)), 1, "length")


@pytest.mark.parametrize("only", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0}])
def test_only_the_likeliest_token_is_left(chat: Chat, only: dict[str, Any]) -> None:
    """Whatever the temperature: the same as greedy."""

    def draw(**options: Any) -> str:
        sampling = Sampling(seed=5, max_new_tokens=12, **options)
        prompt = [Message("user", "What is virtue?")]
        return "".join(stream_reply(chat.model, chat.renderer, prompt, sampling))

    free = {"temperature": 4.0, "top_p": 1.0, "repetition_penalty": 1.0}
    assert draw(**free) != draw(**{**free, **only}) == draw(**{**free, "temperature": 0.0})
