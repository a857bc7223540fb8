"""The run file: what is read, what is refused, and in which line."""

from pathlib import Path

import pytest
from pydantic import ValidationError

import stemtune as st
from stemtune.errors import ConfigError
from stemtune.resume import settings_difference, training_settings
from stemtune.runfile import dump_config

DATA = "data:\n  path: rows.jsonl\n"  # lines 1 and 2 of every run file here


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


def refusal(path: Path, overrides: list[str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        st.load_config(path, overrides)
    error = caught.value
    assert error.exit_code == 2
    assert error.what and error.hint and "\n" not in error.what + error.where + error.hint
    return error


def test_defaults(write) -> None:
    config = st.load_config(write(DATA))
    assert config.model_dump() == {
        "model": {
            "base": "smollm2",
            "revision": None,
            "allow_pickled": False,
            "trust_remote_code": False,
            "dtype": "auto",
            "quantization": None,
            "double_quantization": True,
            "offload_layers": None,
            "device": "auto",
            "attention": "auto",
        },
        "adapter": {
            "init_from": None,
            "r": 16,
            "alpha": 32,
            "dropout": 0.05,
            "target_modules": "auto",
            "use_rslora": False,
            "use_dora": False,
            "init_weights": "default",
            "modules_to_save": [],
            "layers": None,
        },
        "data": {
            "path": str(write(DATA).parent / "rows.jsonl"),
            "eval_path": None,
            "eval_fraction": 0.1,
            "limit": None,
            "format": "auto",
            "fields": {},
            "character": None,
            "speaker_names": "auto",
            "system": None,
            "card": None,
            "samples": "dialogue",
            "history_turns": None,
            "history_tokens": None,
            "window": "sliding",
            "memories": None,
            "rag": {
                "template": "Background:\n{passages}\n\nQuestion: {query}\n\nAnswer:",
                "passage": "{text}",
                "separator": "\n",
                "max_tokens": 1024,
            },
            "pairs": {"mode": "best_worst", "margin": 0.0},
            "thinking": "train",
            "template": "chat",
            "max_length": 2048,
            "on_too_long": "error",
            "on_bad_row": "error",
            "allow_leaks": False,
            "batching": "dialogue",
            "license": None,
        },
        "objective": {"weight": 1.0, "type": "sft"},
        "train": {
            "learning_rate": 1e-4,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.03,
            "loraplus_lr_ratio": 1.0,
            "optimizer": "adamw",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "num_train_epochs": 2.0,
            "max_steps": None,
            "batch_size": 32,
            "micro_batch_tokens": "auto",
            "activation_checkpointing": False,
            "activation_offload": False,
            "keep_lower_states": False,
            "seed": 0,
            "save_steps": 500,
            "save_total_limit": 3,
            "keep_every": None,
            "eval_steps": None,
            "on_nonfinite": "stop",
            "max_skipped_steps": 10,
            "time_limit": None,
        },
        "output": {
            "dir": "runs/stemtune",
            "on_existing": "refuse",
            "final_adapter": "best",
            "push_to_hub": None,
            "hub_private_repo": True,
            "license": None,
        },
        "tracking": {"trackers": ["tensorboard"], "project": "stemtune"},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1e-4", 1e-4), ("5E-5", 5e-5), ("1.5e-3", 1.5e-3), ("0.01", 0.01), ("1", 1)],
)
def test_numbers_as_people_write_them(write, text: str, value: float) -> None:
    in_file = st.load_config(write(f"{DATA}train:\n  learning_rate: {text}\n"))
    override = st.load_config(write(DATA), [f"train.learning_rate={text}"])
    assert in_file.train.learning_rate == override.train.learning_rate == value


@pytest.mark.parametrize(
    ("text", "seconds"), [("3600", 3600), ("1:30", 90), ("11:50:00", 42600), ("0:00:20", 20)]
)
def test_time_as_people_write_it(write, text: str, seconds: int) -> None:
    in_file = st.load_config(write(f"{DATA}train:\n  time_limit: {text}\n"))
    override = st.load_config(write(DATA), [f"train.time_limit={text}"])
    assert in_file.train.time_limit == override.train.time_limit == seconds


def test_no_time(write) -> None:
    error = refusal(write(DATA), ["train.time_limit=soon"])
    assert "expected seconds or h:mm:ss or null" in error.what
    assert error.where == "the override 'train.time_limit=soon'"


def test_overrides_are_laid_over_the_file_in_order(write) -> None:
    path = write(DATA + "train:\n  batch_size: 8\n  seed: 1\n")
    overrides = [
        "train.batch_size=4",
        "train.batch_size=2",
        "data.path=[a.jsonl, b.jsonl]",
        "data.system=You are Yorick, a = b",
        "data.character='1e5'",
        "data.eval_path=",
        "train.micro_batch_tokens=4096",
    ]
    config = st.load_config(path, overrides)
    folder = path.parent
    assert (config.train.batch_size, config.train.seed) == (2, 1)
    assert config.data.path == [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    assert config.data.system == "You are Yorick, a = b"
    assert config.data.character == "1e5"
    assert config.data.eval_path is None
    assert config.train.micro_batch_tokens == 4096


@pytest.mark.parametrize("override", ["seed", "=3", "train.=3", ".seed=3", "train..seed=3"])
def test_not_an_override(write, override: str) -> None:
    error = refusal(write(DATA), [override])
    assert error.where == f"the override {override!r}"
    assert "section.key=value" in error.hint


def test_an_override_is_named_where_it_is_wrong(write) -> None:
    error = refusal(write(DATA + "train:\n  seed: 1\n"), ["train.seed=two"])
    assert error.what == "`train.seed` can't be 'two': expected a whole number"
    assert error.where == "the override 'train.seed=two'"


@pytest.mark.parametrize(
    ("text", "line", "key", "hint"),
    [
        ("trian:\n  seed: 1\n", 3, "trian", "train"),
        ("train:\n  seed: 1\n  learning_rat: 1\n", 5, "train.learning_rat", "train.learning_rate"),
        ("learning_rate: 1e-4\n", 3, "learning_rate", "train.learning_rate"),
        ("adapter: {alhpa: 3}\n", 3, "adapter.alhpa", "adapter.alpha"),
        ("model:\n  batch_size: 3\n", 4, "model.batch_size", "train.batch_size"),
        ("train:\n  lr: 1e-4\n", 4, "train.lr", "train.learning_rate"),
        ("lora_alpha: 1\n", 3, "lora_alpha", "adapter.alpha"),
        ("objective:\n  type: sft\n  beta: 0.1\n", 5, "objective.beta", "sft has weight, type"),
        ("xyzzy: 1\n", 3, "xyzzy", "model, adapter, data, objective, train, output, tracking"),
    ],
)
def test_unknown_keys_have_a_line_and_the_nearest_name(
    write, text: str, line: int, key: str, hint: str
) -> None:
    path = write(DATA + text)
    error = refusal(path)
    assert error.what == f"unknown key `{key}`"
    assert error.where == f"{path}:{line}"
    assert hint in error.hint


@pytest.mark.parametrize(("text", "key"), [("data:\n  pth: x\n", "data.pth"), ("dta:\n", "dta")])
def test_a_misspelt_required_key_is_named(write, text: str, key: str) -> None:
    assert refusal(write(text)).what == f"unknown key `{key}`"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("train:\n  batch_size: '8'\n", 4, "`train.batch_size` can't be '8': expected a whole num"),
        ("train:\n  batch_size: true\n", 4, "`train.batch_size` can't be True: expected a whole"),
        ("train:\n  batch_size: 1.5\n", 4, "`train.batch_size` can't be 1.5: expected a whole"),
        ("train:\n  batch_size: 0\n", 4, "`train.batch_size` can't be 0"),
        ("train:\n  learning_rate: fast\n", 4, "`train.learning_rate` can't be 'fast': expected a"),
        ("train:\n  learning_rate: .nan\n", 4, "`train.learning_rate` can't be nan"),
        ("train:\n  micro_batch_tokens: lots\n", 4, "`train.micro_batch_tokens` can't be 'lots'"),
        ("train:\n  lr_scheduler_type: step\n", 4, "`train.lr_scheduler_type` can't be 'step': "),
        ("train: 3\n", 3, "`train` can't be 3: expected a section"),
        ("train:\n", 3, "`train` can't be None: expected a section"),
        ("adapter:\n  target_modules: {q: 1}\n", 4, "`adapter.target_modules` can't be {'q': 1}"),
        ("objective:\n  type: ppo\n", 4, "`objective.type` can't be 'ppo'"),
        ("model:\n  base: 2024-01-01\n", 4, "`model.base` can't be"),
        ("tracking:\n  trackers:\n  - 3\n", 4, "`tracking.trackers`"),
        ("adapter:\n  dropout: 1.0\n", 4, "`adapter.dropout` can't be 1.0: expected a number"),
    ],
)
def test_wrong_values_have_a_line(write, text: str, line: int, what: str) -> None:
    path = write(DATA + text)
    error = refusal(path)
    assert error.what.startswith(what)
    assert error.where == f"{path}:{line}"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (DATA + "  path: again\n", 3, "`data.path` stands twice"),
        (DATA + "data:\n  path: again\n", 3, "`data` stands twice"),
        (DATA + "model:\n\tbase: x\n", 4, "not valid YAML: found character '\\t'"),
        (DATA + "model: {base: x\n", 4, "not valid YAML: expected ',' or '}'"),
        (DATA + "---\na: 1\n", 3, "not valid YAML: but found another document"),
        (DATA + "model:\n  base: *nobody\n", 4, "not valid YAML: found undefined alias"),
        (DATA + "model:\n  base: !mine x\n", 4, "not a plain YAML value"),
        (DATA + "[a, b]: x\n", 3, "not a plain YAML value"),
        (DATA + "3: x\n", 3, "`3` can't be 3"),
        ("- a\n- b\n", 1, "the run file is not a mapping"),
        ("just text", 1, "the run file is not a mapping"),
        ("data: {}\n", 1, "`data.path` is missing"),
        (DATA + "model:\n  base: 2024-13-45\n", 4, "not a plain YAML value"),
        (DATA + "model:\n  base: !!int x\n", 4, "not a plain YAML value"),
        (DATA + "model: &m\n  base: *m\n", 4, ""),
    ],
)
def test_what_is_no_run_file_has_a_line(write, text: str, line: int, what: str) -> None:
    path = write(text)
    error = refusal(path)
    assert error.what.startswith(what)
    assert error.where == f"{path}:{line}"


