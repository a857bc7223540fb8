"""For every format: rows → records → text with what is trained marked, as golden files that were
read by eye. `UPDATE_GOLDEN=1 pytest tests/data/test_golden.py` writes them anew: read the diff."""

import os
from pathlib import Path

import pytest
import yaml

import stemtune as st
from stemtune.config import Data
from stemtune.data.prepare import prepare
from stemtune.data.survey import survey
from stemtune.runfile import load_config
from tests.data.templates import tokenizer_of

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir())


def shown(sequence: st.Sequence, decode: object) -> str:
    """Its text, trained tokens between ⟦ and ⟧."""
    runs: list[tuple[bool, list[int]]] = []
    pairs = zip(sequence.input_ids.tolist(), sequence.is_target.tolist(), strict=True)
    for token, trained in pairs:
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    assert callable(decode)
    return "".join(f"⟦{decode(ids)}⟧" if trained else str(decode(ids)) for trained, ids in runs)


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, tmp_path: Path) -> None:
    folder = GOLDEN / case
    settings = yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))
    rows = settings.pop("path")
    run_file = tmp_path / "run.yaml"
    data_section = {"path": str(folder / rows), "eval_fraction": 0.0, **settings}
    run_file.write_text(yaml.safe_dump({"data": data_section}, allow_unicode=True))
    data: Data = load_config(run_file).data
    tokenizer = tokenizer_of("qwen3")
    found = survey(data, 0)
    compared = any(name.endswith(("preference", "candidates")) for name in found.ledger.formats)
    answers = "pairs" if compared else "labelled" if "labelled" in found.ledger.formats else "best"
    prepared = prepare(found, tokenizer, data, answers=answers)
    lines = [f"formats: {prepared.ledger.formats}"]
    lines += [f"note: {note}" for note in prepared.ledger.notes]
    lines += [f"{kind}: {f.count}" for kind, f in sorted(prepared.ledger.findings.items())]
    for number, sequences in enumerate(prepared.train.sequences):
        place = prepared.train.place(number)
        lines.append(f"\n══ line {place.line}, record {number}")
        for sequence in sequences:
            role = "" if sequence.role == "answer" else f"[{sequence.role}]\n"
            lines.append(f"──\n{role}{shown(sequence, tokenizer.decode)}")
    text = "\n".join(lines) + "\n"
    expected = folder / "expected.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        expected.write_text(text, encoding="utf-8")
    assert text == expected.read_text(encoding="utf-8")
