"""`stemtune eval`: the held-out loss of a run's adapter, or of its base."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stemtune.cli.common import Json, log_to_stderr, run_config, run_folder

if TYPE_CHECKING:
    from stemtune.answers import Answered


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its run file.")] = Path(
        "run.yaml"
    ),
    base: Annotated[bool, typer.Option("--base", help="The base without the adapter.")] = False,
    per_record: Annotated[
        bool,
        typer.Option("--per-record", help="Each record's loss, worst first: where are bad labels?"),
    ] = False,
    train_data: Annotated[
        bool, typer.Option("--train-data", help="The training records, not the held-out ones.")
    ] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help="Answer the held-out prompts, and score that.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="--generate: only so many records.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="--generate: of an answer.")] = 256,
    judge: Annotated[
        str | None,
        typer.Option(help="--generate: file.py:function that compares with the base's answers."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a run on its held-out records."""
    folder = run_folder(run)
    config = run_config(folder)
    log_to_stderr()
    if generate or judge or limit:
        from stemtune.answers import answer_figures, answer_run, load_judge

        chosen = load_judge(judge) if judge else None
        answers = answer_run(
            folder, config, base=base, limit=limit, max_new_tokens=max_new_tokens, judge=chosen
        )
        if per_record:
            _print_answers(answers, as_json)
        else:
            _print_figures({**answer_figures(answers), "answers": len(answers)}, as_json)
        return
    from stemtune.evaluate import evaluate_run

    scores = evaluate_run(folder, config, base=base, train_data=train_data)
    losses = scores.records
    if per_record:
        for record in sorted(losses, key=lambda r: -r.mean):
            count, place = len(record.losses), str(record.place)
            if as_json:
                line = {"loss": record.mean, "targets": count, "place": place, "text": record.text}
                print(json.dumps(line, ensure_ascii=False))
            else:
                text = record.text.replace("\n", " ")
                print(f"{record.mean:8.4f}  {count:5d}  {place}  {text[:60]}")
        return
    figures = {f"eval_{name}": value for name, value in scores.figures.items()}
    _print_figures({**figures, "eval_records": len(losses)}, as_json)


def _print_answers(answers: "list[Answered]", as_json: bool) -> None:
    """Each answer with its scores, the worst first."""
    for answered in sorted(answers, key=lambda answered: answered.scores()["rouge_l"]):
        if as_json:
            line = {**asdict(answered), "place": str(answered.place), **answered.scores()}
            print(json.dumps(line, ensure_ascii=False))
        else:
            scores = "  ".join(f"{name} {value:.2f}" for name, value in answered.scores().items())
            print(f"{answered.place}  {scores}\n  {answered.answer}\n  ({answered.reference})")


def _print_figures(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:26} {value:.4f}" if isinstance(value, float) else f"{name:26} {value}")
