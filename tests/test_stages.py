"""Several stages in one run file: SFT, then preferences, each going on with the adapter before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import stemtune as st
from stemtune.answers import answer_figures, answer_run
from stemtune.errors import ConfigError, Interrupted
from stemtune.evaluate import evaluate_run
from tests.runs import IGNORED, adapter_of, run_info, steps_of, write_rows, write_run_file

pytestmark = IGNORED
PAIRS = [
    {"prompt": f"{word}?", "chosen": f"The {word}, my friend.", "rejected": f"As an AI, {word}."}
    for word in ("virtue", "knowledge", "the sea", "a lamp", "the night", "a city")
]


def staged(folder: Path, base: Path, **second: Any) -> Path:
    """A run file with two stages: three steps of SFT, three of DPO."""
    path = write_run_file(folder, base)
    write_rows(folder / "pairs.jsonl", PAIRS)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["train"] |= {"max_steps": 3, "batch_size": 4}
    values["stages"] = [
        {"name": "sft"},
        {
            "name": "dpo",
            "data": {"path": "pairs.jsonl", "eval_fraction": 0.3},
            "objective": {"type": "dpo", "beta": 0.2},
            **second,
        },
    ]
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def test_stages_are_laid_over_the_file(tmp_path: Path, tiny_base: Path) -> None:
    path = staged(tmp_path, tiny_base)
    overrides = ["train.max_steps=2", "stages.dpo.objective.beta=0.5"]
    first, second = st.load_stages(path, overrides)
    assert [config.objective[0].type for config in (first, second)] == ["sft", "dpo"]
    assert second.objective[0].beta == 0.5
    assert [config.train.max_steps for config in (first, second)] == [2, 2]
    assert [config.train.batch_size for config in (first, second)] == [4, 4]
    assert first.data.path == str(tmp_path / "rows.jsonl")
    assert second.data.path == str(tmp_path / "pairs.jsonl")
    assert first.output.dir == str(tmp_path / "run" / "stages" / "sft")
    assert second.output.dir == str(tmp_path / "run")
    assert first.adapter.init_from is None
    assert second.adapter.init_from == first.output.dir
    with pytest.raises(ConfigError, match="several stages"):
        st.load_config(path)
    (plain,) = st.load_stages(write_run_file(tmp_path / "plain", tiny_base))
    assert plain == st.load_config(tmp_path / "plain" / "run.yaml")


def test_two_stages_are_two_runs(tmp_path: Path, tiny_base: Path) -> None:
    stages = st.load_stages(staged(tmp_path / "staged", tiny_base))
    result = st.train(stages)
    assert result.output_dir == tmp_path / "staged" / "run"
    path = staged(tmp_path / "alone", tiny_base)
    first, second = st.load_stages(path, ["output.dir=" + str(tmp_path / "alone" / "run")])
    done = st.train(first)
    # By hand: the second one goes on with what the first one left.
    hand = second.model_copy(
        update={"adapter": second.adapter.model_copy(update={"init_from": str(done.adapter_dir)})}
    )
    again = st.train(hand)
    ours, theirs = adapter_of(result.adapter_dir), adapter_of(again.adapter_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = adapter_of(tmp_path / "staged" / "run" / "stages" / "sft" / "adapter")
    assert any(not torch.equal(ours[name], before[name]) for name in ours)
    losses = [line["loss"] for line in steps_of(result.output_dir)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5), "the reference is the first stage"
    assert losses[-1] < losses[0]


def test_a_stage_that_is_done_is_not_done_again(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = st.load_stages(staged(tmp_path, tiny_base))
    expected = st.train(st.load_stages(staged(tmp_path / "whole", tiny_base))).adapter_dir
    trainer = st.Trainer(stages[0])
    trainer.train()
    written = (tmp_path / "run" / "stages" / "sft" / "run.json").stat().st_mtime_ns
    stopped = st.Trainer(stages[1])
    monkeypatch.setattr(stopped.stop, "requested", True)
    with pytest.raises(Interrupted):
        stopped.train()
    result = st.train(stages, resume=True)
    assert (tmp_path / "run" / "stages" / "sft" / "run.json").stat().st_mtime_ns == written
    assert run_info(tmp_path / "run")["state"] == "done"
    ours, theirs = adapter_of(result.adapter_dir), adapter_of(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_later_data_are_looked_at_first(tmp_path: Path, tiny_base: Path) -> None:
    stages = st.load_stages(staged(tmp_path, tiny_base, data={"path": "rows.jsonl"}))
    with pytest.raises(st.StemtuneError, match="only one answer"):
        st.train(stages)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "what", "line"),
    [
        ("stages: 3\n", "`stages` should be a list", 3),
        ("stages:\n- data: {limit: 3}\n", "a stage needs a `name`", 4),
        ("stages:\n- name: a/b\n", "a stage needs a `name`", 4),
        ("stages:\n- name: a\n- name: a\n", "two stages have the same name", 3),
        ("stages:\n- name: a\n  train:\n    lr: 3\n", "unknown key `train.lr`", 6),
        ("stages:\n- name: a\n  train:\n    batch_size: x\n", "`train.batch_size` can't be", 6),
    ],
)
def test_wrong_stages(tmp_path: Path, stages: str, what: str, line: int) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data:\n  path: x.jsonl\n{stages}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        st.load_stages(path)
    assert what in caught.value.what
    assert caught.value.where == f"{path}:{line}"
    assert caught.value.hint


def test_scores_and_answers_of_the_last_stage(tmp_path: Path, tiny_base: Path) -> None:
    result = st.train(st.load_stages(staged(tmp_path, tiny_base)))
    config = st.load_config(result.output_dir / "config.yaml")
    lines = (result.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [json.loads(line) for line in lines if "eval_loss" in line][-1]
    figures = evaluate_run(result.output_dir, config).figures
    assert figures.keys() == {name.removeprefix("eval_") for name in last} - {"step"}
    for name, value in figures.items():
        assert last[f"eval_{name}"] == pytest.approx(value, abs=1e-5), name
    base = evaluate_run(result.output_dir, config, base=True).figures
    assert "loss" not in base and 0 <= base["logps_accuracy"] <= 1
    judged: list[tuple[str, ...]] = []

    def judge(*texts: str) -> float:
        judged.append(texts)
        return 0.25

    answers = answer_run(result.output_dir, config, max_new_tokens=4, judge=judge)
    held_out = {pair["chosen"] for pair in PAIRS} & {answer.reference for answer in answers}
    assert len(answers) == len(held_out) == len(judged)
    assert all(a.prompt.startswith("user\n") and a.prompt.endswith("assistant") for a in answers)
    assert answer_figures(answers)["answer_win_rate"] == 0.25
