"""Nothing hostile gets in, no secret gets out. Hubs and their bytes: tests/model/test_hub.py."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import stemtune as st
from stemtune.errors import ConfigError, ModelError, StemtuneError
from stemtune.export.merge import merge
from stemtune.export.serve import read_run
from stemtune.model.load import load_tokenizer
from stemtune.model.names import PROMPT_FILE
from stemtune.model.save import load_adapter
from stemtune.model.trust import TRUSTED, require_own_files
from stemtune.redact import Redacting, redacted
from tests.runs import IGNORED, make_config, write_run_file

pytestmark = IGNORED
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What must never be made."""
    return tmp_path / "canary"


def copy_of(base: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# -- pickles and code -----------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [False, True])
def test_a_base_with_a_pickle_in_its_weights(
    tmp_path: Path, tiny_base: Path, canary: Path, allowed: bool
) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    config = make_config(tmp_path / "a", base, f"model.allow_pickled={str(allowed).lower()}")
    with pytest.raises(ModelError):
        st.train(config)
    assert not canary.exists()


def test_pickled_tensors_where_they_are_allowed(tmp_path: Path, tiny_base: Path) -> None:
    from safetensors.torch import load_file

    base = copy_of(tiny_base, tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    config = make_config(tmp_path / "a", base, "model.allow_pickled=true", "train.max_steps=1")
    assert (st.train(config).adapter_dir / "adapter_model.safetensors").is_file()


def test_an_adapter_with_a_pickle(tmp_path: Path, tiny_base: Path, canary: Path) -> None:
    adapter = st.train(make_config(tmp_path / "a", tiny_base, "train.max_steps=1")).adapter_dir
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    config = make_config(tmp_path / "b", tiny_base, f"adapter.init_from={adapter}")
    with pytest.raises(ModelError, match="pickled"):
        st.train(config)
    with pytest.raises(ModelError, match="pickled"):
        load_adapter(adapter, "cpu")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "manifest.json"])
def test_a_checkpoint_with_a_pickle(
    tmp_path: Path, tiny_base: Path, canary: Path, name: str
) -> None:
    config = make_config(tmp_path / "a", tiny_base, "train.max_steps=1")
    run = st.train(config).output_dir
    (run / "checkpoints/step-000001" / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(StemtuneError) as found:
        st.train(config, resume=True)
    assert found.value.exit_code == 5 and not canary.exists()


def test_code_that_a_base_brings_along(tmp_path: Path, tiny_base: Path, canary: Path) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    (base / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n", encoding="utf-8")
    for name, classes in {
        "config.json": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.T", None]},
    }.items():
        path = base / name
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**values, "auto_map": classes}), encoding="utf-8")
    st.train(make_config(tmp_path / "a", base, "train.max_steps=1"))
    assert not canary.exists()


