"""Replies, streamed: the prompt is rendered as in training, and the same tokens end an answer."""

import copy
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import TextIteratorStreamer

from stemtune.data.records import Message
from stemtune.data.renderer import Renderer
from stemtune.score import autocast
from stemtune.tree.logprobs import base_model


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn. Temperature 0 takes the likeliest token each time."""

    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.05
    max_new_tokens: int = 256
    seed: int | None = None


def stream_reply(
    model: PeftModel,
    renderer: Renderer,
    messages: Seq[Message],
    sampling: Sampling,
    *,
    adapter: bool = True,
) -> Iterator[str]:
    """Pieces of text as they come.

    Args:
        messages: the conversation so far, the last one the user's.
        adapter: false to hear the base instead.
    """
    base = base_model(model)
    ids = torch.tensor([renderer.prompt(messages)], device=base.device)
    streamer = TextIteratorStreamer(renderer.tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore
    drawn = sampling.temperature > 0
    options: dict[str, Any] = {
        "do_sample": drawn,
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": stop_ids(base, renderer),
        "pad_token_id": renderer.tokenizer.eos_token_id,
    }
    if drawn:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            with autocast(model), nullcontext() if adapter else model.disable_adapter():
                base.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    yield from _without_opening(streamer, renderer.opening)
    thread.join()
    if failure:
        raise failure[0]


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
