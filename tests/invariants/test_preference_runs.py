"""Preference runs are what the run file says: trajectories, references, resumes, evaluations.

The oracle is written here with transformers and PEFT alone: one answer at a time, no tree, prompts
by the template, pairs by the scores. Only the order of the rows comes from stemtune.
"""

import json
import logging
import math
import shutil
import struct
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import stemtune as st
from stemtune.errors import ConfigError, Interrupted, ModelError, StemtuneError
from stemtune.evaluate import evaluate_run
from stemtune.objectives import OBJECTIVES
from stemtune.runfile import load_config
from tests.cli.command import stemtune_here
from tests.invariants.test_resume_is_exact import Crash, assert_same_run
from tests.models import save_tiny_model, tiny_model, tiny_tokenizer
from tests.runs import (
    IGNORED,
    QUESTIONS,
    adapter_of,
    dialogue_rows,
    make_config,
    metrics_of,
    run_info,
    steps_of,
    write_rows,
    write_run_file,
)
from tests.trees import one_by_one, relative_error

pytestmark = IGNORED
REFERENCE = "reference.safetensors"
STEPS = 12
BETA = 0.2
LIMIT = 3.5
MODES = ["all", "best_all"]
DPO = ["objective.type=dpo", f"objective.beta={BETA}"]
KTO = ["objective.type=kto", f"objective.beta={BETA}", "objective.undesirable_weight=1.5"]
ALL_PAIRS = "data.pairs.mode=all"
TRAJECTORY = [
    f"train.max_steps={STEPS}",
    "train.seed=3",
    "train.learning_rate=5e-3",
    "train.weight_decay=0.1",
    "train.warmup_ratio=0.25",
    "train.batch_size=4",
    f"train.max_grad_norm={LIMIT}",
]


EVALUATED = [
    "data.eval_fraction=0.3",
    "train.max_steps=6",
    "train.batch_size=4",
    "train.eval_steps=3",
    "train.learning_rate=2e-3",
    "output.final_adapter=last",
]


# -- rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row, and what it means."""

    row: dict[str, Any]
    prompt: list[dict[str, str]]
    answers: list[str]
    scores: list[float]

    def pairs(self, mode: str) -> list[tuple[int, int]]:
        """Each answer with each that has a lower score; or only those of the best."""
        top = max(self.scores)
        return [
            (a, b)
            for a, better in enumerate(self.scores)
            for b, worse in enumerate(self.scores)
            if better > worse and (mode == "all" or better == top)
        ]

    @property
    def best(self) -> list[int]:
        return [n for n, score in enumerate(self.scores) if score == max(self.scores)]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


WORDS = ["gadfly", "horse", "cave", "boat", "flute", "sophist", "city", "cup", "oracle"]


def candidates(question: str, scored: dict[str, float]) -> Case:
    listed = [{"text": text, "score": score} for text, score in scored.items()]
    row = {"query": question, "candidates": listed}
    return Case(row, [user(question)], [*scored], [*scored.values()])


def case_of(number: int) -> Case:
    """Six kinds, over and over. Two rows each ask the same, and are of different kinds."""
    word = WORDS[number * 5 % 9]
    question = f"{QUESTIONS[number % 3]} Say it of the {word}."
    match number % 6:
        case 0:  # alike at their start
            good, bad = f"Let us look at the {word} together {number}.", f"Let us look away {word}."
        case 1:  # one begins the other
            good, bad = f"I know not {word} {number}, my friend.", f"I know not {word}"
        case 2:
            scored = {
                f"A {word}.": 0.9,
                f"A {word} {number} that is slow": 0.2,
                f"{number} No": 0.5,
            }
            return candidates(question, scored)
        case 3:
            stem = [{"role": "system", "content": "You are Socrates."}, user(question)]
            good, bad = f"So tell me what the {word} is.", f"So tell {number}"
            row = {"chosen": [*stem, says(good)], "rejected": [*stem, says(bad)]}
            return Case(row, stem, [good, bad], [1, 0])
        case 4:  # two of them are tied
            scored = {f"{word}? No.": 0.4, f"{word}!": 0.4, f"{word}? Yes {number}": 0.1}
            return candidates(question, {**scored, f"Whoever asks of a {word} has begun.": 2.0})
        case _:  # several that are as good
            row = {
                "prompt": question,
                "chosen": [f"It can, {word}.", f"It can be {number}"],
                "rejected": f"{word} cannot.",
            }
            answers = [*row["chosen"], row["rejected"]]
            return Case(row, [user(question)], answers, [1, 1, 0])
    row = {"prompt": question, "chosen": good, "rejected": bad}
    return Case(row, [user(question)], [good, bad], [1, 0])


def labelled_case(number: int) -> Case:
    """An answer with a label; each third row is a pair."""
    case = case_of(number * 6 % 18)
    good = number % 2 == 0
    if number % 3 == 2:
        return case
    question = f"{QUESTIONS[number % 3]} {WORDS[number // 2]}"
    text = f"{'Let us look' if good else 'I know'} {WORDS[number % 9]} {number}."
    row = {"prompt": question, "completion": text, "label": good}
    return Case(row, [user(question)], [text], [float(good)])


CASES = [case_of(number) for number in range(18)]
LABELLED = [labelled_case(number) for number in range(18)]
KINDS: dict[str, tuple[list[Case], list[str]]] = {
    "dpo": (CASES, [*DPO, ALL_PAIRS]),
    "kto": (LABELLED, KTO),
}


def run_of(folder: Path, base: Path, kind: str, *overrides: str) -> st.Config:
    """The config of a run of this kind."""
    cases, settings = KINDS[kind]
    make_config(folder, base)
    write_rows(folder / "rows.jsonl", [case.row for case in cases])
    return load_config(folder / "run.yaml", [*settings, *overrides])


def going_on(folder: Path, base: Path, start: Path, *overrides: str) -> st.Config:
    """The config of a DPO run that goes on with an adapter, and says nothing of its rank."""
    path = write_run_file(folder, base, [case.row for case in CASES])
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["adapter"] = {"init_from": str(start), "dropout": 0.0}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_config(path, [*DPO, ALL_PAIRS, *overrides])


