"""Messages to token ids, by the model's own chat template; the same for training and for chat."""

import inspect
import json
import re
from collections.abc import Sequence as Seq
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stemtune.data.records import Message
from stemtune.data.templates import set_template
from stemtune.errors import DataError, ModelError

Ids = list[int]
Tools = tuple[dict[str, Any], ...]
REFUSALS = (TemplateError, TypeError, ValueError, KeyError)
CHECKED = 4  # prompts of a chunk that are tokenised both ways
# Two texts that no template writes, to see what it puts around them.
ASKED, SAID = "asked-6f1d", "said-6f1d"


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all special tokens, also of those that the tokenizer has no name for."""
    unnamed = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}  # pyright: ignore
    return {*tokenizer.all_special_ids} | unnamed


class Renderer:
    """Turns messages into token ids.

    Raises:
        ModelError: the tokenizer has no chat template (with `template: chat`) or no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        set_template(tokenizer, template)
        self.tokenizer = tokenizer
        self.plain = template == "plain"
        self.joined = 0
        """Answers that don't continue their prompt's ids as the template writes the whole."""
        self.opening = ""
        """Blanks that the template writes between a prompt and the answer: no part of a reply."""
        self._ids: dict[str, Ids] = {}
        self._texts: dict[tuple[Any, ...], str] = {}
        self._endings: dict[tuple[str, str], Ids] = {}
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token", where="model.base")
        if not self.plain and not tokenizer.chat_template:
            hint = "use an instruct model, or data.template: chatml, dialogue, plain or a file"
            raise ModelError("the base has no chat template", where="model.base", hint=hint)
        self.eos: int = tokenizer.eos_token_id  # pyright: ignore
        self._added: dict[str, int] = tokenizer.get_added_vocab()  # pyright: ignore
        self._added_ids = set(self._added.values())
        longest_first = sorted((t for t in self._added if t), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        self._added_pattern = re.compile(pattern) if pattern else None
        self._learn_turns()

    def _learn_turns(self) -> None:
        """What the template puts around turns: the token that ends one, and the added tokens that
        nobody's text may bring in."""
        special = {
            token for token in self._added if self._added[token] in special_ids(self.tokenizer)
        }
        special |= set(self.tokenizer.all_special_tokens)
        self.turn_end: int | None = None
        self._control_tokens = sorted(special)
        if self.plain:
            return
        try:
            asked = Message("user", ASKED)
            whole = self._text([asked, Message("assistant", SAID)], ())
            framed = self._text([asked], ())
        except REFUSALS:  # it wants something else than a user and an assistant: said later
            return
        self.opening = self._blanks_before_answer(whole, asked)
        tail = whole.rpartition(SAID)[2]
        found = [(tail.find(token), -len(token), token) for token in self._added if token in tail]
        if found:
            self.turn_end = self._added[min(found)[2]]
            special.add(min(found)[2])
        self._control_tokens = sorted(special | {token for token in self._added if token in framed})

    def _blanks_before_answer(self, whole: str, asked: Message) -> str:
        try:
            prompt = self._text([asked], (), add_generation_prompt=True)
        except REFUSALS:
            return ""
        opening = whole[len(prompt) :].partition(SAID)[0] if whole.startswith(prompt) else ""
        return opening if opening.isspace() else ""

    def prompt(self, messages: Seq[Message], tools: Tools = ()) -> Ids:
        """Ids up to where the model's answer begins."""
        if self.plain:
            # With what the model wants at the start; control tokens in the text stay text.
            text = messages[-1].content
            return list(self.tokenizer(text, split_special_tokens=True)["input_ids"])  # pyright: ignore
        return self._template(messages, tools, add_generation_prompt=True)

    def answer(self, messages: Seq[Message], prompt: Ids, tools: Tools = ()) -> Ids:
        """Ids of the last message as the answer to `prompt`, the end token included."""
        if self.plain:
            return [*self._encode(messages[-1].content), self.eos]
        full = self._template(messages, tools)
        if full[: len(prompt)] == prompt:
            return self._ended(full[len(prompt) :])
        self.joined += 1
        return self._ended(self._written(messages, tools))

    def _ended(self, tail: Ids) -> Ids:
        """Up to the token that ends the turn; generation stops there."""
        ends = [tail.index(end) for end in (self.turn_end, self.eos) if end in tail]
        return tail[: min(ends) + 1] if ends else [*tail, self.eos]

    def _written(self, messages: Seq[Message], tools: Tools) -> Ids:
        """The last message as the template writes it, where that does not continue the prompt: what
        it adds to the last question alone, or the text that it adds to the conversation."""
        asked = max((i for i, m in enumerate(messages[:-1]) if m.role == "user"), default=0)
        alone = messages[asked:]
        question = self._template(alone[:-1], tools, add_generation_prompt=True)
        whole = self._template(alone, tools)
        if whole[: len(question)] == question:
            return whole[len(question) :]
        for part in (messages, alone):
            if self._holds_control_token(part, tools):
                break
            text = self._added_text(part, tools)
            if text is not None:
                return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore
        end = self.eos if self.turn_end is None else self.turn_end
        return [*self._encode(messages[-1].content), end]

    def _added_text(self, messages: Seq[Message], tools: Tools) -> str | None:
        """What the last message adds to the text of its prompt, or to that of the messages before
        it and what stands before an answer both in a prompt and in a history."""
        try:
            full = self._text(messages, tools)
            prompt = self._text(messages[:-1], tools, add_generation_prompt=True)
            if full.startswith(prompt):
                return full[len(prompt) :]
            before = self._text(messages[:-1], tools)
            header = self._header()
        except REFUSALS:
            return None
        return full[len(before) + len(header) :] if full.startswith(before + header) else None

    def _header(self) -> str:
        """What stands before an answer, in a prompt as in a history."""
        asked = [Message("user", ASKED)]
        whole = self._text([*asked, Message("assistant", SAID)], ())
        prompt = self._text(asked, (), add_generation_prompt=True)
        before = self._text(asked, ())
        written, opened = whole[len(before) :].partition(SAID)[0], prompt[len(before) :]
        same = next(
            (i for i, (a, b) in enumerate(zip(written, opened, strict=False)) if a != b), None
        )
        return written[: min(len(written), len(opened)) if same is None else same]

    def stop_ids(self) -> set[int]:
        """The tokens that end an answer."""
        return {self.eos} if self.turn_end is None else {self.eos, self.turn_end}

    def count(self, text: str) -> int:
        """How many tokens a text has by itself."""
        return len(self._encode(text))

    def remember(self, conversations: Seq[tuple[Seq[Message], Tools]]) -> None:
        """Tokenise many conversations at once, which is faster: with the prompt of each answer that
        ends one. What was remembered before is forgotten.

        Args:
            conversations: must not change, or be thrown away, as long as they are remembered.
        """
        self._ids, self._texts = {}, {}
        if self.plain:
            return
        wholes: dict[str, None] = {}
        whole_of: dict[str, str] = {}  # by prompt: one of the conversations that go on from it
        for messages, tools in conversations:
            if not self._holds_control_token(messages, tools):
                try:
                    whole = self._text(messages, tools, keep=True)
                    prompt = self._text(messages[:-1], tools, keep=True, add_generation_prompt=True)
                except REFUSALS:
                    continue  # said when the record itself is rendered
                wholes[whole] = None
                whole_of[prompt] = whole
        self._tokenise(list(wholes))
        composed = {prompt: self._composed(prompt, whole) for prompt, whole in whole_of.items()}
        # The same as tokenising each prompt by itself; some of them are, to be sure.
        checked = [prompt for prompt, ids in composed.items() if ids is not None][:CHECKED]
        self._tokenise(checked)
        if all(self._ids[prompt] == composed[prompt] for prompt in checked):
            self._ids |= {prompt: ids for prompt, ids in composed.items() if ids is not None}
        self._tokenise([prompt for prompt in composed if prompt not in self._ids])

    def _tokenise(self, texts: list[str]) -> None:
        if texts:
            ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            self._ids |= dict(zip(texts, ids, strict=True))  # pyright: ignore

    def _composed(self, prompt: str, whole: str) -> Ids | None:
        """The prompt's ids from those of the whole conversation: added tokens cut a text into
        pieces that are tokenised each by itself, so up to its last one they are the same, and what
        follows it is short and the same again and again. None where this does not apply."""
        found = list(self._added_pattern.finditer(prompt)) if self._added_pattern else []
        if not found or not whole.startswith(prompt[: found[-1].end()]):
            return None
        token, rest = found[-1][0], prompt[found[-1].end() :]
        if (token, rest) not in self._endings:
            ids = self.tokenizer(token + rest, add_special_tokens=False)["input_ids"]
            self._endings[token, rest] = list(ids)  # pyright: ignore
        ids = self._ids[whole]
        places = [place for place, token_id in enumerate(ids) if token_id in self._added_ids]
        if len(places) < len(found):
            return None
        return ids[: places[len(found) - 1]] + self._endings[token, rest]

    def _encode(self, text: str) -> Ids:
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # pyright: ignore
        )

    def _template(self, messages: Seq[Message], tools: Tools, **options: Any) -> Ids:
        try:
            if self._holds_control_token(messages, tools):
                return self._guarded(messages, tools, options)
            text = self._text(messages, tools, **options)
        except REFUSALS as error:
            hint = "look at the order of the roles, and whether it takes a system message or tools"
            raise DataError(f"the chat template refuses this: {error}", hint=hint) from None
        if text in self._ids:
            return list(self._ids[text])
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore

    def _text(
        self, messages: Seq[Message], tools: Tools, *, keep: bool = False, **options: Any
    ) -> str:
        key = (*map(id, messages), id(tools), *options)
        if key in self._texts:
            return self._texts[key]
        text = self._render(messages, tools, options)
        if keep:
            self._texts[key] = text
        return text

    def _render(self, messages: Seq[Message], tools: Tools, options: dict[str, Any]) -> str:
        chat = [message.to_template() for message in messages]
        given = list(tools) or None
        return str(
            self.tokenizer.apply_chat_template(chat, tools=given, tokenize=False, **options)  # pyright: ignore
        )

    def _holds_control_token(self, messages: Seq[Message], tools: Tools) -> bool:
        return any(
            token in text for text in _texts(messages, tools) for token in self._control_tokens
        )

    def _guarded(self, messages: Seq[Message], tools: Tools, options: dict[str, Any]) -> Ids:
        """Control tokens that stand in somebody's text stay text: nobody's words may end a turn."""
        tokenizer: Any = self.tokenizer
        if (
            "sanitize_control_tokens"
            not in inspect.signature(tokenizer.apply_chat_template).parameters
        ):
            _refuse_control_tokens(messages, tools, self._control_tokens)
        else:
            options = {**options, "sanitize_control_tokens": True}
        chat = [message.to_template() for message in messages]
        before = getattr(tokenizer, "chat_control_tokens", None)
        tokenizer.chat_control_tokens = self._control_tokens
        try:
            given = list(tools) or None
            return list(
                tokenizer.apply_chat_template(chat, tools=given, return_dict=False, **options)
            )
        finally:
            tokenizer.chat_control_tokens = before


def _texts(messages: Seq[Message], tools: Tools) -> list[str]:
    """Every text that somebody wrote."""
    texts = [t for m in messages for t in (m.content, m.thinking, m.name, m.tool_call_id) if t]
    nested = [*tools, *(call for m in messages for call in m.tool_calls)]
    return texts + [json.dumps(value, ensure_ascii=False) for value in nested]


def _refuse_control_tokens(messages: Seq[Message], tools: Tools, control_tokens: list[str]) -> None:
    for text in _texts(messages, tools):
        found = next((token for token in control_tokens if token in text), None)
        if found:
            hint = "take it out of the text, or use transformers 5.23 or later, which can tell it"
            raise DataError(f"a text holds the control token {found!r}", hint=hint)
