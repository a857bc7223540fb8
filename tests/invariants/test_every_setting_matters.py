"""Every field of the run file is read, and every setting of a training changes what it says.

What the settings of `data` do is tested with the data.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

import stemtune as st
from stemtune import checkpoint
from stemtune.config import OBJECTIVES, Config, Data, Section, Source
from stemtune.data.prepare import prepare
from stemtune.data.survey import survey
from stemtune.errors import ModelError
from stemtune.evaluate import evaluate_run
from stemtune.model.load import load_tokenizer
from stemtune.model.offload import OffloadedLinear
from stemtune.objectives import totals_of
from stemtune.report.summary import summarise
from stemtune.runfile import sections_in
from tests.runs import (
    IGNORED,
    Spy,
    adapter_of,
    checkpoint_names,
    make_config,
    metrics_of,
    steps_of,
    write_run_file,
)

pytestmark = [
    *IGNORED,
    # tensorboard, of its own protobuf stubs and of numpy.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard"),
]
SHORT = ["train.max_steps=4", "train.batch_size=4"]


def run(folder: Path, base: Path, *overrides: str) -> Path:
    return st.train(make_config(folder, base, *SHORT, *overrides)).output_dir


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The run that others are compared to: four steps of four records."""
    return run(tmp_path_factory.mktemp("plain"), tiny_base)


def column(folder: Path, name: str) -> list[float]:
    return [line[name] for line in steps_of(folder)]


def adapter_vector(folder: Path) -> Tensor:
    adapter = adapter_of(folder / "adapter")
    return torch.cat([adapter[name].flatten() for name in sorted(adapter)])


# -- every field is read ----------------------------------------------------------------------


def sections(section: type[BaseModel] = Config, prefix: str = "") -> dict[type[BaseModel], str]:
    """Every section, with what its fields' names begin with."""
    found = {section: prefix}
    for name, field in section.model_fields.items():
        for inner in sections_in(field.annotation):
            found |= {
                k: v for k, v in sections(inner, f"{prefix}{name}.").items() if k not in found
            }
    return found


def all_fields() -> set[str]:
    return {f"{prefix}{name}" for s, prefix in sections().items() for name in s.model_fields}


def record_reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The fields that are read from here on, other than to copy or to print a run file."""
    names = sections()
    read: set[str] = set()
    get = Section.__getattribute__

    def recorded(section: Section, name: str) -> Any:
        if name in type(section).model_fields:
            caller = sys._getframe(1).f_code.co_filename
            if "pydantic" not in caller and not caller.endswith("runfile.py"):
                read.add(names[type(section)] + name)
        return get(section, name)

    monkeypatch.setattr(Section, "__getattribute__", recorded)
    return read


def train_on_preferences(folder: Path, base: Path) -> None:
    """A step with each objective, the first run's adapter going on in the second."""
    words = ["sea", "lamp", "rope", "gull"]
    rows = [{"prompt": f"{w}?", "chosen": f"the {w}", "rejected": f"no {w}"} for w in words]
    kinds = [kind.model_fields["type"].default for kind in OBJECTIVES]
    for number, kind in enumerate(kinds):
        more = {
            "dpo": "label_smoothing: 0.1, robust: true, divergence: alpha, divergence_alpha: 0.5"
        }
        overrides = [*SHORT, f"objective={{type: {kind}, {more.get(kind, '')}}}"]
        if kind == "plackett_luce":
            overrides.append("data.pairs.mode=all")
        if number:
            overrides.append(f"adapter.init_from={folder / 'preferred-0' / 'run'}")
        here = folder / f"preferred-{number}"
        write_run_file(here, base, rows)
        st.train(st.load_config(here / "run.yaml", [*overrides, f"output.dir={here / 'run'}"]))


