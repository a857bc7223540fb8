"""Preference objectives on a prefix tree equal TRL's on padded rows.

The oracle is TRL: it tokenises, pairs, pads, scores and differentiates for itself. From stemtune it
gets the rows of a step as text, and the adapter's weights; each comparison first makes sure that
both have the same token ids and the same targets.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import stemtune as st
from stemtune.model.adapter import trainable
from stemtune.objectives import OBJECTIVES, Layout, totals_of
from stemtune.plan.pack import count_distinct
from tests.runs import IGNORED, steps_of, write_run_file
from tests.trees import relative_error

pytestmark = [
    *IGNORED,
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),
]
TOLERANCE = 1e-4

# Answers to one prompt begin alike, one is the beginning of the other, or they have nothing in
# common; now the better one is the longer, now the shorter; two rows have the same prompt.
PAIRS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in [
        ("What is virtue?", "I know not, my friend; let us look.", "I know not what you mean."),
        ("What is virtue?", "Nothing.", "Virtue is what the powerful say that it is, no more."),
        ("Can it be taught?", "No. Not at all, I think.", "No."),
        ("Who are you?", "A gadfly, my friend", "A gadfly, my friend, upon a noble horse."),
        ("And whence do you come?", "Yes.", "No!"),
        ("Tell me, Socrates: is it just?", "Let us ask the one who knows.", "学而时习之"),
    ]
]
LABELLED = [
    {"prompt": prompt, "completion": completion, "label": label}
    for prompt, completion, label in [
        ("What is virtue?", "I know not, my friend; let us look.", True),
        ("Can it be taught?", "No.", False),
        ("Who are you?", "A gadfly, my friend, upon a great and noble horse.", True),
        ("What is virtue?", "I know not what you mean.", False),
        ("And whence do you come?", "Yes.", True),
    ]
]


@dataclass(frozen=True)
class Outcome:
    """What a step comes to. Log-probabilities are sums over answers [S]: for pairs first all the
    better ones, then all the worse. Where no objective has a reference, it has none."""

    loss: float
    logps: Tensor
    reference: Tensor | None
    gradients: dict[str, Tensor]


# -- stemtune -------------------------------------------------------------------------------------


class Recorder:
    """The objective of the run file; it keeps what it compares with: the reference's
    log-probabilities as sums over answers, and KTO's baseline."""

    def __init__(self) -> None:
        self.references: list[Tensor] = []
        self.baseline: Tensor | None = None

    def __call__(
        self, logps: Tensor, reference_logps: Tensor | None, layout: Layout, config: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if reference_logps is not None:
            self.references.append(layout.sums(reference_logps))
        self.baseline = layout.baseline
        return OBJECTIVES[config.type][0](logps, reference_logps, layout, config)


class Ours:
    """A run of which a step holds all rows; its adapter has moved away from the reference."""

    def __init__(
        self, folder: Path, base: Path, objective: Any, rows: list[dict[str, Any]], seed: int = 0
    ) -> None:
        # By record: a shuffled order, in which equal prompts need not follow one another.
        overrides = [f"objective={json.dumps(objective)}", "data.batching=record"]
        config = st.load_config(write_run_file(folder, base, rows), overrides)
        self.recorder = Recorder()
        self.trainer = st.Trainer(config, objective=self.recorder)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.trainer.parameters.items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=generator)
        self.sequences = self.trainer.data.train.of(self.trainer.plan[0])
        assert count_distinct(self.sequences) < sum(len(s) for s in self.sequences)
        self.paired = config.answers == "pairs"
        # Numbers of the sequences as an outcome has them. A record's better answer is its first.
        numbers = list(range(len(self.sequences)))
        self.order = numbers[::2] + numbers[1::2] if self.paired else numbers

    def outcome(self, micro_batches: int = 1) -> Outcome:
        """Of the whole step; its sequences come in so many equal parts."""
        totals = totals_of(self.sequences)
        size = len(self.sequences) // micro_batches
        total, sums = 0.0, list[Tensor]()
        for start in range(0, len(self.sequences), size):
            part = self.sequences[start : start + size]
            loss, logps = self.trainer.compute_loss(part, totals, return_outputs=True)
            loss.backward()
            total += loss.item()
            sums += [mine.sum() for mine in logps.detach().split([s.num_targets for s in part])]
        references = self.recorder.references
        return Outcome(
            total,
            torch.stack(sums)[self.order],
            torch.cat(references)[self.order] if references else None,
            gradients(self.trainer.parameters),
        )

    def rows(self) -> list[dict[str, Any]]:
        """The step as TRL wants it: the text of prompts, template included, and of answers."""
        decode = self.trainer.tokenizer.decode
        texts = [
            (decode(s.input_ids[~s.is_target]), decode(s.input_ids[s.is_target]))
            for s in self.sequences
        ]
        if self.paired:
            return [
                {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                for (prompt, chosen), (_, rejected) in zip(texts[::2], texts[1::2], strict=True)
            ]
        return [
            {"prompt": prompt, "completion": answer, "label": sequence.role == "chosen"}
            for (prompt, answer), sequence in zip(texts, self.sequences, strict=True)
        ]


def gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert found.keys() == parameters.keys()
    return found


# -- TRL ------------------------------------------------------------------------------------------


def trl_trainer(name: str, options: dict[str, Any], mine: Ours, folder: Path, base: Path) -> Any:
    """A trainer of TRL's with the same rows and the same adapter."""
    import trl  # here, where its warnings are not errors
    from trl.experimental import cpo, orpo

    home = {"CPO": cpo, "ORPO": orpo}.get(name, trl)
    rows = mine.rows()
    trainer = getattr(home, f"{name}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=getattr(home, f"{name}Config")(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=len(rows),
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    adapter = trainable(trainer.model)
    assert adapter.keys() == mine.trainer.parameters.keys()
    for key, parameter in adapter.items():
        parameter.data.copy_(mine.trainer.parameters[key].data)
    return trainer


def with_reference(trainer: Any, mine: Ours) -> Outcome:
    """DPO and KTO. They tell means only: single answers are overheard from the model."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    require_same_ids(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], mine)
    said: list[Tensor] = []
    hook = trainer.model.register_forward_hook(
        lambda _model, _inputs, outputs: said.append(outputs.log_probs.detach().sum(1))
    )
    loss = trainer.compute_loss(trainer.model, batch)
    hook.remove()
    loss.backward()
    # First the policy, then the reference; each of KTO's begins with the mismatched answers.
    policy, reference = said if mine.paired else said[1::2]
    return Outcome(loss.item(), policy, reference, gradients(trainable(trainer.model)))


def without_reference(trainer: Any, mine: Ours) -> Outcome:
    """CPO, SimPO and ORPO."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    joint = trainer.concatenated_inputs(batch, padding_value=0)
    targets = joint["concatenated_labels"] != -100
    ids, real = joint["concatenated_input_ids"], joint["concatenated_attention_mask"]
    require_same_ids(ids, real, targets, mine)
    loss = trainer.compute_loss(trainer.model, batch)
    chosen, rejected, _, _, nll = trainer.concatenated_forward(trainer.model, batch)
    logps = torch.cat([chosen, rejected]).detach()
    kind = mine.trainer.config.objective[0].type
    if kind == "orpo":
        loss = loss - nll  # TRL's is that of prompt and answer, stemtune's of the answer
    if kind != "cpo":
        logps = logps * targets.sum(1)  # they were means
    loss.backward()
    return Outcome(loss.item(), logps, None, gradients(trainable(trainer.model)))


def require_same_ids(ids: Tensor, real: Tensor, targets: Tensor, mine: Ours) -> None:
    assert len(ids) == len(mine.order)
    for place, number in enumerate(mine.order):
        sequence, kept = mine.sequences[number], real[place].bool()
        assert ids[place][kept].tolist() == sequence.input_ids.tolist()
        assert targets[place][kept].bool().tolist() == sequence.is_target.tolist()


# -- the comparison -------------------------------------------------------------------------------


def require_equal(ours: Outcome, theirs: Outcome) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=TOLERANCE)
    assert ours.logps.tolist() == pytest.approx(theirs.logps.tolist(), rel=TOLERANCE)
    assert (ours.reference is None) == (theirs.reference is None)
    if ours.reference is not None and theirs.reference is not None:
        assert ours.reference.tolist() == pytest.approx(theirs.reference.tolist(), rel=TOLERANCE)
        assert float((ours.logps - ours.reference).abs().min()) > 0.01, "the policy has not moved"
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert relative_error(ours.gradients[name], gradient) < TOLERANCE, name


def dpo(**settings: Any) -> dict[str, Any]:
    return {"type": "dpo", "beta": 0.3, **settings}


# By name: stemtune's objective, and the options of TRL's DPO.
REFERENCED: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpo": (dpo(), {}),
    "another beta": (dpo(beta=0.05), {"beta": 0.05}),
    # What TRL calls "sigmoid" knows no smoothing. With S(z) = -log σ(z) its "robust" is
    # ((1-ε)·S(z) - ε·S(-z)) / (1-2ε); so (1-ε)·S(z) + ε·S(-z) = 2(1-ε)·S(z) - (1-2ε)·robust.
    "label_smoothing": (
        dpo(label_smoothing=0.2),
        {
            "loss_type": ["sigmoid", "robust"],
            "loss_weights": [1.6, -0.6],
            "label_smoothing": 0.2,
        },
    ),
    "robust": (
        dpo(label_smoothing=0.2, robust=True),
        {"loss_type": "robust", "label_smoothing": 0.2},
    ),
    "length: mean": (dpo(length="mean"), {"loss_type": "sigmoid_norm"}),
    "ld_alpha": (dpo(ld_alpha=0.5), {"ld_alpha": 0.5}),
    "ld_alpha: 0": (dpo(ld_alpha=0.0), {"ld_alpha": 0.0}),
    "forward_kl": (dpo(divergence="forward_kl"), {"f_divergence_type": "forward_kl"}),
    "js": (dpo(divergence="js"), {"f_divergence_type": "js_divergence"}),
    # Of u = π/ρ stemtune's score is (1 - u^-α) / α, TRL's (u^(c-1) - 1) / (c-1): c = 1 - α.
    **{
        f"alpha: {alpha}": (
            dpo(divergence="alpha", divergence_alpha=alpha),
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - alpha},
        )
        for alpha in (0.1, 0.5, 1.0)
    },
    "js, length: mean and ld_alpha": (
        dpo(divergence="js", length="mean", ld_alpha=0.5),
        {"f_divergence_type": "js_divergence", "loss_type": "sigmoid_norm", "ld_alpha": 0.5},
    ),
    "alpha, robust and ld_alpha": (
        dpo(
            divergence="alpha", divergence_alpha=0.2, robust=True, label_smoothing=0.1, ld_alpha=0.3
        ),
        {
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.8,
            "loss_type": "robust",
            "label_smoothing": 0.1,
            "ld_alpha": 0.3,
        },
    ),
    "ipo": ({"type": "ipo", "beta": 0.3}, {"loss_type": "ipo"}),
    "hinge": ({"type": "hinge", "beta": 0.3}, {"loss_type": "hinge"}),
    "apo_zero": ({"type": "apo_zero", "beta": 0.3}, {"loss_type": "apo_zero"}),
    "apo_down": ({"type": "apo_down", "beta": 0.3}, {"loss_type": "apo_down"}),
    "sft_weight": (
        dpo(sft_weight=0.4),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]},
    ),
    "sft_weight, of a weight": (
        dpo(weight=0.5, sft_weight=0.4),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 0.2]},
    ),
    "ipo with sft_weight": (
        {"type": "ipo", "beta": 0.3, "sft_weight": 2.0},
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 2.0]},
    ),
    "dpo and ipo": (
        [dpo(weight=0.7), {"type": "ipo", "beta": 0.3, "weight": 0.3}],
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.7, 0.3]},
    ),
    "dpo, apo_down and sft": (
        [
            dpo(weight=0.8, length="mean"),
            {"type": "apo_down", "beta": 0.3, "weight": 0.2},
            {"type": "sft", "weight": 0.5},
        ],
        {
            "loss_type": ["sigmoid_norm", "apo_down", "sft"],
            "loss_weights": [0.8, 0.2, 0.5],
        },
    ),
}

