"""What fits a memory, and what is advised where a run does not: each checked by estimating it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

import stemtune as st
from stemtune import fit
from stemtune.config import Config
from stemtune.data.prepare import prepare
from stemtune.data.survey import survey
from stemtune.estimate import SIMULATIONS, NoEstimateError, Simulation, with_dtype
from stemtune.fit import Fit, Workload
from stemtune.report.memory import memory_of
from tests.cli.command import Outcome, refused, stemtune_here
from tests.models import tiny_tokenizer
from tests.runs import IGNORED, make_config, run_info, write_run_file

pytestmark = IGNORED
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9

# From their config.json on the Hub; the counts are those of their weight files.
LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
SMALL = LlamaConfig(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=12,
    num_attention_heads=4,
)
QWEN_25_7B = Qwen2Config(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


def described(folder: Path, shape: PreTrainedConfig) -> Path:
    """A base without weights."""
    shape.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def long_rows(count: int = 12) -> list[dict[str, Any]]:
    """Rows of about a thousand tokens that share nothing."""
    return [
        {"context": f"{number} What is virtue?", "target": f"{number} I know not. " * 60}
        for number in range(count)
    ]


def run_file(folder: Path, base: Path, **sections: dict[str, Any]) -> Path:
    path = write_run_file(folder, base, long_rows())
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, section in sections.items():
        values[name] = values[name] | section
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def on_gpu(folder: Path, base: Path) -> Path:
    """The run file of a GPU, all `auto`."""
    path = run_file(folder, base, train={"micro_batch_tokens": "auto", "batch_size": 8})
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["model"] = {"base": str(base)}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def fit_of(path: Path, device: torch.device, memory: int) -> tuple[Fit, Config]:
    config = with_dtype(st.load_config(path), device)
    data = prepare(survey(config.data, 0), tiny_tokenizer(), config.data, answers=config.answers)
    plan = [list(range(config.train.batch_size))]
    return Fit(Workload(data.train, plan, config), device, memory), config


@pytest.mark.parametrize(
    ("shape", "count"), [(LLAMA_3_8B, 8_030_261_248), (QWEN_25_7B, 7_615_616_512)]
)
def test_weights_are_counted(tmp_path: Path, shape: PreTrainedConfig, count: int) -> None:
    path = on_gpu(tmp_path, described(tmp_path / "base", shape))
    asked = stemtune_here("check", path, "--json", "--device-memory", "80GiB", cwd=tmp_path)
    found = json.loads(asked.out)["memory"]
    buffers = found["estimate"]["base"] - 2 * count  # of bfloat16
    assert 0 < buffers < 10_000 and found["fits"]


def test_a_large_base_fits_10_gb(tmp_path: Path) -> None:
    path = on_gpu(tmp_path, described(tmp_path / "base", QWEN_25_7B))
    asked = stemtune_here("check", path, "--json", "--device-memory", "10GB", cwd=tmp_path)
    assert asked.code == 0, asked.err
    found = json.loads(asked.out)["memory"]
    assert found["available"] == 10 * GB and not found["fits"]
    weights, checkpointing, last = found["changes"]
    assert weights["settings"] == {"model.quantization": "nf4"}
    assert weights["total"] > 10 * GB
    together = {"model.quantization": "nf4", "train.activation_checkpointing": True}
    assert checkpointing["settings"] == together
    assert checkpointing["total"] < 10 * GB
    budget = last["settings"].pop("train.micro_batch_tokens")
    assert last["settings"] == together and budget % 512 == 0
    assert checkpointing["total"] < last["total"] < 10 * GB
    # What was advised is what a run with these settings comes to.
    overrides = ["model.quantization=nf4", "train.activation_checkpointing=true"]
    overrides.append(f"train.micro_batch_tokens={budget}")
    config = st.load_config(path, overrides)
    data = prepare(survey(config.data, 0), tiny_tokenizer(), config.data)
    again = memory_of(config, data, 10 * GB)
    assert again.fits and again.estimate is not None
    assert again.estimate.total == pytest.approx(last["total"], rel=0.01)
    text = stemtune_here("check", path, "--device-memory", "10GB", cwd=tmp_path).out
    assert "does not fit into 10.00 GB on cuda" in text
    assert f"train.micro_batch_tokens={budget}" in text


def test_weights_are_offloaded_where_all_else_is_not_enough(tmp_path: Path) -> None:
    path = on_gpu(tmp_path, described(tmp_path / "base", LLAMA_3_8B))
    fitting, config = fit_of(path, CUDA, 7 * GB)
    changes = fitting.advise(config, 4096)
    last = dict(changes[-1].settings)
    assert last.pop("train.micro_batch_tokens") % fit.SMALLEST == 0
    assert last["model.offload_layers"] == 32 and "model.quantization" not in last
    assert "adapter.layers" not in last and "data.max_length" not in last
    assert changes[-1].total <= 7 * GB * fit.SAFE
    # Where nf4 and the like are enough, it is not spoken of; nor to one who has a quantized base.
    fitting, config = fit_of(path, CUDA, 12 * GB)
    assert not any("model.offload_layers" in c.settings for c in fitting.advise(config, 4096))
    packed = st.load_config(path, ["model.quantization=nf4", "model.dtype=bfloat16"])
    fitting = Fit(fitting.work, CUDA, 7 * GB)
    assert not any("model.offload_layers" in c.settings for c in fitting.advise(packed, 4096))


def test_single_settings_that_are_enough(tmp_path: Path) -> None:
    path = run_file(tmp_path, described(tmp_path / "base", SMALL))
    everything, config = fit_of(path, CPU, 10**12)
    whole = everything.estimate(config, 100_000)
    memory = int((whole.total - whole.activations * 0.7) / fit.SAFE)
    changes = fit_of(path, CPU, memory)[0].advise(config, 100_000)
    names = [name for change in changes for name in change.settings]
    assert names[:2] == ["train.micro_batch_tokens", "train.activation_checkpointing"]
    assert all(change.total <= memory * fit.SAFE for change in changes)
    budget = changes[0].settings["train.micro_batch_tokens"]
    assert changes[0].total == everything.estimate(config, budget).total


def test_nothing_helps(tmp_path: Path, tiny_base: Path) -> None:
    fitting, config = fit_of(run_file(tmp_path, tiny_base), CPU, 1000)
    assert fitting.largest_budget(config) is None
    assert fitting.advise(config, 512) == []


def test_the_largest_budget_fits_and_the_next_does_not(tmp_path: Path, tiny_base: Path) -> None:
    path = run_file(tmp_path, tiny_base, train={"batch_size": 8})
    everything, config = fit_of(path, CPU, 10**12)
    most = everything.largest_budget(config)
    assert most is not None and most % fit.SMALLEST == 0
    assert everything.work.tokens <= most < everything.work.tokens + fit.SMALLEST
    whole = everything.estimate(config, most)
    memory = int((whole.total - whole.activations / 2) / fit.SAFE)
    budget = fit_of(path, CPU, memory)[0].largest_budget(config)
    assert budget is not None and budget < most
    totals = [everything.estimate(config, n).total for n in (budget, budget + fit.SMALLEST)]
    assert totals[0] <= memory * fit.SAFE < totals[1]


def test_a_run_says_and_keeps_it(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path, tiny_base, "train.max_steps=1", "train.micro_batch_tokens=auto")
    trainer = st.Trainer(config)
    budget = trainer.scorer.budget
    assert budget % fit.SMALLEST == 0
    run = trainer.train().output_dir
    memory = run_info(run)["memory"]
    assert memory["free"] > memory["estimate"]["total"] > 0
    assert memory["used"] > 0 and memory["peak"] >= 0  # of a process that has run others
    said = (run / "log.txt").read_text(encoding="utf-8")
    assert said.count("memory: about") == 1
    assert st.load_config(run / "config.yaml").train.micro_batch_tokens == budget


def test_a_run_that_does_not_seem_to_fit(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stemtune.setup.free_memory", lambda _: 1000)
    config = make_config(tmp_path, tiny_base, "train.max_steps=1", "train.micro_batch_tokens=auto")
    trainer = st.Trainer(config)
    assert trainer.scorer.budget == fit.SMALLEST
    trainer.folder.release()
    assert "does not seem to fit" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


@pytest.fixture
def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a base computes depends on numbers."""

    def depends(*_: object, **__: object) -> None:
        raise NoEstimateError("it depends on numbers")

    monkeypatch.setattr(Simulation, "activations", depends)


