"""Replies, streamed: the prompt is rendered as in training, and the same tokens end an answer."""

import copy
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from stemtune.data.records import Message
from stemtune.data.renderer import Renderer
from stemtune.sampling import Sampling
from stemtune.score import autocast
from stemtune.tree.logprobs import base_model


@dataclass
class Counts:
    """How long a prompt and its reply are.

    Attributes:
        new_tokens: of the reply, the token that ends it included.
        stopped_by: `end`, the model ended it; `length`, it has `max_new_tokens`; `interrupt`,
            nobody listened any more.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    stopped_by: Literal["end", "length", "interrupt"] = "interrupt"


def stream_reply(
    model: PeftModel,
    renderer: Renderer,
    messages: Seq[Message],
    sampling: Sampling,
    *,
    adapter: bool = True,
    counts: Counts | None = None,
) -> Generator[str]:
    """Pieces of text as they come. Closed early, it stops the model at its next token.

    Args:
        messages: the conversation so far, the last one the user's.
        adapter: false to hear the base instead.
        counts: filled by the end of the reply.
    """
    base = base_model(model)
    counts = Counts() if counts is None else counts
    ids = torch.tensor([renderer.prompt(messages)], device=base.device)
    counts.prompt_tokens = ids.shape[1]
    ends = stop_ids(base, renderer)
    unheard = Event()
    streamer = TextIteratorStreamer(renderer.tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore
    drawn = sampling.temperature > 0
    options: dict[str, Any] = {
        "do_sample": drawn,
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": ends,
        "pad_token_id": renderer.tokenizer.eos_token_id,
        "stopping_criteria": StoppingCriteriaList([_Unheard(unheard)]),
    }
    if drawn:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        options |= {"top_k": sampling.top_k, "min_p": sampling.min_p or None}
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            with autocast(model), nullcontext() if adapter else model.disable_adapter():
                whole: Any = base.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options
                )
            counts.new_tokens = whole.shape[1] - counts.prompt_tokens
            if int(whole[0, -1]) in ends:
                counts.stopped_by = "end"
            elif counts.new_tokens == sampling.max_new_tokens:
                counts.stopped_by = "length"
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from _without_opening(streamer, renderer.opening)
    finally:
        unheard.set()
        thread.join()
    if failure:
        raise failure[0]


class _Unheard(StoppingCriteria):
    """Ends a reply that nobody listens to any more."""

    def __init__(self, unheard: Event) -> None:
        self.unheard = unheard

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore
        """[1] whether to stop."""
        return torch.full(
            (len(input_ids),), self.unheard.is_set(), dtype=torch.bool, device=input_ids.device
        )


def stop_ids(base: Any, renderer: Renderer) -> list[int]:
    """The tokens that end a reply: those of training, and the base's own."""
    own: int | list[int] | None = base.generation_config.eos_token_id
    more = own if isinstance(own, list) else [] if own is None else [own]
    return sorted(renderer.stop_ids().union(more))


def generation_config(base: Any, renderer: Renderer) -> str:
    """The text of a `generation_config.json`: the base's own, sampling and all, with the tokens
    that end a reply as it was trained."""
    config, tokenizer = copy.deepcopy(base.generation_config), renderer.tokenizer
    config.eos_token_id = stop_ids(base, renderer)
    if config.pad_token_id is None:
        pad: Any = tokenizer.pad_token_id
        config.pad_token_id = renderer.eos if pad is None else pad
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    return str(config.to_json_string(keys_to_pop=["compile_config", "_from_model_config"]))


def _without_opening(pieces: Iterator[str], opening: str) -> Iterator[str]:
    """A reply without the blanks that the template writes before an answer."""
    begun = not opening
    for piece in pieces:
        text = piece if begun else piece.lstrip()
        begun = begun or bool(text)
        if text or not opening:
            yield text


def fit_history(
    messages: list[Message], renderer: Renderer, max_length: int, max_new_tokens: int
) -> list[Message]:
    """The conversation without its oldest turns, as far as prompt and reply need the room."""
    system = [m for m in messages[:1] if m.role == "system"]
    turns = messages[len(system) :]
    while len(turns) > 1 and len(renderer.prompt([*system, *turns])) + max_new_tokens > max_length:
        turns = turns[2:]  # a question and its answer
    return [*system, *turns]
