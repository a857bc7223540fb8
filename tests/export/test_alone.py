"""What a run leaves is loaded by transformers and PEFT alone, and gives the same numbers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import stemtune as st
from stemtune.export.hub import push
from stemtune.export.merge import merge
from stemtune.model.save import load_adapter
from tests.fakehub import run_python, serve
from tests.pushhub import OLD_WAYS, push_hub
from tests.runs import IGNORED, dialogue_rows, make_config, run_info, write_run_file
from tests.trees import largest_error

pytestmark = [*IGNORED, OLD_WAYS]
IDS = [[5, 9, 11, 200, 3, 77, 21]]
# stemtune can't be imported: who tries ends.
CODE = """
import sys
sys.modules["stemtune"] = None
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, merged, examples = {given}
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

told = {{}}
with torch.no_grad():
    ids = torch.tensor({ids})
    for name in (adapter, "me/socrates"):
        model = PeftModel.from_pretrained(load(base), name).eval()
        told[name] = model(input_ids=ids).logits.tolist()
    told[merged] = load(merged)(input_ids=ids).logits.tolist()
told["template"] = AutoTokenizer.from_pretrained("me/socrates").chat_template
print(json.dumps(told))
for example in examples:
    torch.manual_seed(0)
    print("-- example")
    exec(example)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The tiny base, whose own end token is another one than that of its turns."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    folder.mkdir()
    for path in tiny_base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    values = {"eos_token_id": 7, "pad_token_id": 8, "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A run, and the model merged from it."""
    folder = tmp_path_factory.mktemp("alone")
    settings = ["train.max_steps=4", "train.learning_rate=0.02", "data.eval_fraction=0.3"]
    run = st.train(make_config(folder, base, *settings, "data.system=Speak.")).output_dir
    merge(run, run / "merged")
    return run


def example(folder: Path, base: Path) -> str:
    """That of a card as somebody would paste it, with the paths filled in."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/to/this", str(folder)).replace("path/to/tiny", str(base))
    assert "path/to" not in code and '"content": "Speak."' in code
    return code


def test_transformers_and_peft_alone(
    tmp_path: Path, run: Path, base: Path, httpserver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter and merged model, the adapter as it comes down again after a push, and what the
    cards say how to use them: all in one process, since torch takes its time."""
    with push_hub(httpserver, monkeypatch) as hub:
        push(run, "me/socrates")
        files = hub.files("me/socrates")
    adapter, merged = run / "adapter", run / "merged"
    examples = [example(folder, base) for folder in (adapter, merged)]
    given = (str(base), str(adapter), str(merged), examples)
    with serve({"me/socrates": files}) as endpoint:
        code = CODE.format(given=repr(given), ids=IDS)
        done = run_python(code, tmp_path, HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    numbers, *replies = done.stdout.split("-- example\n")
    assert len(replies) == 2 and all(reply.strip() for reply in replies)
    found = json.loads(numbers)
    assert found.pop("template") == AutoTokenizer.from_pretrained(base).chat_template
    model, _, _ = load_adapter(adapter, "cpu")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(IDS)).logits
        with model.disable_adapter():
            untrained = model(input_ids=torch.tensor(IDS)).logits
    assert len(found) == 3
    for logits in found.values():
        assert largest_error(torch.tensor(logits), expected) < 1e-5
    assert largest_error(untrained, expected) > 0.05


@pytest.mark.parametrize("folder", ["adapter", "merged"])
def test_what_ends_an_answer(run: Path, base: Path, folder: str) -> None:
    """The end token of turns, and the base's own; its sampling stays."""
    config = GenerationConfig.from_pretrained(run / folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(config.eos_token_id) == {7, turn_end} and turn_end != 7
    assert (config.pad_token_id, config.do_sample, config.temperature) == (8, True, 0.6)


def test_the_folder_tells_what_others_need(run: Path, base: Path) -> None:
    names = {path.name for path in (run / "adapter").iterdir()}
    assert names >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "loss.png",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = json.loads((run / "adapter/tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & tokenizer.keys()
    assert {"README.md", "loss.png"} <= {path.name for path in (run / "merged").iterdir()}
    # A base that only lies here is named in two files, for this machine: push names it otherwise.
    local = {"adapter_config.json", "stemtune.json"}
    for place in (run / "adapter", run / "merged"):
        for path in place.iterdir():
            told = str(base.parent) in path.read_bytes().decode(errors="replace")
            assert told == (path.name in local), path


def test_the_card_says_what_the_data_were(run: Path) -> None:
    rows = run.parent / "rows.jsonl"
    digest = hashlib.sha256(rows.read_bytes()).hexdigest()
    assert run_info(run)["data"] == [{"file": "rows.jsonl", "sha256": digest, "rows": 20}]
    assert f"| `rows.jsonl` | 20 | `{digest}` |" in (run / "adapter/README.md").read_text()


def test_memories_of_a_file_travel_without_its_path(tmp_path: Path, base: Path) -> None:
    rows = dialogue_rows(4)
    (tmp_path / "memories.txt").write_text("Virtue.\n\nA horse.\n")
    path = write_run_file(tmp_path, base, rows)
    settings = ["train.max_steps=1", "data.samples=turn", "data.memories={path: memories.txt}"]
    adapter = st.train(st.load_config(path, settings)).adapter_dir
    assert json.loads((adapter / "stemtune.json").read_text())["memories"]["path"] is None
    lines = (adapter / "memories.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["Virtue.", "A horse."]
    assert "memories.jsonl" in (adapter / "README.md").read_text()
