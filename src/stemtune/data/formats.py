"""Rows to records: what a row looks like, and which of its turns are trained.

A format is recognised by its keys. Its function reads a row into a `Parsed`: messages, or one
prompt and several answers. What makes records of that is the same for all.
"""

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, cast

from stemtune.config import Data
from stemtune.data.candidates import ranked_pairs, reference_scores
from stemtune.data.fields import map_fields
from stemtune.data.persona import Line, to_messages, windows
from stemtune.data.read import excerpt, kind_of, parse_json
from stemtune.data.records import Dialogue, Kin, Message, Place, Preference, Record
from stemtune.data.row import Row
from stemtune.data.script import parse_scene
from stemtune.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# What rows of retrieved passages commonly call the same thing.
QUERY = ("query", "question")
PASSAGES = ("retrieval_result", "passages", "contexts", "documents")
REFERENCE = ("answer", "response", "output", "reference")
PASSAGE_TEXT = ("text", "body", "content", "passage")


@dataclass
class Parsed:
    """What a row says, before any window is cut."""

    messages: list[Message]
    """The conversation; of a preference, its prompt."""
    first_trained: int = 0
    """Only answers from this message on are trained."""
    tools: tuple[dict[str, Any], ...] = ()
    passages: tuple[str, ...] | None = None
    answers: list[Message] = field(default_factory=list[Message])
    """Of a preference."""
    pairs: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Which of them is preferred to which."""
    label: bool | None = None
    """Of a single answer: whether it is good."""
    speakers: tuple[str, ...] = ()
    """Who speaks in a dialogue or a play, the character included."""
    may_be_silent: bool = False
    """A scene of a play, in which the character may not speak at all."""


def recognise(row: dict[str, Any], place: Place) -> str:
    """The format of a row, by its keys.

    Raises:
        DataError: none of them fits.
    """
    for name, (keys, _) in FORMATS.items():
        if all(any(key in row for key in names) for names in keys):
            return name
    found = excerpt(", ".join(sorted(row))) or "none"
    if ("chosen" in row) != ("rejected" in row):
        found += f", without `{'rejected' if 'chosen' in row else 'chosen'}`"
    hint = "a row has `messages`, `dialogue`, `context` and `target`, …; data.fields maps others"
    raise DataError(f"unknown kind of row: its keys are {found}", where=str(place), hint=hint)


def to_records(
    values: dict[str, Any],
    place: Place,
    data: Data,
    form: str = "auto",
    count_tokens: Callable[[str], int] | None = None,
) -> tuple[str, list[Record]]:
    """The format of a row, and its records: one, or with `samples: turn` one for each trained turn.

    Args:
        form: the format, where the source names one of its own.
        count_tokens: how long a text is; see `windows`.

    Raises:
        DataError: a field is missing, of the wrong type or blank, or nothing can be trained.
    """
    values = map_fields(values, data.fields, place)
    named = data.format if form == "auto" else form
    name = recognise(values, place) if named == "auto" else named
    row = Row(values, place)
    parsed = FORMATS[name][1](row, data)
    if data.system and not (parsed.messages and parsed.messages[0].role == "system"):
        parsed.messages.insert(0, Message("system", data.system))
        parsed.first_trained += 1
    if parsed.answers:
        return name, [_preference(parsed, row)]
    return name, _dialogues(parsed, row, data, count_tokens)


def _dialogues(
    parsed: Parsed, row: Row, data: Data, count_tokens: Callable[[str], int] | None
) -> list[Record]:
    messages = parsed.messages
    asked = next((i for i, m in enumerate(messages) if m.role == "user"), len(messages))
    trained = [
        i
        for i, message in enumerate(messages)
        # A character who opens has nothing to answer to: that turn is history, not a target.
        if message.role == "assistant" and i > asked and i >= parsed.first_trained
    ]
    if not trained and parsed.may_be_silent:
        return []
    if not trained:
        hint = "there must be an answer (an assistant's turn) after a user's turn"
        raise row.error("nothing in this row can be trained", hint)
    whole = Dialogue(
        kin=_kin(messages, trained),
        place=row.place,
        messages=tuple(messages[: trained[-1] + 1]),
        trained=tuple(trained),
        tools=parsed.tools,
        passages=parsed.passages,
        speakers=parsed.speakers,
    )
    return [whole] if data.samples == "dialogue" else list(windows(whole, data, count_tokens))


def _preference(parsed: Parsed, row: Row) -> Preference:
    if not any(message.role == "user" for message in parsed.messages):
        raise row.error("the prompt has no user's turn", "answers need something to answer to")
    return Preference(
        kin=(_digest(parsed.messages),),
        place=row.place,
        prompt=tuple(parsed.messages),
        answers=tuple(parsed.answers),
        pairs=tuple(parsed.pairs),
        label=parsed.label,
        tools=parsed.tools,
        passages=parsed.passages,
    )


def _kin(messages: list[Message], trained: list[int]) -> Kin:
    """Rows that are parts of one dialogue begin with the same exchange; rows with a single answer
    that ask the same have the same query."""
    first = trained[0]
    exchange = _digest(messages[: first + 1])
    return (exchange, _digest(messages[:first])) if len(trained) == 1 else (exchange,)


def _digest(messages: list[Message]) -> str:
    text = "\0".join(f"{m.role}\0{m.content}" for m in messages if m.role != "system")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- conversations ----------------------------------------------------------------------------


def _from_context_target(row: Row, _data: Data) -> Parsed:
    return Parsed([Message("user", row.text("context")), Message("assistant", row.text("target"))])


def _from_messages(row: Row, _data: Data) -> Parsed:
    return Parsed(messages_of(row, "messages"), tools=_tools(row))


def _from_sharegpt(row: Row, _data: Data) -> Parsed:
    """Turns that do not alternate are joined, as everywhere."""
    messages: list[Message] = []
    for turn in row.objects("conversations"):
        speaker = turn.text("from")
        role = SHAREGPT_ROLES.get(speaker)
        if role is None:
            hint = f"it is one of {', '.join(SHAREGPT_ROLES)}"
            raise row.error(f"`{turn.name('from')}` is {excerpt(speaker)!r}", hint)
        text = turn.text("value")
        if speaker == "function_call":
            message = Message("assistant", "", tool_calls=_tool_calls(turn, text))
        else:
            message = Message(role, text)
        if role == "system":
            _refuse_system_later(messages, turn)
        last = messages[-1] if messages else None
        plain = not message.tool_calls and role in ("user", "assistant")
        if last is not None and last.role == role and plain and not last.tool_calls:
            messages[-1] = Message(role, f"{last.content}\n{text}")
        else:
            messages.append(message)
    if row.has("system") and messages[0].role != "system":
        messages.insert(0, Message("system", row.text("system")))
    return Parsed(messages, tools=_tools(row))


def _from_alpaca(row: Row, _data: Data) -> Parsed:
    """The history is context; the answer to the instruction is trained."""
    messages = [Message("system", text)] if (text := row.optional_text("system")) else []
    history = row.values.get("history") or []
    if not isinstance(history, list):
        raise row.wrong("history", "a list of pairs")
    for number, pair in enumerate(cast(list[object], history)):
        texts = cast(list[object], pair) if isinstance(pair, list) else []
        if len(texts) != 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            what = f"`history[{number}]` should be two texts: what was asked and answered"
            raise row.error(what, "a pair is [question, answer]")
        messages += [Message("user", str(texts[0])), Message("assistant", str(texts[1]))]
    question = row.text("instruction")
    if more := row.optional_text("input"):
        question = f"{question}\n{more}"
    messages += [Message("user", question), Message("assistant", row.text("output"))]
    return Parsed(messages, first_trained=len(messages) - 1)


def _from_prompt_completion(row: Row, _data: Data) -> Parsed:
    prompt = _prompt(row)
    if isinstance(row.values.get("completion"), list):
        answer = messages_of(row, "completion", after=True)
    else:
        answer = [Message("assistant", row.text("completion"))]
    return Parsed([*prompt, *answer], first_trained=len(prompt), tools=_tools(row))


def _from_labelled(row: Row, data: Data) -> Parsed:
    """An answer that is said to be good or bad."""
    label = row.require("label")
    if not isinstance(label, bool):
        hint = "if it means something else, set data.format: prompt_completion"
        raise row.error(f"`label` is {kind_of(label)}, not true or false", hint)
    parsed = _from_prompt_completion(row, data)
    if parsed.messages[-1].role != "assistant" or len(parsed.messages) != parsed.first_trained + 1:
        hint = "a completion is one answer, the assistant's"
        raise row.error("only a single answer can be labelled", hint)
    parsed.answers = [parsed.messages.pop()]
    parsed.label = label
    return parsed


def _from_dialogue(row: Row, data: Data) -> Parsed:
    lines = [Line(turn.text("role"), turn.text("text")) for turn in row.objects("dialogue")]
    return Parsed(to_messages(lines, row, data), speakers=_speakers(lines))


def _from_scene(row: Row, data: Data) -> Parsed:
    lines = parse_scene(row)
    messages = to_messages(lines, row, data, may_be_silent=True)
    return Parsed(messages, speakers=_speakers(lines), may_be_silent=True)


def _speakers(lines: list[Line]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(line.speaker for line in lines))


def _from_rag(row: Row, _data: Data) -> Parsed:
    query, passages = _query(row)
    return Parsed(
        [query, Message("assistant", row.text(_first(row, REFERENCE)))], passages=passages
    )


# -- preferences ------------------------------------------------------------------------------


def _from_preference(row: Row, _data: Data) -> Parsed:
    """`chosen` and `rejected`, each a text, an object with a `text`, or messages; with their prompt
    beside them, or at the start of both."""
    chosen, rejected = _answers(row, "chosen"), _answers(row, "rejected")
    stem: list[Message] = []
    if any(len(answer) > 1 for answer in (*chosen, *rejected)):
        stem = chosen[0][:-1]
        if any(answer[:-1] != stem for answer in (*chosen, *rejected)):
            hint = "both must be the same conversation up to their last message"
            raise row.error("`chosen` and `rejected` answer different prompts", hint)
    prompt = _prompt(row) if row.has("prompt") else []
    if prompt and any(stem[at : at + len(prompt)] == prompt for at in (0, 1)):
        prompt = []  # both answers hold it, perhaps behind a system message
    if prompt and any(m.role == "system" for m in stem):
        hint = "a prompt beside whole conversations must be how they begin"
        raise row.error("the system message stands behind the prompt", hint)
    return _preferred(row, Parsed([*prompt, *stem], tools=_tools(row)), chosen, rejected)


def _from_rag_preference(row: Row, _data: Data) -> Parsed:
    query, passages = _query(row)
    chosen, rejected = _answers(row, "chosen"), _answers(row, "rejected")
    return _preferred(row, Parsed([query], passages=passages), chosen, rejected)


def _preferred(
    row: Row, parsed: Parsed, chosen: list[list[Message]], rejected: list[list[Message]]
) -> Parsed:
    good, bad = [answer[-1] for answer in chosen], [answer[-1] for answer in rejected]
    for answer in (*good, *bad):
        if answer.role != "assistant":
            hint = "the last message of both must be the assistant's"
            raise row.error(f"an answer is by {excerpt(answer.role)!r}", hint)
    if any(_said(g) == _said(b) for g in good for b in bad):
        hint = "there is nothing to prefer: take the row out"
        raise row.error(f"chosen and rejected are the same: {excerpt(good[0].content)}", hint)
    parsed.answers = [*good, *bad]
    parsed.pairs = [(g, len(good) + b) for g in range(len(good)) for b in range(len(bad))]
    return parsed


def _said(answer: Message) -> tuple[str, str, tuple[dict[str, Any], ...]]:
    return answer.content.strip(), answer.thinking.strip(), answer.tool_calls


def _from_candidates(row: Row, data: Data) -> Parsed:
    """Several answers with scores; or without, and a reference to score them by."""
    key = _first(row, (*QUERY, "prompt"))
    if key == "prompt":
        messages, passages = _prompt(row), passages_of(row)
    else:
        query, passages = _query(row)
        messages = [query]
    candidates = row.objects("candidates", "candidates")
    texts = [candidate.text("text") for candidate in candidates]
    if all(candidate.has("score") for candidate in candidates):
        scores = [candidate.number("score") for candidate in candidates]
    elif any(row.has(key) for key in REFERENCE):
        scores = reference_scores(texts, row.text(_first(row, REFERENCE)))
    else:
        hint = "each candidate has a `score`, or the row a reference `answer`"
        raise row.error("nothing tells which candidate is better", hint)
    pairs = ranked_pairs(texts, scores, data.pairs)
    if not pairs:
        hint = "candidates must differ by more than data.pairs.margin; take the row out"
        listed = excerpt(", ".join(f"{score:g}" for score in scores))
        raise row.error(f"the candidates are tied: their scores are {listed}", hint)
    used = sorted({answer for pair in pairs for answer in pair})
    place = {answer: number for number, answer in enumerate(used)}
    return Parsed(
        messages,
        passages=passages,
        answers=[Message("assistant", texts[answer]) for answer in used],
        pairs=[(place[better], place[worse]) for better, worse in pairs],
    )


def question_of(row: Row) -> tuple[list[Message], tuple[str, ...] | None]:
    """What a row asks, without an answer: a conversation that ends with the user's turn, and the
    passages that it brings along.

    Raises:
        DataError: it asks nothing.
    """
    asked = _first(row, QUERY)
    if row.has("messages"):
        messages = messages_of(row, "messages")
    elif row.has(asked):
        messages = [Message("user", row.text(asked))]
    elif row.has("prompt"):
        messages = _prompt(row)
    else:
        raise row.error("nothing is asked", "a row has a `prompt`, a `query` or `messages`")
    if messages[-1].role != "user":
        raise row.error("it does not end with a question", "the last message is the user's")
    return messages, passages_of(row)


# -- parts ------------------------------------------------------------------------------------


def messages_of(row: Row, key: str, *, after: bool = False) -> list[Message]:
    """Turns with `role` and `content`.

    Args:
        after: they go on from others, and so have no system message.
    """
    messages: list[Message] = []
    for turn in row.objects(key):
        role = turn.text("role")
        if role not in ROLES:
            what = f"`{turn.name('role')}` is {excerpt(role)!r}"
            raise row.error(what, f"roles are {', '.join(ROLES)}")
        if role == "system":
            _refuse_system_later(messages, turn, after=after)
        messages.append(_message(turn, role))
    return messages


def _message(turn: Row, role: str) -> Message:
    calls: tuple[dict[str, Any], ...] = ()
    if role == "assistant" and turn.values.get("tool_calls"):
        calls = tuple(
            _tool_call(call, call.object("function") if call.has("function") else call)
            for call in turn.objects("tool_calls", "calls")
        )
    thinking = next((k for k in ("reasoning_content", "thinking") if turn.has(k)), "")
    return Message(
        role,
        turn.optional_text("content") if calls else _content(turn),
        thinking=turn.optional_text(thinking) if thinking and role == "assistant" else "",
        tool_calls=calls,
        name=turn.optional_text("name") if role == "tool" else "",
        tool_call_id=turn.optional_text("tool_call_id") if role == "tool" else "",
    )


def _content(turn: Row) -> str:
    """Text, or a list of parts that are all text."""
    if not isinstance(turn.values.get("content"), list):
        return turn.text("content")
    parts = turn.objects("content", "parts")
    for part in parts:
        if part.values.get("type", "text") != "text":
            what = f"`{part.name('type')}` is {excerpt(str(part.values['type']))!r}"
            raise turn.error(what, "only text can be trained")
    return "".join(part.text("text") for part in parts)


def _tool_call(call: Row, function: Row) -> dict[str, Any]:
    """With its arguments as an object: templates write them out themselves."""
    arguments = function.values.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(function, "arguments", arguments or "{}")
    if not isinstance(arguments, dict):
        raise function.wrong("arguments", "an object")
    made = {
        "type": "function",
        "function": {"name": function.text("name"), "arguments": arguments},
    }
    return {"id": call.text("id"), **made} if call.has("id") else made


def _tool_calls(turn: Row, text: str) -> tuple[dict[str, Any], ...]:
    """ShareGPT writes a call, or a list of them, as JSON text."""
    value = _json(turn, "value", text)
    calls = cast(list[object], value) if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise turn.error(f"`{turn.name('value')}` is no call", "a call has a name and arguments")
    rows = [Row(cast(dict[str, Any], c), turn.place, turn.name("value")) for c in calls]
    return tuple(_tool_call(call, call) for call in rows)


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    """JSON schemas, as a list or as JSON text."""
    value = row.values.get("tools")
    if isinstance(value, str) and value.strip():
        value = _json(row, "tools", value)
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(t, dict) for t in cast(list[Any], value)):
        raise row.error("`tools` should be a list of JSON schemas", "as the OpenAI API has them")
    return tuple(cast(list[dict[str, Any]], value))


def _json(row: Row, key: str, text: str) -> object:
    try:
        return parse_json(text)
    except ValueError:
        what = f"`{row.name(key)}` is not valid JSON: {excerpt(text)}"
        raise row.error(what, "write it as an object, or as JSON text") from None


def _refuse_system_later(before: Seq[Message], turn: Row, *, after: bool = False) -> None:
    if before or after:
        raise turn.error(
            f"`{turn.path}`: a system message in the middle", "it can only be the first"
        )


def _prompt(row: Row) -> list[Message]:
    if isinstance(row.values.get("prompt"), list):
        return messages_of(row, "prompt")
    system = [Message("system", text)] if (text := row.optional_text("system")) else []
    return [*system, Message("user", row.text("prompt"))]


def _answers(row: Row, key: str) -> list[list[Message]]:
    """One answer, or several, each as messages of which the last one is the answer."""
    value = row.require(key)
    if isinstance(value, dict):
        return [[Message("assistant", row.object(key).text("text"))]]
    if not isinstance(value, list):
        return [[Message("assistant", row.text(key))]]
    items = row.items(key, "answers")
    if all(isinstance(item, dict) and "role" in item for item in items):
        return [messages_of(row, key)]
    answers: list[list[Message]] = []
    for number, item in enumerate(items):
        name = f"{key}[{number}]"
        inner = Row({name: item}, row.place, row.path)
        text = inner.object(name).text("text") if isinstance(item, dict) else inner.text(name)
        answers.append([Message("assistant", text)])
    return answers


def _first(row: Row, names: Seq[str]) -> str:
    return next((name for name in names if row.has(name)), names[0])


def _query(row: Row) -> tuple[Message, tuple[str, ...] | None]:
    return Message("user", row.text(_first(row, QUERY))), passages_of(row)


def passages_of(row: Row) -> tuple[str, ...] | None:
    """Texts, or objects with one; None where the row has no such field."""
    if not any(key in row.values for key in PASSAGES):
        return None
    key = _first(row, PASSAGES)
    value = row.values.get(key)
    if value is None or value == []:
        return ()
    if isinstance(value, str):
        return (row.text(key),)
    passages: list[str] = []
    for number, item in enumerate(row.items(key, "passages")):
        name = f"{key}[{number}]"
        if isinstance(item, dict):
            inner = Row(cast(dict[str, Any], item), row.place, row.name(name))
            passages.append(inner.text(_first(inner, PASSAGE_TEXT)))
        elif isinstance(item, str):
            passages.append(Row({name: item}, row.place, row.path).text(name))
        else:
            what = f"`{row.name(name)}` should be text, found {kind_of(item)}"
            raise row.error(what, "a passage is a text, or an object with one")
    return tuple(passages)


Keys = tuple[tuple[str, ...], ...]
# For each format the fields that tell it (of each inner tuple one), the most telling first.
FORMATS: dict[str, tuple[Keys, Callable[[Row, Data], Parsed]]] = {
    "candidates": ((("candidates",),), _from_candidates),
    "rag_preference": ((QUERY, ("chosen",), ("rejected",)), _from_rag_preference),
    "preference": ((("chosen",), ("rejected",)), _from_preference),
    "labelled": ((("prompt",), ("completion",), ("label",)), _from_labelled),
    "prompt_completion": ((("prompt",), ("completion",)), _from_prompt_completion),
    "messages": ((("messages",),), _from_messages),
    "sharegpt": ((("conversations",),), _from_sharegpt),
    "dialogue": ((("dialogue",),), _from_dialogue),
    "scene": ((("scene",),), _from_scene),
    "alpaca": ((("instruction",), ("output",)), _from_alpaca),
    "rag": ((QUERY, PASSAGES, REFERENCE), _from_rag),
    "context_target": ((("context",), ("target",)), _from_context_target),
}
