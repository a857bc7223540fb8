"""Scores a finished run: its held-out records, one by one and together."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from stemtune.config import Config
from stemtune.data.prepare import Part, prepare
from stemtune.data.records import Place
from stemtune.data.survey import survey
from stemtune.errors import DataError
from stemtune.figures import Figures, held_out_figures, losses_by_record
from stemtune.model.adapter import adapter_folder, add_start, starting_point
from stemtune.model.save import load_adapter
from stemtune.objectives import terms_of
from stemtune.score import Scorer
from stemtune.tree.sequence import Sequence


@dataclass(frozen=True)
class RecordLoss:
    """A record and the loss of each of its targets."""

    place: Place
    text: str
    """Its last trained turn, as it was tokenised."""
    losses: list[float]

    @property
    def mean(self) -> float:
        """Loss over its targets."""
        return math.fsum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Scores:
    """What a run's records come to."""

    records: list[RecordLoss]
    figures: Figures
    """See `stemtune.figures`."""


def evaluate_run(
    folder: Path, config: Config, *, base: bool = False, train_data: bool = False
) -> Scores:
    """Score a run's held-out (or training) records, with its adapter or without.

    Raises:
        DataError: nothing was held out.
        ModelError: there is no adapter.
    """
    model, tokenizer, part = load_run(folder, config, train_data=train_data)
    budget = config.train.micro_batch_tokens
    assert budget != "auto", "a run's own config.yaml is resolved"
    scorer = Scorer(model, config, config.model.attention, budget)
    logps = scorer.part_logps(part, adapter=not base)
    references = None
    if scorer.has_reference and not base:
        add_start(model, config.adapter)
        with starting_point(model):
            references = scorer.part_logps(part)
    figures = held_out_figures(part, scorer, terms_of(config.objective), logps, references)
    return Scores(_records(part, losses_by_record(part, logps), tokenizer), figures)


def load_run(
    folder: Path, config: Config, *, train_data: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase, Part]:
    """A run's adapter on its base, its tokenizer, and its held-out (or training) records.

    Raises:
        DataError: nothing was held out.
        ModelError: there is no adapter.
    """
    surveyed = survey(config.data, config.train.seed)
    model, tokenizer, _ = load_adapter(adapter_folder(folder), config.model.device)
    data = prepare(surveyed, tokenizer, config.data, answers=config.answers)
    part = data.train if train_data else data.eval
    if not len(part):
        hint = "set data.eval_fraction or data.eval_path; or score --train-data"
        raise DataError("this run has no held-out records", where=str(folder), hint=hint)
    return model, tokenizer, part


def _records(
    part: Part, losses: list[list[float]], tokenizer: PreTrainedTokenizerBase
) -> list[RecordLoss]:
    return [
        RecordLoss(part.place(record), _trained_text(part.sequences[record][-1], tokenizer), values)
        for record, values in enumerate(losses)
    ]


def _trained_text(sequence: Sequence, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a sequence trains last."""
    ids, mask = sequence.input_ids, sequence.is_target
    start = int(np.flatnonzero(~mask)[-1]) + 1
    return str(tokenizer.decode(ids[start:].tolist(), skip_special_tokens=True))
