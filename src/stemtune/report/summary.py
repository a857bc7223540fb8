"""What `check` tells of prepared data: figures, and the first records as marked text."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stemtune.config import Config
from stemtune.data.audit import REMEDIES
from stemtune.data.prepare import Part, Prepared
from stemtune.data.records import Finding
from stemtune.data.renderer import special_ids
from stemtune.plan.pack import count_distinct
from stemtune.plan.steps import plan_steps
from stemtune.tree.sequence import Sequence

BATCHINGS = ("record", "dialogue", "persona")
BINS = 12
SAMPLED_STEPS = 200  # sharing is measured on at most so many steps
OUTLIER = 5.0  # robust standard deviations of the logarithm of a length


@dataclass(frozen=True)
class Summary:
    """Figures of a data set, ready for JSON."""

    rows: int
    formats: dict[str, int]
    num_refused: int
    refused: list[dict[str, str]]
    """Place, what and hint; the first thousand."""
    notes: list[str]
    findings: dict[str, dict[str, Any]]
    """What looks wrong in rows that were kept: how many, examples, and a remedy."""
    train_records: int
    eval_records: int
    groups: int
    sequences: int
    tokens: int
    targets: int
    length: dict[str, int]
    lengths: list[tuple[int, int]]
    """A histogram: the upper end of each bin, in tokens, and how many sequences it holds."""
    longest: dict[str, Any]
    """Where the longest record stands, and how long it is."""
    max_length: int
    sharing: dict[str, float]
    """For each way of batching: all tokens over distinct tokens, of the first epoch's steps."""
    step_sharing: dict[str, float]
    """How it spreads over the steps, with the batching that is set."""
    sharings: list[tuple[float, int]]
    """A histogram of the same: the upper end of each bin, and how many steps it holds."""
    memory_sharing: dict[str, float]
    """With memories: the sharing that each position of theirs gives."""
    batching: str
    batch_size: int
    steps: int
    steps_per_epoch: int

    def to_json(self) -> dict[str, Any]:
        """Everything, by name."""
        return asdict(self)


QUANTILES = {"min": 0, "median": 50, "p95": 95, "max": 100}


