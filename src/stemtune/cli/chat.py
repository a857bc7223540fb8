"""`stemtune chat`: talk to a tuned model."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from stemtune.cli.common import log_to_stderr
from stemtune.data.records import Message, Place
from stemtune.errors import ConfigError, DataError
from stemtune.sampling import Sampling

if TYPE_CHECKING:
    from stemtune.chat import Chat

STDIN = Path("<stdin>")


@dataclass(frozen=True)
class Question:
    """Of a script: what is asked, what was said before, and the passages that it brings along."""

    text: str
    before: tuple[Message, ...] = ()
    passages: tuple[str, ...] | None = None


def chat(
    run: Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="One question; - reads it from stdin.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system prompt instead of the run's own.")
    ] = None,
    passages: Annotated[
        Path | None,
        typer.Option(
            help="RAG: what to retrieve among, by BM25. A text file, a paragraph each, or JSONL"
            " with a `text`."
        ),
    ] = None,
    passage_count: Annotated[
        int, typer.Option(min=1, help="--passages: at most so many for a question.")
    ] = 5,
    base: Annotated[
        bool, typer.Option("--base", help="Hear the base, without the adapter.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="The base's reply beside the tuned one. The conversation keeps the latter.",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="A JSON object a reply. Without --prompt, stdin has a row a line."
        ),
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token.")
    ] = Sampling.temperature,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Only the likeliest tokens that sum to so much."),
    ] = Sampling.top_p,
    top_k: Annotated[
        int, typer.Option(min=0, help="Only so many of the likeliest tokens; 0: all.")
    ] = Sampling.top_k,
    min_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Only tokens this likely, relative to the likeliest."),
    ] = Sampling.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.1, help="Above 1, what stands there already is less likely.")
    ] = Sampling.repetition_penalty,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Of a reply.")
    ] = Sampling.max_new_tokens,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draw the same reply again.")
    ] = Sampling.seed,
) -> None:
    """Talk to a run: prompts are built as in training.

    In a terminal, /help lists the commands. What comes through a pipe is one question."""
    if base and compare:
        raise ConfigError("one of --base and --compare", hint="--compare shows both")
    log_to_stderr()
    from stemtune.chat import Chat
    from stemtune.data.memories import read_passages
    from stemtune.model.adapter import adapter_folder
    from stemtune.model.save import read_settings

    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed)
    # What can be refused is, before weights load.
    read_settings(adapter_folder(run))
    questions = _questions(prompt, as_json)
    library = None if passages is None else read_passages(passages, passage_count)
    session = Chat(run, sampling, adapter=not base)
    session.passages = library
    if system is not None:
        session.set_system(system)
    if questions is None:
        from stemtune.cli.talk import talk

        talk(session, get_type_hints(chat, include_extras=True), passage_count, compare=compare)
        return
    for question in questions:
        session.go_on_from(question.before)
        _answer(session, question, compare, as_json)


def _questions(prompt: str | None, as_json: bool) -> list[Question] | None:
    """Of a script; None where somebody sits at a terminal.

    Raises:
        DataError: a question is empty, or a row asks none.
        ConfigError: JSON is wanted, and nothing is asked.
    """
    if prompt is None and sys.stdin.isatty():
        if as_json:
            hint = "ask with --prompt, or pipe JSONL in"
            raise ConfigError("--json needs a question", where="--json", hint=hint)
        return None
    if prompt is None and as_json:
        return list(_rows(sys.stdin.buffer))
    text = sys.stdin.read() if prompt is None or prompt == "-" else prompt
    if not text.strip():
        raise DataError("the prompt is empty", hint="say something, with --prompt or through stdin")
    return [Question(text.removesuffix("\n"))]


def _rows(lines: Iterable[bytes]) -> Iterable[Question]:
    from stemtune.data.formats import question_of
    from stemtune.data.read import parse_line
    from stemtune.data.row import Row

    offset = 0
    for number, line in enumerate(lines, 1):
        place = Place(STDIN, number, offset)
        offset += len(line)
        if line.strip():
            messages, passages = question_of(Row(parse_line(place, line), place))
            yield Question(messages[-1].content, tuple(messages[:-1]), passages)


def _answer(session: "Chat", question: Question, compare: bool, as_json: bool) -> None:
    pieces = session.say(question.text, question.passages)
    if as_json:
        for _ in pieces:
            pass
        print(json.dumps(_figures(session, compare), ensure_ascii=False), flush=True)
        return
    from stemtune.cli.reply import show, show_both

    if compare:
        show_both(session, pieces)
    else:
        show(pieces)


def _figures(session: "Chat", compare: bool) -> dict[str, Any]:
    """A reply, as a script wants it."""
    exchange = session.last
    assert exchange is not None
    counts, prompt = exchange.counts, exchange.prompt
    found: dict[str, Any] = {
        "reply": exchange.reply,
        "prompt_tokens": counts.prompt_tokens,
        "new_tokens": counts.new_tokens,
        "stopped_by": counts.stopped_by,
        "seconds": round(exchange.seconds, 3),
    }
    if compare:
        found["base_reply"] = "".join(session.say_as_base())
    if prompt.passages is not None:
        found["passages"] = prompt.passages
    if session.book is not None:
        found["memories"] = prompt.memories
    return found