# -- the oracle -------------------------------------------------------------------------------


Spelled = tuple[list[int], list[list[int]]]


@dataclass
class Judge:
    """Scores answers with a model of transformers or PEFT, one by one."""

    model: nn.Module
    tokenizer: Any
    known: dict[int, Spelled] = field(default_factory=dict[int, Spelled])

    def spelled(self, case: Case) -> Spelled:
        """The ids of a prompt, and of each answer with its end token."""
        if id(case) not in self.known:
            asked = self.tokenizer.apply_chat_template(
                case.prompt, tokenize=False, add_generation_prompt=True
            )
            end = self.tokenizer.eos_token
            self.known[id(case)] = (
                self.tokenizer(asked)["input_ids"],
                [self.tokenizer(text + end)["input_ids"] for text in case.answers],
            )
        return self.known[id(case)]

    def logps(self, prompt: list[int], answer: list[int]) -> Tensor:
        """[L] of an answer's tokens."""
        ids = torch.tensor([prompt + answer])
        logps = self.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]

    def of(self, case: Case) -> list[Tensor]:
        """For each answer of a row, its tokens' log-probabilities."""
        prompt, answers = self.spelled(case)
        return [self.logps(prompt, answer) for answer in answers]

    def quietly(self, case: Case) -> list[Tensor]:
        with torch.no_grad():
            return self.of(case)


def plain_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")