def train_on_nothing_finite(folder: Path, base: Path) -> None:
    spy = Spy()

    def objective(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return spy(*arguments)[0] * float("nan"), {}

    overrides = [*SHORT, "train.on_nonfinite=skip", "model.quantization=nf4"]
    st.train(make_config(folder, base, *overrides), objective=objective)


def test_every_field_is_read(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        *SHORT,
        "data.character=A",
        "data.samples=turn",
        "data.eval_fraction=0.2",
        "data.on_bad_row=skip",
        "data.max_length=120",
        "data.on_too_long=trim_context",
        "data.history_turns=4",
        "data.history_tokens=100",
        "data.memories={max_tokens: 100}",
    ]
    turns = [("B", "Who is there? " * 20), ("A", "Nay, answer me."), ("B", "I."), ("A", "Well.")]
    rows = [{"dialogue": [{"role": r, "text": f"{t} {n}"} for r, t in turns]} for n in range(10)]
    run_file = write_run_file(tmp_path, tiny_base, [*rows, {"dialogue": "none"}])
    read = record_reads(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # what is to be pushed stays here
    config = st.load_config(run_file, [*overrides, "output.push_to_hub=nobody/nothing"])
    surveyed = survey(config.data, config.train.seed)
    summarise(prepare(surveyed, load_tokenizer(config.model), config.data), config)
    st.train(config)
    evaluate_run(tmp_path / "run", st.load_config(tmp_path / "run" / "config.yaml"))
    chosen = {"query": "q", "passages": ["p"], "candidates": [{"text": "a", "score": 1.0}]}
    chosen["candidates"].append({"text": "b", "score": 0.0})
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(json.dumps(chosen) + "\n")
    config = st.load_config(run_file, [f"data.path={ranked}", "data.memories=null"])
    prepare(survey(config.data, 0), load_tokenizer(config.model), config.data)
    train_on_preferences(tmp_path, tiny_base)
    train_on_nothing_finite(tmp_path / "nan", tiny_base)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between one try and the next
    with pytest.raises(ModelError, match="can't load 'train' of the dataset"):
        survey(Data(path=Source(path="nobody/nothing")), 0)
    survey(Data(path=str(ranked), eval_path=str(ranked), allow_leaks=True), 0)
    assert all_fields() - read == {"data.card"}  # runfile.py puts its text into data.system
    assert read <= all_fields()


# -- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.lr_scheduler_type=linear", "train.warmup_ratio=0.5"], [0, 0.5, 1, 0.5]),
        (["train.lr_scheduler_type=linear", "train.warmup_ratio=0"], [1, 0.75, 0.5, 0.25]),
        (["train.lr_scheduler_type=constant", "train.warmup_ratio=0.5"], [0, 0.5, 1, 1]),
        (["train.lr_scheduler_type=cosine", "train.warmup_ratio=0.5"], [0, 0.5, 1, 0.5]),
        (["train.lr_scheduler_type=cosine", "train.warmup_ratio=0"], [1, 0.854, 0.5, 0.146]),
    ],
)
def test_learning_rate_schedule_and_warmup(
    tmp_path: Path, tiny_base: Path, overrides: list[str], expected: list[float]
) -> None:
    folder = run(tmp_path, tiny_base, "train.learning_rate=1e-3", *overrides)
    assert column(folder, "lr") == pytest.approx([1e-3 * x for x in expected], rel=1e-2)


def test_the_learning_rate_is_how_far_a_step_goes(tmp_path: Path, tiny_base: Path) -> None:
    """AdamW's first step moves each weight of B, which starts at 0, by the learning rate."""
    overrides = ["train.max_steps=1", "train.warmup_ratio=0", "train.learning_rate=0.003"]
    adapter = adapter_of(run(tmp_path, tiny_base, *overrides) / "adapter")
    moved = torch.cat([t.flatten() for name, t in adapter.items() if "lora_B" in name]).abs()
    assert float(moved.median()) == pytest.approx(0.003, rel=1e-3)
    assert float(moved.max()) <= 0.003 * 1.001


def test_weight_decay_shrinks(tmp_path: Path, tiny_base: Path, plain: Path) -> None:
    decayed = adapter_vector(run(tmp_path, tiny_base, "train.weight_decay=50"))
    assert float(decayed.norm()) < 0.9 * float(adapter_vector(plain).norm())


@pytest.mark.parametrize("limit", [0, 0.01, 0.5, 1000])
def test_max_grad_norm(tmp_path: Path, tiny_base: Path, limit: float) -> None:
    overrides = ["train.max_steps=1", f"train.max_grad_norm={limit}"]
    folder = run(tmp_path, tiny_base, *overrides)
    norm = steps_of(folder)[0]["grad_norm"]
    assert norm > 0.5
    state = checkpoint.newest(folder / "checkpoints")[0].tensors["optimizer"]
    averages = [t.flatten() for name, t in state.items() if name.endswith("/exp_avg")]
    # After one step the average is a tenth of the gradient that AdamW was given.
    given = 10 * float(torch.cat(averages).norm())
    assert given == pytest.approx(min(norm, limit or norm), rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "records"),
    [
        (["train.num_train_epochs=1"], [8, 8, 4]),
        (["train.num_train_epochs=2"], [8, 8, 4] * 2),
        (["train.num_train_epochs=0.5"], [8, 8]),
        (["train.num_train_epochs=1", "train.batch_size=5"], [5, 5, 5, 5]),
        (["train.num_train_epochs=1", "train.batch_size=32"], [20]),
        (["train.num_train_epochs=9", "train.max_steps=2"], [8, 8]),
        (["train.num_train_epochs=1", "train.max_steps=4"], [8, 8, 4, 8]),
    ],
)
def test_steps_and_their_records(
    tmp_path: Path, tiny_base: Path, overrides: list[str], records: list[int]
) -> None:
    folder = st.train(make_config(tmp_path, tiny_base, *overrides)).output_dir
    # The step that has fewer comes where the shuffle puts it.
    assert sorted(column(folder, "records")) == sorted(records)
    assert column(folder, "step") == list(range(1, len(records) + 1))