# By name: stemtune's objective, TRL's trainer and its options.
UNREFERENCED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "cpo": ({"type": "cpo", "beta": 0.3}, "CPO", {"beta": 0.3}),
    "cpo with label_smoothing and sft_weight": (
        {"type": "cpo", "beta": 0.05, "label_smoothing": 0.2, "sft_weight": 0.4},
        "CPO",
        {"beta": 0.05, "label_smoothing": 0.2, "cpo_alpha": 0.4},
    ),
    "simpo": (
        {"type": "simpo", "beta": 2.0, "gamma": 1.0},
        "CPO",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "simpo with label_smoothing and sft_weight": (
        {"type": "simpo", "beta": 3.0, "gamma": 0.5, "label_smoothing": 0.1, "sft_weight": 0.4},
        "CPO",
        {
            "loss_type": "simpo",
            "beta": 3.0,
            "simpo_gamma": 0.5,
            "label_smoothing": 0.1,
            "cpo_alpha": 0.4,
        },
    ),
    "orpo": ({"type": "orpo", "beta": 0.5, "sft_weight": 0.0}, "ORPO", {"beta": 0.5}),
}


@pytest.mark.parametrize("name", REFERENCED)
def test_with_a_reference(tmp_path: Path, tiny_base: Path, name: str) -> None:
    objective, options = REFERENCED[name]
    mine = Ours(tmp_path, tiny_base, objective, PAIRS)
    trainer = trl_trainer("DPO", {"beta": 0.3, **options}, mine, tmp_path, tiny_base)
    require_equal(mine.outcome(), with_reference(trainer, mine))


