"""Answers to held-out prompts: what transformers generates, scored by hand; judges."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import stemtune as st
from stemtune.answers import Answered, answer_figures, answer_run, load_judge
from stemtune.data.overlap import exact_match, rouge_l, token_f1
from stemtune.data.records import Place
from stemtune.errors import ConfigError, DataError
from tests.cli.command import stemtune_here
from tests.runs import IGNORED, make_config, write_rows

pytestmark = IGNORED
EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = [
    {"prompt": "What is virtue?", "chosen": "I know not.", "rejected": "As an AI, no."},
    {"prompt": "Can it be taught?", "chosen": "Let us see.", "rejected": "Here are steps."},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run that knows the better answers by heart, and is asked for them again."""
    folder = tmp_path_factory.mktemp("by-heart")
    overrides = ["train.max_steps=60", "train.learning_rate=0.02", "train.batch_size=2"]
    overrides += [f"data.eval_path={folder}/rows.jsonl", "data.allow_leaks=true"]
    overrides += ["objective={type: orpo}", "train.eval_steps=60"]
    config = make_config(folder, tiny_base, *overrides)
    write_rows(folder / "rows.jsonl", ROWS)
    return st.train(config).output_dir


def config_of(run: Path) -> st.Config:
    return st.load_config(run / "config.yaml")


def by_transformers(run: Path, base: Path, prompt: str) -> str:
    """The likeliest reply of plain PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(run / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=end,
        pad_token_id=end,
    )
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_those_of_transformers(run: Path, tiny_base: Path) -> None:
    answers = answer_run(run, config_of(run), max_new_tokens=24)
    assert {a.reference for a in answers} == {row["chosen"] for row in ROWS}
    for answered in answers:
        row = next(row for row in ROWS if row["chosen"] == answered.reference)
        assert row["prompt"] in answered.prompt and "rows.jsonl" in str(answered.place)
        assert answered.answer == by_transformers(run, tiny_base, row["prompt"])
    figures = answer_figures(answers)
    assert figures == {
        "answer_exact_match": pytest.approx(1.0),
        "answer_f1": pytest.approx(1.0),
        "answer_rouge_l": pytest.approx(1.0),
    }, "it knows them by heart"
    base = answer_figures(answer_run(run, config_of(run), base=True, max_new_tokens=8))
    assert base["answer_exact_match"] == 0


def test_a_limit_and_nothing_held_out(run: Path, tmp_path: Path, tiny_base: Path) -> None:
    assert len(answer_run(run, config_of(run), limit=1, max_new_tokens=2)) == 1
    bare = st.train(make_config(tmp_path, tiny_base, "train.max_steps=1")).output_dir
    with pytest.raises(DataError, match="no held-out records"):
        answer_run(bare, config_of(bare))


def test_from_the_command_line(run: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def longer(prompt, answer, other, reference):\n    return 0.75\n")
    options = ["--generate", "--max-new-tokens", 12, "--judge", f"{judge}:longer"]
    outcome = stemtune_here("eval", run, *options, "--json", cwd=tmp_path)
    assert outcome.code == 0
    figures = json.loads(outcome.out)
    assert figures["answers"] == 2 and figures["answer_win_rate"] == 0.75
    outcome = stemtune_here("eval", run, *options, "--json", "--per-record", cwd=tmp_path)
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert {line["reference"] for line in lines} == {row["chosen"] for row in ROWS}
    assert all(line["other"] and line["win"] == 0.75 for line in lines)
    outcome = stemtune_here("eval", run, "--generate", "--limit", 1, cwd=tmp_path)
    assert "answer_rouge_l" in outcome.out and "answers" in outcome.out


@pytest.mark.parametrize(
    "name", ["", "judge", "nowhere.py:f", "judges:f", "json:nothing", "json:__name__"]
)
def test_no_such_judge(run: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_judge(name)
    assert caught.value.where == name and "file.py:function" in caught.value.hint


# -- likeness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reference", "f1", "exact"),
    [
        ("the cat sat", "The cat, sat.", 1.0, 1.0),
        ("sat the cat", "the cat sat", 1.0, 0.0),
        ("the the cat", "the cat sat", 2 * 2 / 6, 0.0),
        ("", "the cat", 0.0, 0.0),
        ("dog", "cat", 0.0, 0.0),
        ("今天很冷", "今天很热", 2 * 3 / 8, 0.0),
        ("今天 很冷。", "今天很冷", 1.0, 1.0),
    ],
)
def test_overlap_by_hand(text: str, reference: str, f1: float, exact: float) -> None:
    assert token_f1(text, reference) == pytest.approx(f1)
    assert exact_match(text, reference) == exact


def test_scores_of_an_answer() -> None:
    place = Place(Path("rows.jsonl"), 1)
    answered = Answered(place, "q", "the cat ran", "the cat sat", other="no", win=0.5)
    assert answered.scores() == {
        "exact_match": 0.0,
        "f1": pytest.approx(2 / 3),
        "rouge_l": pytest.approx(rouge_l("the cat ran", "the cat sat")),
        "win_rate": 0.5,
    }
    assert answer_figures([]) == {}


# -- the judges of the examples ----------------------------------------------------------------


def example(name: str) -> Any:
    return load_judge(f"{EXAMPLES / 'judges.py'}:{name}")


def test_the_judge_by_reference() -> None:
    judge = example("by_reference")
    assert judge("q", "the cat sat", "a dog", "the cat sat") == 1.0
    assert judge("q", "a dog", "the cat sat", "the cat sat") == 0.0
    assert judge("q", "a dog", "a dog", "the cat sat") == 0.5


class Endpoint(BaseHTTPRequestHandler):
    """Prefers the answer that holds `good`; keeps what it was sent."""

    seen: list[tuple[str, str | None, dict[str, Any]]] = []  # noqa: RUF012
    always = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers["Authorization"], body))
        text = body["messages"][0]["content"]
        first = text.partition("Answer A:")[2].partition("Answer B:")[0]
        said = self.always or ("A" if "good" in first else "The better one is B.")
        reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Endpoint]]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("JUDGE_MODEL", "a-model")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.setattr(Endpoint, "seen", [])
    yield Endpoint
    server.shutdown()
    server.server_close()


def test_the_judge_behind_an_endpoint(
    endpoint: type[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = example("by_endpoint")
    assert judge("q?", "a good one", "a bad one", "r") == 1.0
    assert judge("q?", "a bad one", "a good one", "r") == 0.0
    monkeypatch.setattr(Endpoint, "always", "A")  # whoever stands first: no preference at all
    assert judge("q?", "a good one", "a bad one", "r") == 0.5
    path, key, body = endpoint.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["model"] == "a-model" and body["temperature"] == 0
    assert "q?" in body["messages"][0]["content"]
    assert "secret" not in json.dumps(body)
    assert "stemtune_judge" in sys.modules
