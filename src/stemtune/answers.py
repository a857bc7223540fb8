"""Answers that a run gives to its held-out prompts, and how good they are."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel

from stemtune.config import Config
from stemtune.data.overlap import exact_match, rouge_l, token_f1
from stemtune.data.records import Place
from stemtune.data.renderer import Renderer
from stemtune.errors import ConfigError
from stemtune.evaluate import load_run
from stemtune.generate import stop_ids
from stemtune.metrics import track
from stemtune.score import autocast
from stemtune.tree.logprobs import base_model
from stemtune.tree.sequence import Ids, Sequence

Judge = Callable[[str, str, str, str], float]
"""`judge(prompt, answer, other, reference) -> float`: 1 if the answer is better than the other one,
0 if it is worse, or how sure the judge is of that; 0.5 is a tie."""


@dataclass(frozen=True)
class Answered:
    """A held-out prompt, and what was answered.

    Attributes:
        prompt: as the model sees it, without special tokens.
        reference: the answer of the data; of a preference the best one.
        other: the base's answer, where a judge compares.
        win: what the judge says of the answer against the base's.
    """

    place: Place
    prompt: str
    answer: str
    reference: str
    other: str = ""
    win: float | None = None

    def scores(self) -> dict[str, float]:
        """How close the answer is to the reference, and whether it wins."""
        found = {
            "exact_match": exact_match(self.answer, self.reference),
            "f1": token_f1(self.answer, self.reference),
            "rouge_l": rouge_l(self.answer, self.reference),
        }
        return found if self.win is None else {**found, "win_rate": self.win}


def answer_run(
    folder: Path,
    config: Config,
    *,
    base: bool = False,
    limit: int | None = None,
    max_new_tokens: int = 256,
    judge: Judge | None = None,
) -> list[Answered]:
    """Answer the held-out prompts of a run, always with the likeliest token.

    Args:
        base: without the adapter.
        limit: only the first records.
        judge: compares each answer with the base's.

    Raises:
        DataError: nothing was held out.
        ModelError: there is no adapter.
    """
    model, tokenizer, part = load_run(folder, config)
    renderer = Renderer(tokenizer, config.data.template)
    answers: list[Answered] = []
    for record in track(range(len(part))[:limit], "answering"):
        prompt, reference = _split(_best(part.sequences[record]))
        answer = _generate(model, renderer, prompt, max_new_tokens, adapter=not base)
        shown = _text(renderer, prompt)
        answered = Answered(part.place(record), shown, answer, _text(renderer, reference))
        if judge is not None:
            other = _generate(model, renderer, prompt, max_new_tokens, adapter=False)
            win = float(judge(shown, answer, other, answered.reference))
            answered = Answered(answered.place, shown, answer, answered.reference, other, win)
        answers.append(answered)
    return answers


def answer_figures(answers: list[Answered]) -> dict[str, float]:
    """Means over all answers."""
    scores = [answered.scores() for answered in answers]
    names = scores[0] if scores else {}
    return {f"answer_{name}": sum(s[name] for s in scores) / len(scores) for name in names}


def _best(sequences: list[Sequence]) -> Sequence:
    """Of answers that are compared the best one, of a dialogue the last turn."""
    beaten = {worse for sequence in sequences for worse in sequence.preferred_to}
    return [s for s in sequences if s.role == "answer" or s.answer not in beaten][-1]


def _split(sequence: Sequence) -> tuple[Ids, Ids]:
    """The prompt of the last trained turn, and its answer."""
    start = int(np.flatnonzero(~sequence.is_target)[-1]) + 1
    return sequence.input_ids[:start], sequence.input_ids[start:]


def _text(renderer: Renderer, ids: Ids) -> str:
    return str(renderer.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()


def _generate(
    model: PeftModel, renderer: Renderer, prompt: Ids, max_new_tokens: int, *, adapter: bool
) -> str:
    ids = torch.from_numpy(prompt.copy())[None].to(base_model(model).device)
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stop_ids(base_model(model), renderer),
        "pad_token_id": renderer.tokenizer.eos_token_id,
    }
    with torch.no_grad(), autocast(model), nullcontext() if adapter else model.disable_adapter():
        whole = base_model(model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **options
        )
    return _text(renderer, whole[0, ids.shape[1] :].cpu().numpy())


def load_judge(name: str) -> Judge:
    """A judge by its name: `file.py:function` or `package.module:function`.

    Raises:
        ConfigError: there is no such function.
    """
    place, _, function = name.rpartition(":")
    hint = "name a function as file.py:function or package.module:function"
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location("stemtune_judge", place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found = getattr(module, function)
    except (ImportError, AttributeError, ValueError, OSError, SyntaxError) as error:
        raise ConfigError(f"there is no such judge: {error}", where=name, hint=hint) from None
    if not callable(found):
        raise ConfigError("a judge is a function", where=name, hint=hint)
    return cast(Judge, found)