@pytest.mark.parametrize("name", UNREFERENCED)
def test_without_a_reference(tmp_path: Path, tiny_base: Path, name: str) -> None:
    objective, theirs, options = UNREFERENCED[name]
    mine = Ours(tmp_path, tiny_base, objective, PAIRS)
    trainer = trl_trainer(theirs, options, mine, tmp_path, tiny_base)
    require_equal(mine.outcome(), without_reference(trainer, mine))


@pytest.mark.parametrize("name", ["ld_alpha", "ipo", "dpo, apo_down and sft"])
def test_in_micro_batches(tmp_path: Path, tiny_base: Path, name: str) -> None:
    objective, options = REFERENCED[name]
    mine = Ours(tmp_path, tiny_base, objective, PAIRS)
    trainer = trl_trainer("DPO", {"beta": 0.3, **options}, mine, tmp_path, tiny_base)
    require_equal(mine.outcome(micro_batches=3), with_reference(trainer, mine))


@pytest.mark.parametrize(("good", "bad"), [(1.0, 1.0), (0.7, 1.6)])
@pytest.mark.parametrize(("seed", "likelier"), [(0, True), (8, False)])
def test_kto(
    tmp_path: Path, tiny_base: Path, good: float, bad: float, seed: int, likelier: bool
) -> None:
    """With adapters that make mismatched answers likelier, and less likely: that counts as 0."""
    weights = {"desirable_weight": good, "undesirable_weight": bad}
    mine = Ours(tmp_path, tiny_base, {"type": "kto", "beta": 0.3, **weights}, LABELLED, seed)
    prompts = [row["prompt"] for row in mine.rows()]
    # Neighbours with the same prompt are a mismatch to TRL, and none to stemtune.
    assert all(a != b for a, b in zip(prompts, prompts[1:] + prompts[:1], strict=True))
    trainer = trl_trainer("KTO", {"beta": 0.3, **weights}, mine, tmp_path, tiny_base)
    require_equal(mine.outcome(), with_reference(trainer, mine))
    assert mine.recorder.baseline is not None
    assert mine.recorder.baseline.item() > 1 if likelier else mine.recorder.baseline.item() == 0


def test_a_fresh_adapter_has_a_loss_of_ln_2(tmp_path: Path, tiny_base: Path) -> None:
    path = write_run_file(tmp_path, tiny_base, PAIRS)
    settings = ["train.batch_size=4", "train.max_steps=2", "train.warmup_ratio=0"]
    config = st.load_config(path, ["objective={type: dpo, beta: 0.3}", *settings])
    trainer = st.Trainer(config)
    sequences = trainer.data.train.of(trainer.plan[0])
    loss = trainer.compute_loss(sequences, totals_of(sequences))
    assert isinstance(loss, Tensor) and abs(loss.item() - math.log(2)) < 1e-6
    first, second = steps_of(trainer.train().output_dir)
    assert abs(first["loss"] - math.log(2)) < 1e-6
    assert abs(second["loss"] - math.log(2)) > 1e-3, "nothing was learned"