def test_data_path_is_needed(write) -> None:
    path = write("model:\n  base: smollm2\n")
    assert refusal(path).what == "`data` is missing"
    assert refusal(write(b"")).what == "`data` is missing"
    assert st.load_config(path, ["data.path=rows.jsonl"]).data.path


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir"])
def test_python_tags_are_not_executed(write, tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    path = write(f"{DATA}model:\n  base: !!{tag} ['{canary}']\n")
    error = refusal(path)
    assert error.where == f"{path}:4"
    assert "!!python" in error.hint
    refusal(write(DATA), [f"model.base=!!{tag} ['{canary}']"])
    assert not canary.exists()


def test_a_byte_order_mark_is_no_part_of_a_key(write) -> None:
    config = st.load_config(write(b"\xef\xbb\xbf" + DATA.encode()))
    assert str(config.data.path).endswith("rows.jsonl")


def test_not_utf8(write) -> None:
    path = write(DATA.encode("utf-16"))
    assert refusal(path).where == str(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    missing = refusal(tmp_path / "run.yaml")
    assert missing.what == "there is no such run file"
    assert missing.where == str(tmp_path / "run.yaml")
    assert "stemtune init" in missing.hint
    assert refusal(tmp_path).where == str(tmp_path)


def test_frozen(write) -> None:
    config = st.load_config(write(DATA))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.batch_size = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.train = config.train


def test_paths_are_relative_to_the_run_file(write, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    text = "data:\n  path: [a/b.jsonl, /c.jsonl]\n  eval_path: d.jsonl\nmodel:\n  base: base\n"
    config = st.load_config(write(text))
    assert config.data.path == [str(tmp_path / "a/b.jsonl"), "/c.jsonl"]
    assert config.data.eval_path == str(tmp_path / "d.jsonl")
    assert config.model.base == str(tmp_path / "base")
    assert st.load_config(write(text), ["model.base=org/name"]).model.base == "org/name"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.path=[a.jsonl, b.jsonl]", "model.base=org/name", "train.max_steps=3"],
        ["data.character=学生", "data.system='line: one\n# two 🙂'", "adapter.target_modules=[q]"],
        ["data.character='null'", "data.system='2024-01-01'", "output.dir='007'"],
        ["data.character='1e5'", "model.revision='12e34567'"],
    ],
)
def test_the_resolved_dump_loads_to_the_same(write, tmp_path: Path, overrides: list[str]) -> None:
    config = st.load_config(write(DATA), overrides)
    elsewhere = tmp_path / "run" / "config.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(dump_config(config), encoding="utf-8")
    assert st.load_config(elsewhere) == config


def test_settings_that_decide_what_is_trained(write) -> None:
    before = training_settings(st.load_config(write(DATA)))
    harmless = [
        "data.path=moved.jsonl",
        "output.dir=elsewhere",
        "tracking.project=other",
        "train.save_steps=7",
        "train.micro_batch_tokens=99",
        "model.device=cpu",
    ]
    assert training_settings(st.load_config(write(DATA), harmless)) == before
    changed = ["train.seed=7", "data.system=S", "adapter.r=8", *harmless]
    now = training_settings(st.load_config(write(DATA), changed))
    assert settings_difference(before, now) == {
        "adapter.r": "16 → 8",
        "data.system": "None → 'S'",
        "train.seed": "0 → 7",
    }
    assert settings_difference({"a": 1, "b": 2}, {"b": 2, "c": 3}) == {
        "a": "1 → None",
        "c": "None → 3",
    }


def test_a_run_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: " + 5000 * "[", encoding="utf-8")
    with pytest.raises(ConfigError, match="nested too deeply"):
        st.load_config(path)


def test_a_base_in_a_folder_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "run.yaml").write_text(DATA + "model: {base: /closed/base}\n", encoding="utf-8")
    monkeypatch.setattr(Path, "is_dir", closed)
    with pytest.raises(ConfigError, match="Permission denied") as found:
        st.load_config(tmp_path / "run.yaml")
    assert found.value.where == "/closed/base"