def judge_of(base: Path, adapter: Path | None = None) -> Judge:
    """The base, or an adapter on it, frozen."""
    model = plain_base(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return Judge(model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(base))


def gains(ours: Seq[Tensor], theirs: Seq[Tensor]) -> list[Tensor]:
    """For each answer log π - log ρ."""
    return [(a - b).sum() for a, b in zip(ours, theirs, strict=True)]


def dpo_loss(
    policy: Judge, reference: Judge, cases: Seq[Case], mode: str, sft_weight: float = 0.0
) -> tuple[float, list[float]]:
    """Mean over the pairs of all rows, and the margin of each; the gradient is added up."""
    pairs = sum(len(case.pairs(mode)) for case in cases)
    tokens = sum(len(policy.spelled(case)[1][n]) for case in cases for n in case.best)
    total, margins = 0.0, []
    for case in cases:
        ours = policy.of(case)
        h = gains(ours, reference.quietly(case))
        z = torch.stack([BETA * (h[a] - h[b]) for a, b in case.pairs(mode)])
        loss = softplus(-z).sum() / pairs
        loss = loss - sft_weight * sum(ours[n].sum() for n in case.best) / tokens
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
        margins += z.tolist()
    return total, margins


def kto_loss(policy: Judge, reference: Judge, cases: Seq[Case]) -> tuple[float, list[float]]:
    """Mean over answers; z is measured on each row's prompt with the answers of the row before."""
    moved = []
    for case, before in zip(cases, [cases[-1], *cases[:-1]], strict=True):
        prompt, answers = policy.spelled(case)[0], policy.spelled(before)[1]
        if prompt == policy.spelled(before)[0]:
            continue
        with torch.no_grad():
            for ids in answers:
                h = policy.logps(prompt, ids) - reference.logps(prompt, ids)
                moved.append(h.sum().item())
    zero = max(0.0, sum(moved) / len(moved)) if moved else 0.0
    count = sum(len(case.answers) for case in cases)
    total = 0.0
    for case in cases:
        h = gains(policy.of(case), reference.quietly(case))
        parts = [
            torch.sigmoid(-BETA * (gain - zero))
            if score == 1
            else 1.5 * torch.sigmoid(BETA * (gain - zero))
            for gain, score in zip(h, case.scores, strict=True)
        ]
        loss = torch.stack(parts).sum() / count
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    return total, [zero]


def plain_loop(
    base: Path,
    steps: Seq[Seq[Case]],
    config: st.Config,
    loss_of: Callable[..., tuple[float, list[float]]],
    start: Path | None = None,
) -> dict[str, Any]:
    """Losses, margins, gradient norms and the adapter of a run, by the book."""
    train = config.train
    model = plain_base(base)
    if start is None:
        torch.manual_seed(train.seed)
        lora = LoraConfig(
            r=config.adapter.r,
            lora_alpha=config.adapter.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    else:
        model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    reference = judge_of(base, start)
    policy = Judge(model.train(), reference.tokenizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=train.learning_rate, weight_decay=train.weight_decay
    )
    warmup = math.ceil(train.warmup_ratio * len(steps))
    scheduler = get_scheduler("cosine", optimizer, warmup, len(steps))
    losses, margins, norms = [], [], []
    for cases in steps:
        loss, told = loss_of(policy, reference, cases)
        losses.append(loss)
        margins.append(told)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    adapter = {
        name.replace(".default", ""): p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {"losses": losses, "margins": margins, "norms": norms, "adapter": adapter}


def steps_in(config: st.Config, cases: Seq[Case]) -> list[list[Case]]:
    """The rows of each step of a run."""
    trainer = st.Trainer(config)
    part = trainer.data.train
    trainer.folder.release()
    return [[cases[part.place(record).line - 1] for record in step] for step in trainer.plan]


def held_out(trainer: st.Trainer, cases: Seq[Case]) -> list[Case]:
    """The rows that a run evaluates on."""
    part = trainer.data.eval
    assert len(part) >= 3, "too few rows are held out: the test would show nothing"
    return [cases[part.place(record).line - 1] for record in range(len(part))]


def flat(adapter: dict[str, Tensor]) -> Tensor:
    return torch.cat([adapter[name].flatten() for name in sorted(adapter)])


def accuracy(margins: Seq[float]) -> float:
    return sum(margin > 0 for margin in margins) / len(margins)


def mean(values: Seq[float]) -> float:
    return math.fsum(values) / len(values)


class Counting:
    """An objective of stemtune's that counts the micro-batches that are trained."""

    def __init__(self, name: str) -> None:
        self.function = OBJECTIVES[name][0]
        self.calls = 0

    def __call__(self, logps: Tensor, *rest: Any) -> Any:
        self.calls += logps.requires_grad
        return self.function(logps, *rest)


# -- trajectories -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_the_book(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    """Plain runs, by kind and mode."""
    done: dict[tuple[str, str], dict[str, Any]] = {}

    def run(kind: str, mode: str) -> dict[str, Any]:
        if (kind, mode) not in done:
            folder = tmp_path_factory.mktemp("plan")
            config = run_of(folder, tiny_base, kind, *TRAJECTORY, f"data.pairs.mode={mode}")
            steps = steps_in(config, KINDS[kind][0])
            loss = partial(dpo_loss, mode=mode) if kind == "dpo" else kto_loss
            done[kind, mode] = plain_loop(tiny_base, steps, config, loss)
        return done[kind, mode]

    return run


def assert_equals_the_book(run: Path, expected: dict[str, Any]) -> None:
    lines = steps_of(run)
    assert [line["loss"] for line in lines] == pytest.approx(expected["losses"], abs=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(expected["norms"], rel=1e-4)
    ours, theirs = adapter_of(run / "adapter"), expected["adapter"]
    assert ours.keys() == theirs.keys()
    assert relative_error(flat(ours), flat(theirs)) < 1e-4


WAYS = [
    (100_000, "segments", 1),
    (150, "segments", None),
    (1, "segments", 4),
    (100_000, "padded", 1),
    (500, "padded", None),
    (1, "padded", 4),
]


@pytest.mark.parametrize(
    ("kind", "mode", "budget", "backend", "calls"),
    [
        *[("dpo", "all", *way) for way in WAYS],
        *[("dpo", "best_all", *way) for way in (WAYS[1], WAYS[5])],
        *[("kto", "best_worst", *way) for way in (WAYS[1], WAYS[5])],
    ],
)
def test_trajectory(
    tmp_path: Path,
    tiny_base: Path,
    by_the_book: Any,
    kind: str,
    mode: str,
    budget: int,
    backend: str,
    calls: int | None,
) -> None:
    expected = by_the_book(kind, mode)
    ways = [f"train.micro_batch_tokens={budget}", f"model.attention={backend}"]
    config = run_of(tmp_path, tiny_base, kind, *TRAJECTORY, f"data.pairs.mode={mode}", *ways)
    spy = Counting(kind)
    lines = steps_of(st.train(config, objective=spy).output_dir)
    records = [line["records"] for line in lines]
    assert set(records) == {4, 2}
    if calls:  # the answers to a prompt are never torn apart: one a record at most
        assert spy.calls == sum(min(calls, count) for count in records)
    else:
        assert len(lines) < spy.calls < sum(records)
    assert_equals_the_book(tmp_path / "run", expected)
    if kind == "dpo":
        margins = [mean(found) for found in expected["margins"]]
        assert [line["rewards_margin"] for line in lines] == pytest.approx(margins, abs=1e-5)
        won = [accuracy(found) for found in expected["margins"]]
        assert [line["rewards_accuracy"] for line in lines][2:] == pytest.approx(won[2:])
        # Warm-up begins at a rate of 0: in two steps the policy is its reference, bit for bit.
        assert [line["rewards_margin"] for line in lines[:2]] == [0.0, 0.0]
        assert [line["rewards_accuracy"] for line in lines[:2]] == [0.5, 0.5]


def test_the_trajectories_show_something(by_the_book: Any) -> None:
    for mode in MODES:
        found = by_the_book("dpo", mode)
        assert found["losses"][0] == pytest.approx(math.log(2))
        assert found["losses"][-1] < 0.4, "nothing was learned"
        assert min(found["norms"]) < LIMIT < max(found["norms"]), "clipping must matter in some"
    modes = [flat(by_the_book("dpo", mode)["adapter"]) for mode in MODES]
    assert relative_error(*modes) > 1e-2, "the modes must differ"
    zeros = [zero for (zero,) in by_the_book("kto", "best_worst")["margins"]]
    assert max(zeros) > 0.1, "the baseline must count"
    assert {len(case.answers) for case in CASES} == {2, 3, 4}


def test_dpo_with_an_sft_term(tmp_path: Path, tiny_base: Path) -> None:
    """Two sums, each divided by what the step has of its own: pairs, and tokens of best answers."""
    settings = [*TRAJECTORY, "objective.sft_weight=0.3"]
    config = run_of(tmp_path / "plan", tiny_base, "dpo", *settings)
    loss = partial(dpo_loss, mode="all", sft_weight=0.3)
    expected = plain_loop(tiny_base, steps_in(config, CASES), config, loss)
    settings += ["train.micro_batch_tokens=150"]
    assert_equals_the_book(
        st.train(run_of(tmp_path, tiny_base, "dpo", *settings)).output_dir, expected
    )


# -- adapter.init_from ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A finished SFT run whose adapter is far from the base, and unlike what run files ask for."""
    folder = tmp_path_factory.mktemp("start")
    settings = [
        "adapter.r=3",
        "adapter.alpha=9",
        "adapter.target_modules=[q_proj, v_proj, down_proj]",
        "train.max_steps=10",
        "train.learning_rate=2e-2",
        "train.seed=7",
    ]
    return st.train(make_config(folder, tiny_base, *settings)).output_dir


def test_training_goes_on_from_the_adapter(tmp_path: Path, tiny_base: Path, start: Path) -> None:
    more = ["objective={type: sft}", "data.eval_fraction=0.3", "train.max_steps=3"]
    config = going_on(tmp_path, tiny_base, start, *more)
    write_rows(tmp_path / "rows.jsonl", dialogue_rows())
    trainer = st.Trainer(config)
    first = trainer.data.train.of(trainer.plan[0])
    others = trainer.data.eval.flat
    trainer.train()
    assert others, "nothing is held out"
    saved = judge_of(tiny_base, start / "adapter").model
    expected = [float(-one_by_one(saved, part).mean()) for part in (others, first)]
    evaluated, stepped = metrics_of(tmp_path / "run")[:2]
    assert (evaluated["step"], stepped["step"]) == (0, 1)
    found = [evaluated["eval_loss"], stepped["loss"]]
    assert found == pytest.approx(expected, rel=1e-5)
    base = float(-one_by_one(judge_of(tiny_base).model, first).mean())
    assert abs(base - expected[1]) > 0.1, "the start must differ from the base"


def test_the_adapter_is_the_reference(tmp_path: Path, tiny_base: Path, start: Path) -> None:
    config = going_on(tmp_path / "plan", tiny_base, start, *TRAJECTORY)
    adapter = start / "adapter"
    loss = partial(dpo_loss, mode="all")
    expected = plain_loop(tiny_base, steps_in(config, CASES), config, loss, adapter)
    assert expected["losses"][0] == pytest.approx(math.log(2))
    assert expected["losses"][-1] < 0.5
    for folder, more in {
        "stored": ["train.micro_batch_tokens=150"],
        "live": ["objective.reference=live"],
        "adapter": ["model.attention=padded"],  # init_from may also name the adapter itself
    }.items():
        begun = adapter if folder == "adapter" else start
        config = going_on(tmp_path / folder, tiny_base, begun, *TRAJECTORY, *more)
        run = st.train(config).output_dir
        assert_equals_the_book(run, expected)
        assert (run / REFERENCE).exists() == (folder != "live")
    stored = logps_by_line(tmp_path / "stored" / "run", config)
    assert relative_error(stored, all_logps(judge_of(tiny_base, adapter))) < 1e-5
    assert relative_error(stored, all_logps(judge_of(tiny_base))) > 0.1, "it differs from the base"


def all_logps(judge: Judge) -> Tensor:
    """Of every token of every answer, row by row."""
    return torch.cat([logps for case in CASES for logps in judge.quietly(case)])


def logps_by_line(run: Path, config: st.Config) -> Tensor:
    """What a run stored of its reference, row by row: nothing is held out, so that a record's
    number is its row's."""
    assert not config.data.eval_fraction
    tensors = load_file(run / REFERENCE)
    assert sorted(set(tensors["record"].tolist())) == list(range(len(CASES)))
    assert tensors["record"].tolist() == sorted(tensors["record"].tolist())
    return tensors["logps"]


def test_a_fresh_adapter_has_the_base_as_its_reference(tmp_path: Path, tiny_base: Path) -> None:
    config = run_of(tmp_path, tiny_base, "dpo", "train.max_steps=5", "train.batch_size=4")
    stored = logps_by_line(st.train(config).output_dir, config)
    assert relative_error(stored, all_logps(judge_of(tiny_base))) < 1e-5


def test_what_such_a_run_leaves(tmp_path: Path, tiny_base: Path, start: Path) -> None:
    """An adapter of the same rank, scale and modules; nothing of the frozen copy."""
    run = st.train(going_on(tmp_path, tiny_base, start, "train.max_steps=3")).output_dir
    before, after = (
        json.loads((folder / "adapter" / "adapter_config.json").read_text())
        for folder in (start, run)
    )
    assert (after["r"], after["lora_alpha"]) == (3, 9)
    assert sorted(after["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    assert sorted(before["target_modules"]) == sorted(after["target_modules"])
    written = yaml.safe_load((run / "config.yaml").read_text())["adapter"]
    assert (written["r"], written["alpha"]) == (3, 9)
    assert written["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    names = {path.name for path in (start / "adapter").iterdir()} | {"accuracy.png"}
    assert {path.name for path in (run / "adapter").iterdir()} == names
    ours, theirs = adapter_of(run / "adapter"), adapter_of(start / "adapter")
    assert ours.keys() == theirs.keys()
    assert all(not torch.equal(ours[name], theirs[name]) for name in theirs), "it was not trained"
    loaded = PeftModel.from_pretrained(plain_base(tiny_base), str(run / "adapter"))
    assert [*loaded.peft_config] == ["default"]
    assert not [name for name, _ in loaded.named_parameters() if "start" in name]


def test_the_start_is_left_as_it_was(tmp_path: Path, tiny_base: Path, start: Path) -> None:
    files = {path: path.read_bytes() for path in sorted(start.rglob("*")) if path.is_file()}
    st.train(going_on(tmp_path, tiny_base, start, "train.max_steps=2"))
    assert {path: path.read_bytes() for path in files} == files
    assert sorted(path for path in start.rglob("*") if path.is_file()) == list(files)


def refusal(config_of: Callable[[], st.Config], run: Path) -> StemtuneError:
    """The error of a run, which leaves nothing behind."""
    with pytest.raises(StemtuneError) as caught:
        st.train(config_of())
    assert caught.value.hint and caught.value.where
    assert "\n" not in caught.value.what
    assert not run.exists()
    return caught.value


def test_a_start_that_is_not_there(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stemtune.trainer.load_model", no_loading)
    run = tmp_path / "run"
    error = refusal(partial(going_on, tmp_path, tiny_base, tmp_path / "nowhere"), run)
    assert isinstance(error, ConfigError)
    assert "no adapter" in error.what and "nowhere" in error.where
    (tmp_path / "empty").mkdir()
    error = refusal(partial(going_on, tmp_path, tiny_base, tmp_path / "empty"), run)
    assert isinstance(error, ConfigError) and "no adapter" in error.what


def copied(start: Path, folder: Path) -> Path:
    """The adapter of a run, elsewhere."""
    shutil.copytree(start / "adapter", folder)
    return folder


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": {"ba'])
def test_a_start_whose_facts_are_damaged(
    tmp_path: Path, tiny_base: Path, start: Path, text: str
) -> None:
    spoilt = copied(start, tmp_path / "spoilt")
    (spoilt / "stemtune.json").write_text(text)
    error = refusal(partial(going_on, tmp_path, tiny_base, spoilt), tmp_path / "run")
    assert str(spoilt) in error.where


@pytest.mark.parametrize("text", ["[]", "null", '{"r": 3', '{"r": 3}'])
def test_a_start_whose_config_is_damaged(
    tmp_path: Path, tiny_base: Path, start: Path, text: str
) -> None:
    spoilt = copied(start, tmp_path / "spoilt")
    (spoilt / "adapter_config.json").write_text(text)
    config = going_on(tmp_path, tiny_base, spoilt)
    with pytest.raises(StemtuneError) as caught:
        st.train(config)
    assert str(spoilt) in caught.value.where and caught.value.hint


def test_a_start_that_is_no_lora(tmp_path: Path, tiny_base: Path) -> None:
    layers = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = get_peft_model(plain_base(tiny_base), IA3Config(task_type="CAUSAL_LM", **layers))
    model.save_pretrained(str(tmp_path / "ia3"), save_embedding_layers=False)
    with pytest.raises(StemtuneError) as caught:
        st.train(going_on(tmp_path, tiny_base, tmp_path / "ia3"))
    assert str(tmp_path / "ia3") in caught.value.where and caught.value.hint


def test_a_start_of_pefts_whose_modules_are_a_pattern(tmp_path: Path, tiny_base: Path) -> None:
    """What the run leaves can be read again: by `eval`, which takes the run's own config."""
    lora = LoraConfig(r=2, target_modules=r".*\.(q|v)_proj", task_type="CAUSAL_LM")
    model = get_peft_model(plain_base(tiny_base), lora)
    model.save_pretrained(str(tmp_path / "pattern"), save_embedding_layers=False)
    settings = [*EVALUATED, "train.max_steps=2"]
    run = st.train(going_on(tmp_path, tiny_base, tmp_path / "pattern", *settings)).output_dir
    written = yaml.safe_load((run / "config.yaml").read_text())["adapter"]
    assert written["r"] == 2
    assert written["target_modules"] in (r".*\.(q|v)_proj", ["q_proj", "v_proj"])
    config = load_config(run / "config.yaml")
    line = evaluations(run)[-1]
    assert evaluate_run(run, config).figures["loss"] == pytest.approx(line["eval_loss"], abs=1e-6)


def test_a_start_that_is_needed_no_more(tmp_path: Path, tiny_base: Path, start: Path) -> None:
    """Supervised training has no reference: its run can be scored when the start is gone."""
    gone = copied(start, tmp_path / "gone")
    more = [*EVALUATED, "objective={type: sft}", "train.max_steps=2"]
    run = st.train(going_on(tmp_path, tiny_base, gone, *more)).output_dir
    shutil.rmtree(gone)
    figures = evaluate_run(run, load_config(run / "config.yaml")).figures
    assert figures["loss"] == pytest.approx(evaluations(run)[-1]["eval_loss"], abs=1e-6)


def no_loading(*_: Any) -> Any:
    raise AssertionError("weights were loaded")


@pytest.mark.parametrize("override", ["adapter.r=4", "adapter.alpha=10", "adapter.layers=1"])
def test_another_rank_or_scale(
    tmp_path: Path,
    tiny_base: Path,
    start: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
) -> None:
    monkeypatch.setattr("stemtune.trainer.load_model", no_loading)
    error = refusal(partial(going_on, tmp_path, tiny_base, start, override), tmp_path / "run")
    assert isinstance(error, ConfigError)
    key = override.partition("=")[0]
    assert error.where == key and key in error.hint


def test_other_modules(
    tmp_path: Path, tiny_base: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the rank: what the run file says is not passed over in silence."""
    monkeypatch.setattr("stemtune.trainer.load_model", no_loading)
    override = "adapter.target_modules=[k_proj]"
    error = refusal(partial(going_on, tmp_path, tiny_base, start, override), tmp_path / "run")
    assert isinstance(error, ConfigError)
    assert error.where == "adapter.target_modules"


def test_what_agrees_may_be_said(tmp_path: Path, tiny_base: Path, start: Path) -> None:
    more = ["adapter.r=3", "adapter.alpha=9", "adapter.target_modules=[v_proj, down_proj, q_proj]"]
    run = st.train(going_on(tmp_path, tiny_base, start, *more, "train.max_steps=1")).output_dir
    assert adapter_of(run / "adapter").keys() == adapter_of(start / "adapter").keys()


def test_a_start_of_another_base(
    tmp_path: Path, tiny_base: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other-base"
    save_tiny_model(other, "qwen3")
    with monkeypatch.context() as patched:
        patched.setattr("stemtune.trainer.load_model", no_loading)
        error = refusal(partial(going_on, tmp_path, other, start), tmp_path / "run")
    assert isinstance(error, ModelError)
    assert "another base" in error.what and str(tiny_base) in error.hint
    # PEFT's folder alone does not name the base reliably: the shapes tell.
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((start / "adapter" / name).read_bytes())
    wide = tmp_path / "wide-base"
    save_wide(wide)
    with pytest.raises(ModelError) as caught:
        st.train(going_on(tmp_path, wide, bare))
    assert "can't load the adapter" in caught.value.what
    assert caught.value.where == str(bare) and caught.value.hint


def save_wide(folder: Path) -> None:
    """A base whose layers have other shapes."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    tiny_model(
        "llama", len(tokenizer), intermediate_size=40, eos_token_id=end, pad_token_id=end
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- stored and live --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stored_and_live_are_one_run(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    settings = ["train.max_steps=20", "train.batch_size=4", "adapter.dropout=0.1"]
    settings += ["data.batching=record", "data.eval_fraction=0.2", "train.eval_steps=4"]
    settings += ["output.final_adapter=last"]
    runs = {}
    for way in ("stored", "live"):
        more = [f"objective.reference={way}"]
        runs[way] = st.train(run_of(tmp_path / way, tiny_base, kind, *settings, *more)).output_dir
    assert [(run / REFERENCE).exists() for run in runs.values()] == [True, False]
    stored, live = (steps_of(run) for run in runs.values())
    assert len(stored) == 20
    first = [line["step"] for line in stored if line["epoch"] <= 1]
    assert 3 <= len(first) <= 5
    for name in ("loss", "grad_norm", "rewards_chosen", "rewards_rejected"):
        ours, theirs = ([line.get(name) for line in lines] for lines in (stored, live))
        # Its trees are those over which the stored one was computed.
        assert ours[: len(first)] == theirs[: len(first)]
        there = [value is not None for value in theirs]
        assert [value is not None for value in ours] == there and any(there)
        paired = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
        assert [a for a, _ in paired] == pytest.approx([b for _, b in paired], rel=1e-4, abs=1e-6)
    losses = [[line["loss"] for line in lines] for lines in (stored, live)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][0], "nothing was learned"
    evaluated = [
        [line["eval_loss"] for line in metrics_of(run) if "eval_loss" in line]
        for run in runs.values()
    ]
    assert len(evaluated[0]) == 6 and evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)
    ours, theirs = (flat(adapter_of(run / "adapter")) for run in runs.values())
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.usefixtures("smollm2")
def test_stored_and_live_are_one_run_of_a_real_base(tmp_path: Path) -> None:
    settings = ["train.max_steps=5", "train.batch_size=2", "train.learning_rate=2e-3"]
    runs = {}
    for way in ("stored", "live"):
        more = [*settings, f"objective.reference={way}"]
        config = run_of(tmp_path / way, Path("smollm2"), "dpo", *more)
        runs[way] = steps_of(st.train(config).output_dir)
    losses = [[line["loss"] for line in lines] for lines in runs.values()]
    assert len(losses[0]) == 5 and losses[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < 0.9 * math.log(2), "nothing was learned"


# -- resumes ----------------------------------------------------------------------------------

SHORT = [
    "adapter.dropout=0.05",
    "data.eval_fraction=0.2",
    "train.max_steps=9",
    "train.batch_size=4",
    "train.eval_steps=3",
    "train.save_steps=4",
]
RESUMED = ["dpo", "kto", "init_from", "live", "micro-batches", "bfloat16"]


def short_run(kind: str, folder: Path, base: Path, start: Path) -> st.Config:
    match kind:
        case "init_from":
            return going_on(folder, base, start, *SHORT)
        case "live":
            return run_of(folder, base, "dpo", *SHORT, "objective.reference=live")
        case "micro-batches":
            return run_of(folder, base, "dpo", *SHORT, "train.micro_batch_tokens=1")
        case "bfloat16":
            return run_of(folder, base, "dpo", *SHORT, "model.dtype=bfloat16")
        case _:
            return run_of(folder, base, kind, *SHORT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, start: Path) -> Any:
    """Uninterrupted runs, by kind."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            config = short_run(kind, tmp_path_factory.mktemp("whole"), tiny_base, start)
            done[kind] = st.train(config).output_dir
        return done[kind]

    return run


def assert_same_reference(run: Path, expected: Path) -> None:
    ours, theirs = load_file(run / REFERENCE), load_file(expected / REFERENCE)
    assert ours.keys() == theirs.keys() == {"record", "end", "logps"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def crash_in(config: st.Config, step: int) -> None:
    """A run that ends in the middle of a step."""
    name = config.objective[0].type
    function = OBJECTIVES[name][0]

    def crashing(logps: Tensor, *rest: Any) -> Any:
        if logps.requires_grad and trainer.progress.step == step - 1:
            raise Crash
        return function(logps, *rest)

    trainer = st.Trainer(config, objective=crashing)
    with pytest.raises(Crash):
        trainer.train()


@pytest.mark.parametrize("kind", RESUMED)
def test_a_crash_between_checkpoints(
    tmp_path: Path, tiny_base: Path, start: Path, whole: Any, kind: str
) -> None:
    """Without its file the reference is computed anew: of the start, not of what is trained."""
    config = short_run(kind, tmp_path, tiny_base, start)
    crash_in(config, 7)
    run, stored, kept = tmp_path / "run", kind != "live", kind == "micro-batches"
    assert metrics_of(run)[-1]["step"] == 6
    assert (run / REFERENCE).exists() == stored
    if not kept:
        (run / REFERENCE).unlink(missing_ok=True)
    trainer = st.Trainer(config, resume=True)
    assert trainer.progress.step in (4, 6)  # 6 as well, where it was the best so far
    trainer.train()
    assert_same_run(run, whole(kind))
    if stored:
        assert_same_reference(run, whole(kind))


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("kind", ["dpo", "kto", "init_from"])
def test_a_stop_between_steps(
    tmp_path: Path, tiny_base: Path, start: Path, whole: Any, kind: str, step: int
) -> None:
    config = short_run(kind, tmp_path, tiny_base, start)
    function = OBJECTIVES[config.objective[0].type][0]

    def stopping(logps: Tensor, *rest: Any) -> Any:
        if logps.requires_grad and trainer.progress.step == step - 1:
            trainer.stop.requested = True
        return function(logps, *rest)

    trainer = st.Trainer(config, objective=stopping)
    trainer.stop.requested = step == 0  # while the reference is computed
    with pytest.raises(Interrupted):
        trainer.train()
    assert run_info(tmp_path / "run")["state"] == "interrupted"
    assert (tmp_path / "run" / REFERENCE).exists() == (step > 0)
    st.train(config, resume=True)
    assert_same_run(tmp_path / "run", whole(kind))
    assert_same_reference(tmp_path / "run", whole(kind))


def other_weights(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def other_scale(adapter: Path) -> None:
    """The same weights, which count twice as much."""
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "lora_alpha": 2 * values["lora_alpha"]}))


@pytest.mark.parametrize("change_it", [other_weights, other_scale])
def test_a_resume_with_another_start_is_refused(
    tmp_path: Path, tiny_base: Path, start: Path, change_it: Callable[[Path], None]
) -> None:
    moved = copied(start, tmp_path / "moved")
    crash_in(short_run("init_from", tmp_path, tiny_base, start), 7)
    config = going_on(tmp_path, tiny_base, moved, *SHORT)  # elsewhere, and the same
    st.Trainer(config, resume=True).folder.release()
    change_it(moved)
    with pytest.raises(ConfigError, match=r"adapter\.init_from") as caught:
        st.Trainer(config, resume=True)
    assert caught.value.hint


def test_a_run_goes_on_with_the_other_kind_of_reference(
    tmp_path: Path, tiny_base: Path, start: Path, whole: Any
) -> None:
    config = short_run("dpo", tmp_path, tiny_base, start)
    crash_in(config, 7)
    config = short_run("live", tmp_path, tiny_base, start)
    st.train(config, resume=True)
    ours, theirs = (steps_of(run) for run in (tmp_path / "run", whole("dpo")))
    losses = [[line["loss"] for line in lines] for lines in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# -- a reference that was spoilt --------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nonsense(path: Path) -> None:
    path.write_bytes(b"not what was written " * 40)


def change(path: Path, name: str) -> None:
    """One bit in the middle of one tensor's bytes."""
    content = bytearray(path.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    first, last = json.loads(content[8 : 8 + size])[name]["data_offsets"]
    item = 4 if name == "logps" else 8
    content[8 + size + first + (last - first) // (2 * item) * item] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": truncate,
    "empty": empty,
    "nonsense": nonsense,
    "log-probabilities": partial(change, name="logps"),
    "ends": partial(change, name="end"),
    "records": partial(change, name="record"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_reference_is_computed_anew(
    tmp_path: Path,
    tiny_base: Path,
    start: Path,
    whole: Any,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    config = short_run("dpo", tmp_path, tiny_base, start)
    crash_in(config, 7)
    run = tmp_path / "run"
    before = (run / REFERENCE).read_bytes()
    DAMAGE[damage](run / REFERENCE)
    assert (run / REFERENCE).read_bytes() != before
    caplog.clear()
    st.train(config, resume=True)
    warned = [entry for entry in caplog.records if entry.levelno == logging.WARNING]
    assert [REFERENCE in entry.message for entry in warned] == [True]
    assert_same_run(run, whole("dpo"))
    assert_same_reference(run, whole("dpo"))


def test_a_reference_of_other_data(tmp_path: Path, tiny_base: Path, start: Path) -> None:
    """Left by a run that crashed before its first checkpoint; then the rows changed."""
    crash_in(short_run("dpo", tmp_path, tiny_base, start), 2)
    run = tmp_path / "run"
    assert (run / REFERENCE).exists() and not (run / "checkpoints").exists()
    content = (run / REFERENCE).read_bytes()
    config = load_config(tmp_path / "run.yaml", [*DPO, ALL_PAIRS, *SHORT])
    write_rows(tmp_path / "rows.jsonl", [case.row for case in CASES[::-1]])
    with pytest.raises(ConfigError) as caught:
        st.train(config)
    assert "other data" in caught.value.what
    assert caught.value.where == str(run / REFERENCE)
    assert "delete it" in caught.value.hint
    assert (run / REFERENCE).read_bytes() == content
    (run / REFERENCE).unlink()  # as the hint says
    st.train(config)


def test_a_reference_of_another_start(tmp_path: Path, tiny_base: Path, start: Path) -> None:
    crash_in(short_run("dpo", tmp_path, tiny_base, start), 2)
    with pytest.raises(ConfigError) as caught:
        st.train(short_run("init_from", tmp_path, tiny_base, start))
    assert caught.value.where == str(tmp_path / "run" / REFERENCE) and caught.value.hint


def test_a_reference_that_lacks_rows(tmp_path: Path, tiny_base: Path, start: Path) -> None:
    """Of a run that was to be shorter: it is computed anew, for all rows."""
    settings = [*SHORT, "data.batching=record"]
    crash_in(run_of(tmp_path, tiny_base, "dpo", *settings, "train.max_steps=2"), 2)
    run = tmp_path / "run"
    known = set(load_file(run / REFERENCE)["record"].tolist())
    assert known < set(range(len(CASES)))
    config = run_of(tmp_path, tiny_base, "dpo", *settings)
    st.train(config)
    assert set(load_file(run / REFERENCE)["record"].tolist()) == set(range(len(CASES)))
    expected = st.train(run_of(tmp_path / "whole", tiny_base, "dpo", *settings)).output_dir
    assert_same_run(run, expected)


# -- evaluation -------------------------------------------------------------------------------


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(run) if "eval_loss" in line]


def pair_figures(
    policy: Judge, reference: Judge | None, cases: Seq[Case], mode: str = "all"
) -> dict[str, float]:
    """By the definition: each pair's margin of rewards, and of log-probabilities alone."""
    margins, plain, normed = [], [], []
    for case in cases:
        ours = policy.quietly(case)
        theirs = reference.quietly(case) if reference else [torch.zeros(1)] * len(ours)
        h = gains(ours, theirs)
        for a, b in case.pairs(mode):
            margins.append(BETA * float(h[a] - h[b]))
            plain.append(float(ours[a].sum() - ours[b].sum()))
            normed.append(float(ours[a].mean() - ours[b].mean()))
    return {
        "rewards_margin": mean(margins),
        "rewards_accuracy": accuracy(margins),
        "logps_accuracy": accuracy(plain),
        "mean_logps_accuracy": accuracy(normed),
    }


def some(found: dict[str, Any], names: Any, prefix: str = "") -> dict[str, float]:
    return {name: found[prefix + name] for name in names}


@pytest.mark.parametrize("begun", [False, True])
def test_evaluation_during_training(
    tmp_path: Path, tiny_base: Path, start: Path, begun: bool
) -> None:
    if begun:
        config = going_on(tmp_path, tiny_base, start, *EVALUATED)
    else:
        config = run_of(tmp_path, tiny_base, "dpo", *EVALUATED)
    trainer = st.Trainer(config)
    cases = held_out(trainer, CASES)
    run = trainer.train().output_dir
    lines = evaluations(run)
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert lines[0]["eval_loss"] == pytest.approx(math.log(2))
    assert lines[0]["eval_rewards_margin"] == 0.0, "the same trees, the same bits"
    assert lines[0]["eval_rewards_accuracy"] == 0.5
    reference = judge_of(tiny_base, start / "adapter" if begun else None)
    policy = judge_of(tiny_base, run / "adapter")
    expected = pair_figures(policy, reference, cases)
    assert some(lines[-1], expected, "eval_") == pytest.approx(expected, abs=1e-4)
    loss, margins = dpo_loss(policy, reference, cases, "all")
    assert lines[-1]["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert abs(loss - math.log(2)) > 0.01 and max(map(abs, margins)) > 0.05, "nothing moved"
    assert not [name for name in lines[-1] if "/" in name], "there is only one source"
    # The same afterwards, from what the run left.
    figures = evaluate_run(run, load_config(run / "config.yaml")).figures
    told = {k.removeprefix("eval_"): v for k, v in lines[-1].items() if k != "step"}
    assert figures == pytest.approx(told, rel=1e-5, abs=1e-6)
    # And the base, which has no reference.
    figures = evaluate_run(run, load_config(run / "config.yaml"), base=True).figures
    base = pair_figures(judge_of(tiny_base), None, cases)
    wanted = ("logps_accuracy", "mean_logps_accuracy")
    assert some(figures, wanted) == pytest.approx(some(base, wanted))
    assert figures.keys() <= told.keys()


def test_evaluation_of_several_sources(tmp_path: Path, tiny_base: Path) -> None:
    sources = {"plays.jsonl": CASES[:9], "letters.jsonl": CASES[9:]}
    more = [f"data.path=[{', '.join(sources)}]", "data.eval_fraction=0.5"]
    run_of(tmp_path, tiny_base, "dpo")
    for name, cases in sources.items():
        write_rows(tmp_path / name, [case.row for case in cases])
    config = load_config(tmp_path / "run.yaml", [*DPO, ALL_PAIRS, *EVALUATED, *more])
    trainer = st.Trainer(config)
    places = [trainer.data.eval.place(record) for record in range(len(trainer.data.eval))]
    by_source = {
        name: [cases[place.line - 1] for place in places if place.file.name == name]
        for name, cases in sources.items()
    }
    assert all(len(cases) >= 2 for cases in by_source.values())
    run = trainer.train().output_dir
    line = evaluations(run)[-1]
    policy, reference = judge_of(tiny_base, run / "adapter"), judge_of(tiny_base)
    expected: dict[str, float] = {}
    for name, cases in by_source.items():
        mine = pair_figures(policy, reference, cases)
        expected[f"eval_rewards_accuracy/{name}"] = mine["rewards_accuracy"]
        expected[f"eval_rewards_margin/{name}"] = mine["rewards_margin"]
    assert {k: v for k, v in line.items() if "/" in k} == pytest.approx(expected, abs=1e-4)
    both = pair_figures(policy, reference, [case for cases in by_source.values() for case in cases])
    assert some(line, both, "eval_") == pytest.approx(both, abs=1e-4)
    outcome = stemtune_here("eval", run, "--json", cwd=tmp_path)
    assert outcome.code == 0
    told = json.loads(outcome.out)
    assert told.pop("eval_records") == len(places)
    del line["step"]
    assert told == pytest.approx(line, rel=1e-5, abs=1e-6)


def test_evaluation_of_kto(tmp_path: Path, tiny_base: Path) -> None:
    trainer = st.Trainer(run_of(tmp_path, tiny_base, "kto", *EVALUATED))
    cases = held_out(trainer, LABELLED)
    run = trainer.train().output_dir
    line = evaluations(run)[-1]
    policy, reference = judge_of(tiny_base, run / "adapter"), judge_of(tiny_base)
    loss, _ = kto_loss(policy, reference, cases)
    assert line["eval_loss"] == pytest.approx(loss, abs=1e-5)
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for case in cases:
        h = gains(policy.quietly(case), reference.quietly(case))
        for gain, score in zip(h, case.scores, strict=True):
            rewards[score == 1].append(BETA * float(gain))
    assert all(rewards.values()), "both kinds of answers must be held out"
    assert line["eval_rewards_chosen"] == pytest.approx(mean(rewards[True]), abs=1e-4)
    assert line["eval_rewards_rejected"] == pytest.approx(mean(rewards[False]), abs=1e-4)
    figures = evaluate_run(run, load_config(run / "config.yaml")).figures
    told = {k.removeprefix("eval_"): v for k, v in line.items() if k != "step"}
    assert figures == pytest.approx(told, rel=1e-5, abs=1e-6)
    figures = evaluate_run(run, load_config(run / "config.yaml"), base=True).figures
    sums: dict[bool, list[float]] = {True: [], False: []}
    for case in cases:
        for logps, score in zip(reference.quietly(case), case.scores, strict=True):
            sums[score == 1].append(float(logps.sum()))
    assert "loss" not in figures, "it takes a reference"
    assert figures["logps_chosen"] == pytest.approx(mean(sums[True]), rel=1e-5)
    assert figures["logps_rejected"] == pytest.approx(mean(sums[False]), rel=1e-5)


def test_evaluation_without_a_reference(tmp_path: Path, tiny_base: Path) -> None:
    """SimPO: its rewards are means of log-probabilities, and the base has a loss too."""
    settings = [*EVALUATED, "objective={type: simpo, beta: 2.0, gamma: 0.5}"]
    config = run_of(tmp_path, tiny_base, "dpo", *settings)
    trainer = st.Trainer(config)
    cases = held_out(trainer, CASES)
    run = trainer.train().output_dir
    assert not (run / REFERENCE).exists()

    def expected(judge: Judge) -> dict[str, float]:
        margins = [
            2.0 * float(ours[a].mean() - ours[b].mean())
            for case in cases
            for ours in [judge.quietly(case)]
            for a, b in case.pairs("all")
        ]
        loss = mean([math.log1p(math.exp(0.5 - margin)) for margin in margins])
        return {
            "loss": loss,
            "rewards_margin": mean(margins),
            "rewards_accuracy": accuracy(margins),
        }

    ours, base = expected(judge_of(tiny_base, run / "adapter")), expected(judge_of(tiny_base))
    assert some(evaluations(run)[-1], ours, "eval_") == pytest.approx(ours, abs=1e-4)
    assert some(evaluations(run)[0], base, "eval_") == pytest.approx(base, abs=1e-4)
    config = load_config(run / "config.yaml")
    assert some(evaluate_run(run, config).figures, ours) == pytest.approx(ours, abs=1e-4)
    assert some(evaluate_run(run, config, base=True).figures, base) == pytest.approx(base, abs=1e-4)