def test_seed(tmp_path: Path, tiny_base: Path) -> None:
    trainers = [
        st.Trainer(make_config(tmp_path / str(i), tiny_base, *SHORT, f"train.seed={seed}"))
        for i, seed in enumerate([5, 5, 6])
    ]
    plans = [trainer.plan for trainer in trainers]
    starts = [
        torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
        for trainer in trainers
    ]
    assert plans[0] == plans[1] != plans[2]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_seed_and_dropout(tmp_path: Path, tiny_base: Path, plain: Path) -> None:
    folder = run(tmp_path, tiny_base, "adapter.dropout=0.5")
    # The adapter's B starts at zero: dropout shows in the gradient first, then in the loss.
    assert column(folder, "loss")[0] == column(plain, "loss")[0]
    assert column(folder, "grad_norm")[0] != column(plain, "grad_norm")[0]
    again = run(tmp_path / "again", tiny_base, "adapter.dropout=0.5")
    assert column(folder, "loss") == column(again, "loss")


# -- memory: what changes no result -----------------------------------------------------------


@pytest.mark.parametrize(("budget", "calls"), [(100_000, 4), (1, 16)])
def test_micro_batch_tokens(
    tmp_path: Path, tiny_base: Path, plain: Path, budget: int, calls: int
) -> None:
    spy = Spy()
    config = make_config(tmp_path, tiny_base, *SHORT, f"train.micro_batch_tokens={budget}")
    folder = st.train(config, objective=spy).output_dir
    assert spy.calls == calls
    assert column(folder, "loss") == pytest.approx(column(plain, "loss"), abs=1e-5)