def summarise(
    data: Prepared, config: Config, elsewhere: dict[str, Prepared] | None = None
) -> Summary:
    """The figures that `check` shows.

    Args:
        elsewhere: the same data with their memories at the other position, by its name.
    """
    part, train, ledger = data.train, config.train, data.ledger
    mine = np.isin(part.store.record, part.numbers)
    lengths = part.store.length[mine]
    longest = int(np.argmax(np.where(mine, part.store.length, 0)))
    row = part.survey.record_row[part.store.record[longest]]
    steps = _plan(part, config, config.data.batching, train.num_train_epochs, train.max_steps)
    sharing = {name: _sharing(part, config, name) for name in BATCHINGS}
    each = sharing[config.data.batching]
    memory_sharing: dict[str, float] = {}
    if config.data.memories is not None:
        memory_sharing[config.data.memories.position] = _ratio(each)
        for position, other in (elsewhere or {}).items():
            memory_sharing[position] = _ratio(_sharing(other.train, config, config.data.batching))
    findings = {**ledger.findings, **_outliers(part)}
    return Summary(
        rows=ledger.rows,
        formats=ledger.formats,
        num_refused=ledger.num_refused,
        refused=[asdict(refusal) for refusal in ledger.refused],
        notes=ledger.notes,
        findings={
            kind: {**asdict(finding), "remedy": REMEDIES[kind]}
            for kind, finding in sorted(findings.items(), key=lambda item: -item[1].count)
        },
        train_records=len(part),
        eval_records=len(data.eval),
        groups=len(np.unique(part.groups)),
        sequences=len(lengths),
        tokens=int(lengths.sum()),
        targets=int(part.store.targets[mine].sum()),
        length=_quantiles(lengths),
        lengths=_histogram(lengths),
        longest={"place": str(part.survey.place(int(row))), "tokens": int(lengths.max())},
        max_length=config.data.max_length,
        sharing={name: _ratio(found) for name, found in sharing.items()},
        step_sharing=_quantiles(each[2], 2),
        sharings=_sharings(each[2]),
        memory_sharing=memory_sharing,
        batching=config.data.batching,
        batch_size=train.batch_size,
        steps=len(steps),
        steps_per_epoch=-(-len(part) // train.batch_size),
    )


def _quantiles(values: Any, digits: int = 0) -> dict[str, Any]:
    found = {n: np.percentile(values, q, method="nearest") for n, q in QUANTILES.items()}
    return {n: round(float(v), digits) if digits else int(v) for n, v in found.items()}


def _histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """At most twelve bins of a round width."""
    longest = int(lengths.max())
    width = next(
        step * 10**power
        for power in range(12)
        for step in (1, 2, 5)
        if step * 10**power * BINS >= longest
    )
    counts = np.bincount((lengths - 1) // width)
    return [((i + 1) * width, int(count)) for i, count in enumerate(counts.tolist())]


def _sharings(ratios: list[float]) -> list[tuple[float, int]]:
    """At most twelve bins of a round width, from 1 on: a step that shares nothing has 1."""
    above = np.array(ratios) - 1
    width = next(
        step * 10.0**power
        for power in range(-1, 12)
        for step in (1, 2, 5)
        if step * 10.0**power * BINS >= above.max()
    )
    counts = np.bincount(np.maximum(np.ceil(above / width - 1e-9), 1).astype(int) - 1)
    return [(round(1 + (i + 1) * width, 1), int(count)) for i, count in enumerate(counts.tolist())]


def _plan(
    part: Part, config: Config, batching: str, epochs: float, max_steps: int | None
) -> list[list[int]]:
    return plan_steps(
        part.groups.tolist(),
        part.personas.tolist(),
        batching=batching,
        batch_size=config.train.batch_size,
        epochs=epochs,
        max_steps=max_steps,
        seed=config.train.seed,
    )


def _ratio(found: tuple[int, int, list[float]]) -> float:
    return round(found[0] / found[1], 2)


def _outliers(part: Part) -> dict[str, Finding]:
    """Records whose length, on a scale of ratios, is far from the median.

    Source:
        the modified z-score of Iglewicz and Hoaglin 1993: 0.6745·(x - median) ÷ MAD.
    """
    numbers = np.flatnonzero(np.isin(part.store.record, part.numbers))
    logs = np.log(part.store.length[numbers])
    away = np.abs(logs - np.median(logs))
    spread = max(float(np.median(away)), 0.1)  # lengths that are all alike have no outliers
    far = numbers[0.6745 * away / spread > OUTLIER]
    found = Finding()
    for number in far[np.argsort(-part.store.length[far], kind="stable")].tolist():
        row = int(part.survey.record_row[part.store.record[number]])
        found.add(str(part.survey.place(row)), f"{int(part.store.length[number]):,} tokens")
    return {"length outlier": found} if found.count else {}


def _sharing(part: Part, config: Config, batching: str) -> tuple[int, int, list[float]]:
    """All tokens and distinct tokens of the first steps, and their ratio step by step."""
    all_tokens = all_distinct = 0
    ratios: list[float] = []
    sequences = part.sequences
    for step in _plan(part, config, batching, 1.0, None)[:SAMPLED_STEPS]:
        together = [sequence for record in step for sequence in sequences[record]]
        total, distinct = sum(len(sequence) for sequence in together), count_distinct(together)
        ratios.append(total / distinct)
        all_tokens += total
        all_distinct += distinct
    return all_tokens, all_distinct, ratios


@dataclass(frozen=True)
class Piece:
    """Some text of a sequence whose tokens are all trained or all not."""

    text: str
    trained: bool
    special: bool


def pieces(sequence: Sequence, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A sequence as text, cut where training starts or stops and at special tokens."""
    all_special = special_ids(tokenizer)
    runs: list[tuple[bool, bool, list[int]]] = []
    for token, trained in zip(
        sequence.input_ids.tolist(), sequence.is_target.tolist(), strict=True
    ):
        special = token in all_special
        if runs and runs[-1][:2] == (trained, special):
            runs[-1][2].append(token)
        else:
            runs.append((trained, special, [token]))
    return [Piece(str(tokenizer.decode(ids)), trained, special) for trained, special, ids in runs]