def test_code_that_an_adapter_asks_for(
    tmp_path: Path, tiny_base: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder may come from anybody: what it says about its base does not count."""
    adapter = st.train(make_config(tmp_path / "a", tiny_base, "train.max_steps=1")).adapter_dir
    base = copy_of(tiny_base, tmp_path / "base")
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM\n"
    # Classes of its own: transformers marks those that it loads so, for the whole process.
    code += "class Config(LlamaConfig): pass\n"
    code += "class Model(LlamaForCausalLM): config_class = Config\n"
    (base / "evil.py").write_text(code, encoding="utf-8")
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    rewrite(base / "config.json", auto_map=classes)
    prompt = json.loads((adapter / PROMPT_FILE).read_text(encoding="utf-8"))
    said = {"base": str(base), "trust_remote_code": True, "revision": "0" * 40}
    rewrite(adapter / PROMPT_FILE, model={**prompt["model"], **said})
    for use in (
        lambda: load_adapter(adapter, "cpu"),
        lambda: merge(adapter, tmp_path / "merged"),
        lambda: read_run(adapter),
    ):
        with pytest.raises(ModelError, match="wants to run the code"):
            use()
    assert not canary.exists()
    monkeypatch.setenv(TRUSTED, "0" * 40)
    load_adapter(adapter, "cpu")
    assert canary.exists(), "this test shows nothing"


def rewrite(path: Path, **values: Any) -> None:
    """Other values in a file of JSON."""
    before = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**before, **values}), encoding="utf-8")


def test_tags_in_yaml(tmp_path: Path, tiny_base: Path, canary: Path) -> None:
    path = write_run_file(tmp_path, tiny_base)
    text = path.read_text(encoding="utf-8")
    made = f"!!python/object/apply:pathlib.Path ['{canary}']"
    tag = f"!!python/object/apply:pathlib.Path.touch [{made}]"
    path.write_text(text + f"tracking: {{project: {tag}}}\n", encoding="utf-8")
    with pytest.raises(ConfigError):
        st.load_config(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{% for x in messages %}{{ x.__init__.__globals__ }}{% endfor %}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    ],
)
def test_a_template_that_leaves_its_sandbox(
    tmp_path: Path, tiny_base: Path, canary: Path, template: str
) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    text = template.replace("CANARY", str(canary))
    (base / "chat_template.jinja").write_text(text, encoding="utf-8")
    config = make_config(tmp_path / "a", base, "train.max_steps=1")
    assert load_tokenizer(config.model).chat_template == text
    with pytest.raises(StemtuneError):
        st.train(config)
    assert not canary.exists()


def test_no_shell_and_no_pickle_anywhere() -> None:
    source = Path(st.__file__).parent
    words = ("subprocess", "os.system", "popen", "pickle.load", "shell=True", " eval(", " exec(")
    files = sorted(source.rglob("*.py"))
    found = {path: path.read_text(encoding="utf-8") for path in files}
    assert len(found) > 50
    hits = {(path.name, word) for path, text in found.items() for word in words if word in text}
    # An engine that somebody installed is started: by a list of words, and by no shell.
    assert hits == {("serve.py", "subprocess")}


# -- paths ----------------------------------------------------------------------------------------


def test_weights_of_another_folder(tmp_path: Path, tiny_base: Path) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match="it names the file"):
        st.train(make_config(tmp_path / "a", base))


@pytest.mark.parametrize("name", ["notes.txt", "chat_template.jinja", "adapter_model.safetensors"])
def test_an_adapter_whose_files_lie_elsewhere(tmp_path: Path, tiny_base: Path, name: str) -> None:
    adapter = st.train(make_config(tmp_path / "a", tiny_base, "train.max_steps=1")).adapter_dir
    outside = tmp_path / "outside"
    (adapter / name).touch()
    (adapter / name).rename(outside)
    (adapter / name).symlink_to(outside)
    config = make_config(tmp_path / "b", tiny_base, f"adapter.init_from={adapter}")
    for use in (
        lambda: st.train(config),
        lambda: load_adapter(adapter, "cpu"),
        lambda: merge(adapter, tmp_path / "merged"),
    ):
        with pytest.raises(ModelError, match="leads out of its folder"):
            use()


def test_a_base_whose_files_lie_elsewhere_is_not_copied(tmp_path: Path, tiny_base: Path) -> None:
    base = copy_of(tiny_base, tmp_path / "base")
    adapter = st.train(make_config(tmp_path / "a", base, "train.max_steps=1")).adapter_dir
    (base / "notes.txt").symlink_to(tmp_path / "a/rows.jsonl")
    with pytest.raises(ModelError, match="leads out of its folder"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_links_of_the_hubs_cache_are_its_own(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").touch()
    (snapshot / "config.json").symlink_to("../../blobs/123")
    require_own_files(snapshot)


def test_an_output_folder_that_is_a_link(tmp_path: Path, tiny_base: Path) -> None:
    """It is followed, as everywhere; a run's files inside of it are not."""
    victim = tmp_path / "victim.json"
    victim.write_text("untouched", encoding="utf-8")
    config = make_config(tmp_path / "a", tiny_base, "train.max_steps=1")
    run = Path(config.output.dir)
    run.mkdir()
    (run / "run.json").symlink_to(victim)
    st.train(config)
    assert victim.read_text(encoding="utf-8") == "untouched"
    assert not (run / "run.json").is_symlink()


@pytest.mark.parametrize(
    "name", ["log.txt", ".run.json.tmp", ".config.yaml.tmp", "metrics.jsonl", "config.yaml"]
)
def test_no_file_of_a_run_is_written_through_a_link(
    tmp_path: Path, tiny_base: Path, canary: Path, name: str
) -> None:
    config = make_config(tmp_path / "a", tiny_base, "train.max_steps=1")
    run = Path(config.output.dir)
    run.mkdir()
    (run / "run.json").write_text("{}", encoding="utf-8")  # of a run that failed early
    (run / name).symlink_to(canary)
    st.train(config)
    assert not canary.exists() and not (run / name).is_symlink()


@pytest.mark.parametrize("name", ["adapter", ".adapter.tmp"])
def test_no_adapter_is_written_through_a_link(tmp_path: Path, tiny_base: Path, name: str) -> None:
    trainer = st.Trainer(make_config(tmp_path / "a", tiny_base, "train.max_steps=1"))
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").touch()
    (trainer.folder.path / name).symlink_to(victim)
    adapter = trainer.train().adapter_dir
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert not adapter.is_symlink() and (adapter / "adapter_model.safetensors").is_file()


def test_a_folder_of_something_else_stays_open(tmp_path: Path, tiny_base: Path) -> None:
    config = make_config(tmp_path / "a", tiny_base, "train.max_steps=1")
    shared = Path(config.output.dir)
    shared.mkdir(mode=0o755)
    (shared / "thesis.txt").touch()
    with pytest.raises(StemtuneError, match="not empty"):
        st.train(config)
    with pytest.raises(StemtuneError, match="no usable checkpoint"):
        st.train(config, resume=True)
    assert shared.stat().st_mode & 0o777 == 0o755


def test_a_run_is_its_owners_alone(tmp_path: Path, tiny_base: Path) -> None:
    run = st.train(make_config(tmp_path / "a", tiny_base, "train.max_steps=1")).output_dir
    assert run.stat().st_mode & 0o077 == 0


# -- secrets --------------------------------------------------------------------------------------


def test_a_token_in_a_run_file(tmp_path: Path, tiny_base: Path) -> None:
    for setting in (f"tracking.project={TOKEN}", f"data.path=[{TOKEN}]"):
        with pytest.raises(ConfigError, match="holds a token") as found:
            make_config(tmp_path, tiny_base, setting)
        assert TOKEN not in str(found.value)


def test_a_token_in_the_environment_is_written_nowhere(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    run = st.train(make_config(tmp_path / "a", tiny_base, "train.max_steps=2")).output_dir
    hits = [
        path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]
    assert not hits


@pytest.mark.parametrize(
    "text",
    [
        f"401 for https://user:x@host/?token={TOKEN}",
        f"Authorization: Bearer {TOKEN}",
        f"HF_TOKEN={TOKEN}",
        f'{{"api_key": "{TOKEN[3:]}"}}',
        f"password: {TOKEN[3:]}",
        f"AWS_SECRET_ACCESS_KEY={TOKEN[3:]}",
        f"wandb-key: {TOKEN[3:]}",
    ],
)
def test_what_is_shown_and_logged(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert TOKEN[3:] not in redacted(text)
    assert TOKEN[3:] not in str(ModelError(text, where=text, hint=text))
    record = logging.LogRecord("stemtune", logging.INFO, "", 0, "said %s", (text,), None)
    assert Redacting().filter(record) and TOKEN[3:] not in record.getMessage()


@pytest.mark.parametrize(
    "text",
    [
        "4,096 tokens",
        "special tokens: 3",
        "duplicate key: 'context'",
        "train.micro_batch_tokens=100000",
        "a keyboard",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text
