"""Records to sequences: the tokens a model sees, and which of them are trained.

A trained turn is rendered as inference would render it at that moment: the ids of its prompt, as
`chat` builds them, followed by the ids of the answer and its end token. Nothing behind the end
token is trained, since generation stops there.
"""

from collections.abc import Sequence as Seq

import numpy as np

from stemtune.config import Data
from stemtune.data.rag import fewer, fit, put_in
from stemtune.data.records import Dialogue, Message, Preference, Record
from stemtune.data.renderer import Ids, Renderer, Tools
from stemtune.errors import DataError
from stemtune.tree.sequence import Sequence

THINKING_ENDS = "</think>"


class TooLongError(DataError):
    """A record that does not fit into `max_length`, by policy `error` or past any trimming."""


def conversations(record: Record) -> list[tuple[Seq[Message], Tools]]:
    """What `Renderer.remember` should know before a record is rendered."""
    if isinstance(record, Dialogue) and record.passages is None:
        return [(record.messages[: turn + 1], record.tools) for turn in record.trained]
    if isinstance(record, Preference) and record.passages is None:
        return [((*record.prompt, answer), record.tools) for answer in record.answers]
    return []


def render(record: Record, number: int, renderer: Renderer, data: Data) -> list[Sequence]:
    """The sequences of a record: of a dialogue one for the whole where each prompt continues what
    came before it, one for a trained turn where the template renders its history differently; of a
    preference one for each answer.

    Raises:
        TooLongError: see `Data.on_too_long`.
        DataError: the template refuses it, or its answers are the same.
    """
    try:
        if isinstance(record, Preference):
            return _render_preference(record, number, renderer, data)
        assert isinstance(record, Dialogue)
        return _render_dialogue(record, number, renderer, data)
    except DataError as error:
        if not error.where:
            error.where = str(record.place)
        raise


def _render_dialogue(
    dialogue: Dialogue, number: int, renderer: Renderer, data: Data
) -> list[Sequence]:
    sequences: list[tuple[Ids, list[bool]]] = []
    for turn in dialogue.trained:
        before, answer = dialogue.messages[:turn], dialogue.messages[turn]
        prompt, (answer_ids,) = _fitted(dialogue, before, [answer], renderer, data)
        targets = _targets(answer_ids, renderer, data)
        ids, mask = sequences[-1] if sequences else ([], [])
        if ids and prompt[: len(ids)] == ids:
            mask += [False] * (len(prompt) - len(ids)) + targets
            ids += prompt[len(ids) :] + answer_ids
        else:
            sequences.append((prompt + answer_ids, [False] * len(prompt) + targets))
    return [Sequence(np.array(ids), np.array(mask), record=number) for ids, mask in sequences]


def _render_preference(
    preference: Preference, number: int, renderer: Renderer, data: Data
) -> list[Sequence]:
    prompt, answers = _fitted(preference, preference.prompt, preference.answers, renderer, data)
    for better, worse in preference.pairs:
        if answers[better] == answers[worse]:
            hint = "there is nothing to prefer: take the row out"
            raise DataError("chosen and rejected are the same, token by token", hint=hint)
    return [
        Sequence(
            np.array(prompt + ids),
            np.array([False] * len(prompt) + _targets(ids, renderer, data)),
            record=number,
            role=preference.role_of(answer),
            answer=answer,
            preferred_to=preference.preferred_to(answer),
        )
        for answer, ids in enumerate(answers)
    ]


def _targets(answer: Ids, renderer: Renderer, data: Data) -> list[bool]:
    """Which of an answer's tokens are trained: all, or with `thinking: mask` those behind what it
    thinks."""
    if data.thinking == "train" or THINKING_ENDS not in str(renderer.tokenizer.decode(answer)):
        return [True] * len(answer)
    low, high = 0, len(answer)
    while low < high:  # the first token with which the end of thinking is complete
        middle = (low + high) // 2
        if THINKING_ENDS in str(renderer.tokenizer.decode(answer[: middle + 1])):
            high = middle
        else:
            low = middle + 1
    return [False] * (low + 1) + [True] * (len(answer) - low - 1)


def _fitted(
    record: Record, before: Seq[Message], answers: Seq[Message], renderer: Renderer, data: Data
) -> tuple[Ids, list[Ids]]:
    """The prompt, and each answer to it, within `max_length`."""
    if renderer.plain and (len(before) != 1 or before[0].role != "user"):
        hint = "plain text is one context and one target: use data.template: chat"
        raise DataError("can't be rendered plainly", hint=hint)
    context = _Context(record, list(before), renderer, data)
    while True:
        messages = context.messages()
        prompt = renderer.prompt(messages, record.tools)
        ids = [renderer.answer([*messages, a], prompt, record.tools) for a in answers]
        longest = max(len(answer) for answer in ids)
        excess = len(prompt) + longest - data.max_length
        if excess <= 0:
            return prompt, ids
        context.length = context.length or len(prompt) + longest
        if data.on_too_long != "trim_context" or not context.trim(excess):
            raise _too_long(context.length, longest, data)


class _Context:
    """The messages before an answer, and what of them may be left out."""

    def __init__(
        self, record: Record, before: list[Message], renderer: Renderer, data: Data
    ) -> None:
        self.before, self.renderer, self.rag = before, renderer, data.rag
        self.passages = fit(record.passages or (), data.rag, renderer.count, data.rag.max_tokens)
        self.is_question = record.passages is not None
        self.length = 0
        """Before anything was trimmed."""

    def messages(self) -> list[Message]:
        """With the passages in the last of the user's turns."""
        return put_in(self.before, self.passages, self.rag) if self.is_question else self.before

    def trim(self, excess: int) -> bool:
        """Leave something out: a passage or the last sentence of the only one, the oldest turn, or
        the start of the last text. False, if nothing is left that may be."""
        if self.passages:
            self.passages = fewer(self.passages)
            return True
        system = [m for m in self.before[:1] if m.role == "system"]
        turns = self.before[len(system) :]
        if len(turns) > 1:
            # Templates want the user first.
            asked = [i for i, m in enumerate(turns) if m.role == "user" and i]
            self.before = [*system, *turns[asked[0] if asked else len(turns) - 1 :]]
            return True
        if self.is_question:
            return False  # what is left is the question
        tokenizer, text = self.renderer.tokenizer, turns[0].content
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore
        kept = str(tokenizer.decode(ids[excess:])).lstrip("\ufffd")
        if not kept.strip() or len(kept) >= len(text):
            return False
        self.before = [*system, Message(turns[0].role, kept)]
        return True


def _too_long(length: int, answer: int, data: Data) -> TooLongError:
    what = (
        f"{length} tokens ({answer} of them the answer), but data.max_length is {data.max_length}"
    )
    hint = "raise data.max_length, or choose data.on_too_long: trim_context or drop"
    if data.on_too_long == "trim_context":
        hint = "what may not be cut alone doesn't fit: raise data.max_length, or choose drop"
    return TooLongError(what, hint=hint)