def test_a_base_that_trains_padded(tmp_path: Path) -> None:
    """It has an estimate, of padded micro-batches, and is said to share nothing."""
    from tests.models import save_tiny_model

    save_tiny_model(tmp_path / "base", "mamba")
    path = write_run_file(tmp_path, tmp_path / "base")
    shown = stemtune_here("check", path, "model.attention=auto", cwd=tmp_path)
    assert shown.code == 0 and "it fits" in shown.out
    assert "it trains padded: its attention takes no function from outside" in shown.out
    found = [
        json.loads(stemtune_here("check", path, "--json", wanted, cwd=tmp_path).out)["memory"]
        for wanted in ("model.attention=auto", "model.attention=padded")
    ]
    assert found[0]["estimate"] == found[1]["estimate"] and found[0]["padded"]


def test_a_base_without_an_estimate(tmp_path: Path, tiny_base: Path, no_estimate: None) -> None:
    path = write_run_file(tmp_path, tiny_base)
    shown = stemtune_here("check", path, cwd=tmp_path)
    assert shown.code == 0 and "no estimate for this base" in shown.out
    found = json.loads(stemtune_here("check", path, "--json", cwd=tmp_path).out)["memory"]
    assert found["estimate"] is None and found["fits"] and found["reason"]
    trainer = st.Trainer(st.load_config(path, ["train.micro_batch_tokens=auto"]))
    assert trainer.scorer.budget == fit.FALLBACK
    trainer.folder.release()


@pytest.mark.parametrize(
    ("text", "size"),
    [("10GB", 10 * GB), ("10 GiB", 10 * 2**30), ("8192mb", 8_192_000_000), ("0.5G", GB // 2)],
)
def test_sizes(tmp_path: Path, tiny_base: Path, text: str, size: int) -> None:
    path = write_run_file(tmp_path, tiny_base)
    shown = stemtune_here("check", path, "--json", "--device-memory", text, cwd=tmp_path)
    assert json.loads(shown.out)["memory"]["available"] == size


@pytest.mark.parametrize("text", ["ten", "10GiBB", "-1GB", "iB"])
def test_no_size(tmp_path: Path, tiny_base: Path, text: str) -> None:
    path = write_run_file(tmp_path, tiny_base)
    shown: Outcome = stemtune_here("check", path, f"--device-memory={text}", cwd=tmp_path)
    refused(shown, 2, f"{text!r} is no amount of memory", "--device-memory")


def test_weights_are_not_needed(tmp_path: Path, tiny_base: Path) -> None:
    SIMULATIONS.clear()  # a model that ran before keeps a few bytes
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    whole, bare = (
        stemtune_here("check", write_run_file(tmp_path / name, folder), "--json", cwd=tmp_path)
        for name, folder in (("whole", tiny_base), ("bare", base))
    )
    found = [json.loads(one.out)["memory"]["estimate"] for one in (whole, bare)]
    assert found[0] == found[1] is not None
