"""Rows in files, and what the data room makes of them."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stemtune.config import Data
from stemtune.data.prepare import Prepared, prepare
from stemtune.data.records import Record
from stemtune.data.survey import Survey, chunks, records_of, survey

Row = dict[str, Any]


def write_rows(path: Path, *rows: Row) -> Path:
    """As JSONL."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def data_of(path: Path, **settings: Any) -> Data:
    """Settings for a file, by default with nothing held out."""
    return Data.model_validate({"path": str(path), "eval_fraction": 0.0, **settings})


def prepared_of(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Prepared:
    """Everything."""
    answers = settings.pop("answers", "best")
    data = data_of(path, **settings)
    return prepare(survey(data, 0), tokenizer, data, answers=answers)


def records_in(found: Survey, data: Data) -> list[Record]:
    """All records of the rows that were kept, in order, training and evaluation alike."""
    placed = [(chunk, row) for chunk in chunks(found.files) for row in chunk.rows]
    return [
        record
        for (chunk, row), count in zip(placed, found.row_records.tolist(), strict=True)
        if count
        for record in records_of(*row, found.files[chunk.file], data)[1]
    ]
