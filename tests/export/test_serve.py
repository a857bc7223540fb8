"""The command lines of engines, against what their documentation says; and what they refuse."""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import pytest

from stemtune.config import Model
from stemtune.errors import ConfigError, ModelError
from stemtune.export.serve import Address, read_run, serve_command
from stemtune.model.trust import TRUSTED

ALL = {"vllm": "vllm", "transformers": "transformers", "llama.cpp": "llama-server"}
HUB = {"base": "Qwen/Qwen3-0.6B", "revision": "0123abc"}
HERE = Address()
LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}


def write_run(
    folder: Path, lora: dict[str, Any], model: dict[str, Any] = HUB, **settings: Any
) -> Path:
    """What serving looks at of a run: no weights among it."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    whole = {"model": Model.model_validate(model).model_dump(), "system": None}
    (adapter / "stemtune.json").write_text(json.dumps({**whole, "template": "chat", **settings}))
    (adapter / "adapter_config.json").write_text(json.dumps({**LORA, **lora}))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def merge(run: Path) -> Path:
    (run / "merged").mkdir()
    (run / "merged" / "config.json").write_text("{}")
    return run / "merged"


def write_gguf(path: Path, kind: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def words(run: Path, engine: str = "vllm", address: Address = HERE, **options: Any) -> str:
    return " ".join(serve_command(read_run(run), engine, ALL, address, **options).words)


def notes(run: Path, engine: str = "vllm", address: Address = HERE) -> list[str]:
    return serve_command(read_run(run), engine, ALL, address).notes


# -- vLLM -------------------------------------------------------------------------------------


def test_vllm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "hamlet", {})
    adapter = run / "adapter"
    assert words(run) == (
        "vllm serve Qwen/Qwen3-0.6B --revision 0123abc"
        f" --enable-lora --lora-modules hamlet={adapter} --max-lora-rank 16"
        f" --chat-template {adapter}/chat_template.jinja --host 127.0.0.1 --port 8000"
    )
    assert "requests name the model hamlet" in notes(run)
    other = words(adapter, address=Address("::1", 81, "dane"))
    assert f"--lora-modules dane={adapter} " in other and "--host ::1 --port 81" in other


@pytest.mark.parametrize(
    ("rank", "most"),
    # From LoRAConfig: max_lora_rank is one of 1, 8, 16, 32, 64, 128, 256, 320, 512.
    [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (257, 320), (321, 512), (512, 512)],
)
def test_vllm_reserves_one_of_its_ranks(tmp_path: Path, rank: int, most: int) -> None:
    assert f"--max-lora-rank {most} " in words(write_run(tmp_path / "run", {"r": rank}))


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"trained whole \(lm_head\)"),
        ({"r": 513}, r"a rank of 513 \(up to 512\)"),
        ({"target_modules": ["q_proj", "model.embed_tokens"]}, "embeddings or the head"),
        ({"rank_pattern": {"q_proj": 8}}, "differ from layer to layer"),
        ({"fan_in_fan_out": True}, "transposed"),
    ],
)
def test_vllm_refuses(tmp_path: Path, lora: dict[str, Any], reason: str) -> None:
    """What its PEFT helper and its LoRA manager raise for; merged it is taken."""
    run = write_run(tmp_path / "run", lora)
    with pytest.raises(ConfigError, match=f"vLLM does not load this adapter: .*{reason}") as error:
        words(run)
    assert error.value.hint == f"stemtune merge {run}"
    merged = merge(run)
    assert words(run).startswith(f"vllm serve {merged} --served-model-name run --chat-template ")
    assert "--enable-lora" not in words(run)


def test_loftq_belongs_on_its_own_base(tmp_path: Path) -> None:
    model = {**HUB, "quantization": "nf4"}
    run = write_run(tmp_path / "run", {}, model, adapter={"init_weights": "loftq"})
    with pytest.raises(ConfigError, match="LoftQ"):
        words(run)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ({"dtype": "float16"}, "--dtype float16"),
        ({"quantization": "nf4"}, "--quantization bitsandbytes"),
        (
            {"trust_remote_code": True, "revision": "a" * 40},
            f"--revision {'a' * 40} --trust-remote-code --code-revision {'a' * 40}",
        ),
    ],
)
def test_the_base_is_held_as_in_training(
    tmp_path: Path, model: dict[str, Any], flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUSTED, "a" * 40)
    assert f" {flags} " in words(write_run(tmp_path / "run", {}, {**HUB, **model}))


def test_a_base_of_ones_own(tmp_path: Path, tiny_base: Path) -> None:
    run = write_run(tmp_path / "run", {}, {"base": str(tiny_base), "revision": "main"})
    assert words(run).startswith(f"vllm serve {tiny_base} --enable-lora ")
    gone = write_run(tmp_path / "gone", {}, {"base": str(tmp_path / "nowhere")})
    with pytest.raises(ModelError, match="no model here"):
        words(gone)


def test_stops_and_template_are_the_adapters(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a=b,c", {}, template="plain", system="You are Hamlet.")
    (run / "adapter" / "generation_config.json").write_text("{}")
    command = serve_command(read_run(run), "vllm", ALL, HERE)
    assert "--chat-template" not in command.words
    folder = command.words[command.words.index("--generation-config") + 1]
    assert folder == str(run / "adapter")
    module = json.loads(command.words[command.words.index("--lora-modules") + 1])
    assert module == {"name": "a-b-c", "path": str(run / "adapter")}
    said = "\n".join(command.notes)
    assert "/v1/completions, not /v1/chat/completions" in said
    assert '"You are Hamlet."' in said


# -- transformers -----------------------------------------------------------------------------


def test_transformers_serves_merged_models(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"use_dora": True}, {**HUB, "dtype": "float32"})
    with pytest.raises(ConfigError, match="transformers serves no adapter") as error:
        words(run, "transformers")
    assert error.value.hint == f"stemtune merge {run}"
    merged = merge(run)
    expected = f"transformers serve {merged} --host 127.0.0.1 --port 8000 --dtype float32"
    assert words(run, "transformers") == expected
    assert f"requests name the model {merged}" in notes(run, "transformers")
    with pytest.raises(ConfigError, match="names a model by its folder"):
        words(run, "transformers", Address(name="dane"))


def test_transformers_reads_an_at_sign_as_a_revision(tmp_path: Path) -> None:
    run = write_run(tmp_path / "me@home", {})
    merge(run)
    with pytest.raises(ConfigError, match="for a revision"):
        words(run, "transformers")


def test_a_merged_model_that_is_older(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {})
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"")
    config = merge(run) / "config.json"
    os.utime(weights, (100, 100))
    assert not [note for note in notes(run, "transformers") if "older" in note]
    os.utime(config, (99, 99))
    assert [note for note in notes(run, "transformers") if "older than the adapter" in note]


# -- llama.cpp --------------------------------------------------------------------------------


def test_llama_cpp(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {})
    with pytest.raises(ConfigError, match="needs a GGUF file") as error:
        words(run, "llama.cpp")
    assert error.value.hint == f"stemtune export gguf {run}"
    adapter = write_gguf(run / "adapter.gguf", "adapter")
    with pytest.raises(ConfigError, match="the base as GGUF, too"):
        words(run, "llama.cpp")
    base = write_gguf(tmp_path / "base.gguf", "model")
    template = f"--jinja --chat-template-file {run}/adapter/chat_template.jinja"
    rest = f"{template} --alias run --host 127.0.0.1 --port 8000"
    both = words(run, "llama.cpp", ggufs=[base, adapter])
    assert both == f"llama-server --model {base} --lora {adapter} {rest}"
    whole = write_gguf(run / "run-F16.gguf", "model")
    (run / "ollama").mkdir()
    write_gguf(run / "ollama" / "run-F16.gguf", "model")
    assert words(run, "llama.cpp") == f"llama-server --model {whole} {rest}"
    write_gguf(run / "run-Q8_0.gguf", "model")
    with pytest.raises(ConfigError, match=r"which of these .*run-F16\.gguf, run-Q8_0\.gguf"):
        words(run, "llama.cpp")


def test_an_adapter_for_a_base_that_came_as_gguf(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", "model")
    run = write_run(tmp_path / "run", {}, {"base": str(base)})
    adapter = write_gguf(run / "adapter.gguf", "adapter")
    assert words(run, "llama.cpp").startswith(f"llama-server --model {base} --lora {adapter} ")


@pytest.mark.parametrize("content", [None, b"", b"no GGUF at all, but long enough for a header"])
def test_no_gguf_file(tmp_path: Path, content: bytes | None) -> None:
    run, file = write_run(tmp_path / "run", {}), tmp_path / "x.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"no such GGUF|no GGUF file"):
        words(run, "llama.cpp", ggufs=[file])


# -- which engine -----------------------------------------------------------------------------


def chosen(run: Path, *installed: str) -> str:
    there = {name: ALL[name] for name in installed}
    return serve_command(read_run(run), "auto", there, HERE).engine


def test_the_first_engine_that_is_there_and_loads_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {})
    assert chosen(run, *ALL) == "vllm"
    with pytest.raises(ConfigError, match=r"^transformers serves no adapter.*vllm is not") as error:
        chosen(run, "transformers")
    assert error.value.hint == f"stemtune merge {run}"
    merge(run)
    assert chosen(run, *ALL) == "vllm"
    assert chosen(run, "transformers", "llama.cpp") == "transformers"
    write_gguf(run / "run.gguf", "model")
    assert chosen(run, "llama.cpp") == "llama.cpp"
    with pytest.raises(ConfigError, match="vllm is not installed") as error:
        chosen(run)
    assert error.value.hint.startswith(
        "pip install vllm; or pip install 'transformers[serving]'; or "
    )


def test_an_engine_that_would_not_load_it_is_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"use_dora": True})
    write_gguf(run / "run.gguf", "model")
    command = serve_command(read_run(run), "auto", ALL, HERE)
    assert command.engine == "llama.cpp"
    said = "\n".join(command.notes)
    assert "passed over: vLLM does not load this adapter: DoRA" in said
    assert "passed over: transformers serves no adapter" in said
    with pytest.raises(ConfigError, match="DoRA"):
        words(run, "vllm")


def test_everybody_can_reach_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {})
    assert any("whoever reaches 0.0.0.0:8000" in n for n in notes(run, address=Address("0.0.0.0")))
    assert not any("whoever" in note for note in notes(run))


@pytest.mark.parametrize("text", ["", "[]", '{"r": "x"}'])
def test_a_damaged_adapter(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", {})
    (run / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config\.json can't be read"):
        read_run(run)
    with pytest.raises(ModelError, match="no adapter"):
        read_run(tmp_path)