def kept_bytes(trainer: st.Trainer) -> int:
    """What a step's forward pass keeps for its backward pass."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    sequences = [s for record in trainer.plan[0] for s in trainer.data.train.sequences[record]]
    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = trainer.compute_loss(sequences, totals_of(sequences))
    del loss
    return sum(kept.values())


def test_activation_checkpointing(tmp_path: Path, tiny_base: Path) -> None:
    overrides = [*SHORT, "adapter.dropout=0.1"]
    trainers = [
        st.Trainer(
            make_config(
                tmp_path / value,
                tiny_base,
                *overrides,
                f"train.activation_checkpointing={value}",
            )
        )
        for value in ("false", "true")
    ]
    passes = []
    for trainer in trainers:
        # Recomputing stops where all is there again: a layer's first half is sure to run.
        layer = trainer.model.get_base_model().model.layers[0].self_attn
        calls: list[int] = []
        layer.register_forward_hook(lambda *_call, calls=calls: calls.append(1))
        kept = kept_bytes(trainer)
        calls.clear()
        trainer.train()
        passes.append((len(calls), kept))
    (calls_off, kept_off), (calls_on, kept_on) = passes
    assert calls_off < calls_on
    assert kept_on < 0.7 * kept_off
    folders = [tmp_path / value / "run" for value in ("false", "true")]
    assert column(folders[0], "loss") == pytest.approx(column(folders[1], "loss"), abs=1e-6)
    norms = [column(folder, "grad_norm") for folder in folders]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_offload_layers(
    tmp_path: Path, tiny_base: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """On a CPU, which is refused otherwise: home and device are one, all else is as on a GPU. What
    a GPU saves is tested in tests/model/test_offload.py."""
    for module in ("stemtune.trainer", "stemtune.model.load"):
        monkeypatch.setattr(f"{module}.require_gpu", lambda *_: None)
    overrides = [f"model.offload_layers={count}", "train.save_steps=2"]
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT, *overrides))
    names = [n for n, m in trainer.model.named_modules() if isinstance(m, OffloadedLinear)]
    assert {name.split(".layers.")[1][0] for name in names} == {str(n) for n in range(count)}
    assert len(names) == 7 * count
    folder = trainer.train().output_dir
    assert column(folder, "loss") == column(plain, "loss")
    assert torch.equal(adapter_vector(folder), adapter_vector(plain))
    # It decides nothing that is trained: a run may go on without it.
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    on = st.train(make_config(tmp_path, tiny_base, *SHORT, "train.save_steps=2"), resume=True)
    assert torch.equal(adapter_vector(on.output_dir), adapter_vector(plain))


@pytest.mark.parametrize("attention", ["segments", "padded"])
def test_attention(tmp_path: Path, tiny_base: Path, plain: Path, attention: str) -> None:
    folder = run(tmp_path, tiny_base, f"model.attention={attention}")
    shared = [a < b for a, b in zip(*(column(folder, n) for n in COUNTS), strict=True)]
    assert all(shared) if attention == "segments" else not any(shared)
    assert column(folder, "loss") == pytest.approx(column(plain, "loss"), abs=1e-5)


COUNTS = ("distinct_tokens", "tokens")


@pytest.mark.parametrize(("wanted", "got"), [("bfloat16", torch.bfloat16), ("auto", None)])
def test_dtype(tmp_path: Path, tiny_base: Path, plain: Path, wanted: str, got: Any) -> None:
    trainer = st.Trainer(make_config(tmp_path, tiny_base, *SHORT, f"model.dtype={wanted}"))
    base = trainer.model.get_base_model()
    assert base.dtype in ((got,) if got else (torch.float32, torch.bfloat16))
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
    folder = trainer.train().output_dir
    assert column(folder, "loss") == pytest.approx(column(plain, "loss"), rel=0.02)
    assert (column(folder, "loss") != column(plain, "loss")) == (base.dtype == torch.bfloat16)
    resolved = st.load_config(folder / "config.yaml").model.dtype
    assert resolved == str(base.dtype).removeprefix("torch.")


# -- the adapter ------------------------------------------------------------------------------


def test_adapter(tmp_path: Path, tiny_base: Path, plain: Path) -> None:
    folder = run(
        tmp_path, tiny_base, "adapter.r=3", "adapter.alpha=12", "adapter.target_modules=[q_proj]"
    )
    shapes = {name: tuple(t.shape) for name, t in adapter_of(folder / "adapter").items()}
    layers = [f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in range(2)]
    assert shapes == {f"{layer}.lora_A.weight": (3, 32) for layer in layers} | {
        f"{layer}.lora_B.weight": (32, 3) for layer in layers
    }
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 12, ["q_proj"])


def test_alpha_scales_the_update(tmp_path: Path, tiny_base: Path) -> None:
    """B starts at 0, so its first gradient is proportional to alpha / r, and A has none."""
    norms = []
    for alpha in (4, 8, 40):
        overrides = ["train.max_steps=1", f"adapter.alpha={alpha}"]
        folder = run(tmp_path / str(alpha), tiny_base, *overrides)
        norms.append(column(folder, "grad_norm")[0])
    assert norms == pytest.approx([norms[0], 2 * norms[0], 10 * norms[0]], rel=1e-4)


# -- what is kept, and who is told ------------------------------------------------------------


@pytest.mark.parametrize(
    ("save_steps", "limit", "expected"),
    [(1, 2, [3, 4]), (1, 9, [1, 2, 3, 4]), (2, 9, [2, 4]), (3, 9, [3, 4]), (50, 1, [4])],
)
def test_save_steps_and_limit(
    tmp_path: Path, tiny_base: Path, save_steps: int, limit: int, expected: list[int]
) -> None:
    overrides = [f"train.save_steps={save_steps}", f"train.save_total_limit={limit}"]
    folder = run(tmp_path, tiny_base, *overrides)
    assert checkpoint_names(folder) == [f"step-{step:06d}" for step in expected]


def test_keep_every(tmp_path: Path, tiny_base: Path) -> None:
    overrides = ["train.save_steps=1", "train.save_total_limit=1", "train.max_steps=7"]
    folder = run(tmp_path, tiny_base, *overrides, "train.keep_every=3")
    assert checkpoint_names(folder) == [f"step-{step:06d}" for step in (3, 6, 7)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.eval_steps=1"], [0, 1, 2, 3, 4]),
        (["train.eval_steps=3"], [0, 3, 4]),
        (["train.eval_steps=50"], [0, 4]),
        (["train.batch_size=10"], [0, 2, 4]),  # 19 records: an epoch has two steps
        (["data.eval_fraction=0"], []),
    ],
)
def test_eval_steps(
    tmp_path: Path, tiny_base: Path, overrides: list[str], expected: list[int]
) -> None:
    folder = run(tmp_path, tiny_base, "data.eval_fraction=0.3", *overrides)
    assert [line["step"] for line in metrics_of(folder) if "eval_loss" in line] == expected


def test_trackers(tmp_path: Path, tiny_base: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ["tracking.trackers=[tensorboard]", "tracking.project=elenchus"]
    folder = run(tmp_path, tiny_base, *overrides, "data.eval_fraction=0.2")
    [events] = (folder / "tensorboard" / "elenchus").glob("events.*")
    told = EventAccumulator(str(events))
    told.Reload()
    seen = [(event.step, event.value) for event in told.Scalars("loss")]
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert [value for _, value in seen] == pytest.approx(column(folder, "loss"))
    assert told.Scalars("eval_loss")[0].step == 0


def test_no_trackers(tmp_path: Path, tiny_base: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folder = run(tmp_path, tiny_base, "tracking.trackers=[]")
    assert not list(folder.glob("tensorboard/*"))
