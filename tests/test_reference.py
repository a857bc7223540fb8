"""The reference goes over the first epoch's trees, or over those of the whole data set.

The oracles: a set of all prefixes counts tokens, plain transformers score one answer at a time.
"""

import math
import re
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import stemtune as st
from stemtune import reference
from stemtune.errors import Interrupted
from stemtune.tree.build import Tree, build_tree
from tests.runs import IGNORED, make_config, metrics_of, steps_of, write_rows
from tests.trees import one_by_one, relative_error

pytestmark = IGNORED
SAID = re.compile(r"once: ([\d,]+) tokens, in micro-batches of the (whole data set|first epoch)")
PERSONAS = [f"You are {name}, and you ask what others take for granted. " for name in ("S", "P")]
SETTINGS = [
    "objective.type=dpo",
    "objective.beta=0.2",
    "train.batch_size=4",
    "train.learning_rate=2e-3",
    "data.eval_fraction=0.2",
    "data.batching=record",
]
LONG, MIDDLE, SHORT = 12, 1, 0  # how often a persona is said: much, some, or little is shared


def pairs(repeats: int) -> list[dict[str, Any]]:
    """Two personas; where they say most, each prompt has two pairs."""
    rows = []
    for number in range(120 if repeats == MIDDLE else 60):
        asked = number // 2 if repeats == LONG else number
        system = {"role": "system", "content": PERSONAS[number % 4 // 2] * repeats or "Be brief."}
        user = {"role": "user", "content": f"{asked} and {asked * 7} of what kind?"}
        good, bad = f"Let us look, {number}: " + "so " * 12, f"{number} I know it " + "no " * 20
        stem = [system, user]
        rows.append(
            {
                "chosen": [*stem, {"role": "assistant", "content": good}],
                "rejected": [*stem, {"role": "assistant", "content": bad}],
            }
        )
    return rows


def distinct(sequences: Iterable[st.Sequence]) -> int:
    """Tokens of one tree: a node for each prefix."""
    ids = [tuple(sequence.input_ids.tolist()) for sequence in sequences]
    return len({path[:end] for path in ids for end in range(1, len(path) + 1)})


def trainer_of(folder: Path, base: Path, repeats: int, *overrides: str) -> st.Trainer:
    config = make_config(folder, base, *SETTINGS, *overrides)
    write_rows(folder / "rows.jsonl", pairs(repeats))
    return st.Trainer(config)


def said(trainer: st.Trainer) -> tuple[int, str]:
    """How many tokens a run says that its reference takes, and of what."""
    found = SAID.findall((trainer.folder.path / "log.txt").read_text(encoding="utf-8"))
    assert len(found) == 1
    return int(found[0][0].replace(",", "")), found[0][1]


def by_step(trainer: st.Trainer) -> int:
    """Distinct tokens of the first epoch's steps, each for itself."""
    first = trainer.plan[: math.ceil(len(trainer.data.train) / 4)]
    assert len(set(chain(*first))) == len(trainer.data.train)
    return sum(distinct(trainer.data.train.of(step)) for step in first)


class Computed:
    """Trees that are run without a gradient, before the first step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        monkeypatch.setattr("stemtune.score.build_tree", self)

    def __call__(self, sequences: Seq[st.Sequence]) -> Tree:
        tree = build_tree(sequences)
        self.sizes.append(tree.num_distinct)
        return tree


def assert_is_the_bases(trainer: st.Trainer, base: Path) -> None:
    """Each stored log-probability is that of an answer by itself, under the base alone."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    stored = load_file(trainer.folder.path / reference.FILE)
    for part in (trainer.data.train, trainer.data.eval):
        for record, number in enumerate(part.numbers.tolist()):
            rows = torch.nonzero(stored["record"] == number).flatten().tolist()
            ends: list[int] = [0, *stored["end"].tolist()]
            ours = stored["logps"][ends[rows[0]] : ends[rows[-1] + 1]]
            with torch.no_grad():
                theirs = one_by_one(model, part.sequences[record])
            assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize(("budget", "window"), [(100_000, 1024), (1500, 1024), (100_000, 16)])
def test_each_stem_of_the_data_set_is_computed_about_once(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, budget: int, window: int
) -> None:
    """Once more where a tree or a window ends, and no more."""
    monkeypatch.setattr(reference, "RECORDS", window)
    ways = [f"train.micro_batch_tokens={budget}"]
    trainer = trainer_of(tmp_path, tiny_base, LONG, *ways)
    train, held_out = trainer.data.train.flat, trainer.data.eval.flat
    steps, ideal = by_step(trainer), distinct(train)
    computed = Computed(monkeypatch)
    trainer.runner.stored = trainer._reference()
    found, whose = said(trainer)
    assert whose == "whole data set" and found == sum(computed.sizes)
    assert max(computed.sizes) <= budget
    cuts = len(computed.sizes) - 2  # one of these trees is that of the held-out rows
    assert cuts == 0 if window == 1024 and budget > ideal else cuts >= 2
    assert 0 <= found - ideal - distinct(held_out) <= cuts * len(train[0])
    assert found - distinct(held_out) < 0.6 * steps
    assert_is_the_bases(trainer, tiny_base)
    trainer.train()
    losses = [line["loss"] for line in steps_of(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics_of(tmp_path / "run")[0]["eval_rewards_margin"] == 0.0


@pytest.mark.parametrize(
    ("repeats", "dtype", "whose"),
    [
        (SHORT, "float32", "first epoch"),
        (MIDDLE, "float32", "whole data set"),
        (MIDDLE, "bfloat16", "first epoch"),
        (LONG, "bfloat16", "whole data set"),
    ],
)
def test_what_saves_little_keeps_its_bits(
    tmp_path: Path, tiny_base: Path, repeats: int, dtype: str, whose: str
) -> None:
    """A tenth of the tokens, and in half precision a quarter, are worth other trees."""
    more = [f"model.dtype={dtype}", "train.num_train_epochs=1"]
    trainer = trainer_of(tmp_path, tiny_base, repeats, *more)
    train = trainer.data.train.flat
    saved = 1 - distinct(train) / by_step(trainer)
    assert {SHORT: 0.0, MIDDLE: 0.12, LONG: 0.3}[repeats] < saved
    assert saved < {SHORT: 0.09, MIDDLE: 0.23, LONG: 1.0}[repeats]
    expected = distinct(train) if whose == "whole data set" else by_step(trainer)
    trainer.train()
    assert said(trainer) == (expected + distinct(trainer.data.eval.flat), whose)
    first, held_out = steps_of(tmp_path / "run")[0], metrics_of(tmp_path / "run")[0]
    assert held_out["eval_rewards_margin"] == 0.0
    if whose == "first epoch":
        assert first["rewards_margin"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6 if dtype == "float32" else 0.02)


def test_a_plan_that_ends_early_takes_its_own_records(tmp_path: Path, tiny_base: Path) -> None:
    trainer = trainer_of(tmp_path, tiny_base, LONG, "train.max_steps=8")
    records = sorted({*chain(*trainer.plan)})
    assert len(records) < len(trainer.data.train)
    trainer.train()
    wanted = distinct(trainer.data.train.of(records)) + distinct(trainer.data.eval.flat)
    assert said(trainer) == (wanted, "whole data set")
    stored = load_file(tmp_path / "run" / reference.FILE)["record"].tolist()
    numbers = trainer.data.train.numbers[records].tolist() + trainer.data.eval.numbers.tolist()
    assert set(stored) == set(numbers)


def test_it_can_be_stopped_between_trees(tmp_path: Path, tiny_base: Path) -> None:
    """What is computed after a stop is what a run computes that nobody stopped."""
    ways = ["train.micro_batch_tokens=1500", "train.max_steps=15"]
    whole = trainer_of(tmp_path / "whole", tiny_base, LONG, *ways)
    whole.train()
    trainer = trainer_of(tmp_path / "parts", tiny_base, LONG, *ways)
    score, calls = trainer.scorer.reference, list[int]()

    def stopping(sequences: Seq[st.Sequence]) -> list[Tensor] | None:
        calls.append(len(sequences))
        trainer.stop.requested = len(calls) == 2
        return score(sequences)

    trainer.scorer.reference = stopping  # type: ignore[method-assign, assignment]
    with pytest.raises(Interrupted):
        trainer.train()
    path = tmp_path / "parts" / "run" / reference.FILE
    assert len(calls) == 2 and sum(calls) < len(trainer.data.train.flat) and not path.exists()
    st.train(trainer.config, resume=True)
    ours, theirs = load_file(path), load_file(tmp_path / "whole" / "run" / reference.FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
