"""Log-probabilities under the model that training started from: computed once, and kept.

The trees of the first epoch are run, the same as in training: equal trees give equal numbers. Where
its steps share so much with one another that it pays, trees of the whole data set are.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stemtune.data.prepare import Part, Prepared
from stemtune.errors import ConfigError
from stemtune.metrics import track
from stemtune.plan.prefixes import windows_by_prefix
from stemtune.score import AT_ONCE as RECORDS
from stemtune.score import Scorer
from stemtune.tree.build import prefix_key
from stemtune.tree.logprobs import base_model

Piece = tuple[Part, list[int]]
"""Records of a part that are scored together."""
log = logging.getLogger(__name__)
FILE = "reference.safetensors"
WORTH = 0.1  # share of the tokens for which the first epoch's trees are given up; in half precision
IN_HALF = 0.25  # another tree rounds otherwise, and the first loss of DPO is ln 2 no more
LEAST = 2048  # tokens that nobody waits for
READ = 1 << 20  # log-probabilities that are read together


def wants_stored(objectives: Seq[Any]) -> bool:
    """Whether any of these objectives compares with a stored reference."""
    return any(getattr(one, "reference", "") == "stored" for one in objectives)


def load_or_compute(
    path: Path, key: str, data: Prepared, plan: Seq[Seq[int]], scorer: Scorer, after_step: Any
) -> "StoredReference":
    """The reference of the records that a run sees.

    Args:
        path: where it is kept.
        key: see `key_of`.
        plan: the records of each step.
        after_step: called after each step, or tree, that was computed; it may raise to stop.

    Raises:
        ConfigError: what is stored belongs to other data, or to another base.
    """
    wanted = {int(n) for n in data.train.numbers[sorted({*chain(*plan)})]}
    wanted |= {int(n) for n in data.eval.numbers}
    if path.exists():
        try:
            stored = StoredReference(path, key)
            if stored.has(wanted):
                return stored
        except DamagedReference as error:
            log.warning("%s is damaged (%s): it is computed anew", path.name, error)
    pieces = _pieces(data, plan, scorer)
    known: dict[int, list[Tensor]] = {}
    for part, records in track(pieces, "reference", quiet=not scorer.ranks.is_first):
        logps = iter(scorer.reference(part.of(records)) or [])
        for record in records:
            mine = list(islice(logps, len(part.sequences[record])))
            known[int(part.numbers[record])] = mine
        after_step()
    if scorer.ranks.is_first:
        store(path, key, known)
    scorer.ranks.wait()
    return StoredReference(path, key)


def _pieces(data: Prepared, plan: Seq[Seq[int]], scorer: Scorer) -> list[Piece]:
    """What is run, one piece after another: the steps of the first epoch, or the trees of the whole
    data set. Held-out records are cut as an evaluation cuts them."""
    steps = _first_seen(data.train, plan)
    trees = _trees(data.train, sorted({*chain(*(records for _, records in steps))}), scorer)
    every = range(len(data.eval))
    held_out = [(data.eval, list(every[start : start + RECORDS])) for start in every[::RECORDS]]
    by_step, by_prefix = _tokens(steps, scorer), _tokens(trees, scorer)
    worth = WORTH if base_model(scorer.model).dtype == torch.float32 else IN_HALF
    pays = by_step - by_prefix >= max(worth * by_step, LEAST)
    train, whose = (trees, "the whole data set") if pays else (steps, "the first epoch's steps")
    log.info(
        "computing the reference's log-probabilities, once: %s tokens, in micro-batches of %s%s",
        f"{(by_prefix if pays else by_step) + _tokens(held_out, scorer):,}",
        whose,
        f" ({by_step - by_prefix:,} fewer)" if pays else "",
    )
    return [*train, *held_out]


def _first_seen(part: Part, plan: Seq[Seq[int]]) -> list[Piece]:
    """The steps that see a record for the first time."""
    seen: set[int] = set()
    steps: list[Piece] = []
    for step in plan:
        records = {int(part.numbers[record]) for record in step}
        if not records <= seen:
            steps.append((part, list(step)))
            seen |= records
    return steps


def _trees(part: Part, records: Seq[int], scorer: Scorer) -> list[Piece]:
    """Records in the order of their prefixes, a micro-batch for each process at a time, so that it
    can be stopped in between."""
    once = {int(part.numbers[record]): record for record in records}
    trees: list[Piece] = []
    for window in windows_by_prefix(
        list(once.values()), lambda record: prefix_key(part.sequences[record][0]), RECORDS
    ):
        sequences = part.of(window)
        for turn in scorer.turns(sequences):
            trees.append((part, sorted({sequences[index].record for index in turn})))
    return trees


def _tokens(pieces: Iterable[Piece], scorer: Scorer) -> int:
    return sum(scorer.tokens(part.of(records)) for part, records in pieces)


class DamagedReference(Exception):
    """A stored reference that can't be read: it is made anew."""


def key_of(base: str, start: str, data: str) -> str:
    """What a reference belongs to.

    Args:
        base: fingerprint of the base.
        start: of the adapter that training started from; empty for a fresh one.
        data: of the prepared data.
    """
    return hashlib.sha256(f"{base}|{start}|{data}".encode()).hexdigest()


class StoredReference:
    """A file of log-probabilities: `record` [S] and `end` [S] say whose they are, `logps` [T] fp32
    stays on disk until it is asked for.

    Raises:
        ConfigError: it belongs to other data, or to another base.
        DamagedReference: it is not what was written.
    """

    def __init__(self, path: Path, key: str) -> None:
        try:
            # Mapped: a reference may be larger than memory.
            self._file: Any = safe_open(str(path), "pt")
            said = self._file.metadata() or {}
            self.record: NDArray[np.int64] = self._file.get_tensor("record").numpy()
            ends: NDArray[np.int64] = self._file.get_tensor("end").numpy()
            self._logps = self._file.get_slice("logps")
            size = int(self._logps.get_shape()[0])
        except (OSError, SafetensorError, KeyError) as error:
            raise DamagedReference(str(error)) from None
        if said.get("key") != key:
            what = "the stored reference was computed from other data, or from another base"
            hint = "delete it, and it is computed anew; or start in another output.dir"
            raise ConfigError(what, where=str(path), hint=hint)
        whole = len(ends) == len(self.record) and (int(ends[-1]) if len(ends) else 0) == size
        known = [torch.from_numpy(self.record), torch.from_numpy(ends)]
        if not whole or said.get("sha256") != _digest([*known, *self._pieces(size)]):
            raise DamagedReference("its contents are not what was written")
        self._end = ends
        self._start = np.concatenate([np.zeros(1, np.int64), ends[:-1]])

    def has(self, records: Iterable[int]) -> bool:
        """Whether it knows all of these records."""
        return bool(np.isin(np.fromiter(records, np.int64), self.record).all())

    def of(self, part: Part, records: Iterable[int]) -> list[Tensor]:
        """The log-probabilities of each sequence of these records of a part, in order."""
        found: list[Tensor] = []
        for record in (int(part.numbers[number]) for number in records):
            first = int(np.searchsorted(self.record, record, "left"))
            last = int(np.searchsorted(self.record, record, "right"))
            found += [
                self._logps[int(self._start[n]) : int(self._end[n])] for n in range(first, last)
            ]
        return found

    def _pieces(self, size: int) -> Iterable[Tensor]:
        for start in range(0, size, READ):
            yield self._logps[start : min(start + READ, size)]


def store(path: Path, key: str, known: Mapping[int, Seq[Tensor]]) -> None:
    """Write a reference: for each record the log-probabilities of its sequences."""
    records = sorted(known)
    sequences = [logps for record in records for logps in known[record]]
    whole = torch.cat(sequences) if sequences else torch.zeros(0)
    tensors = {
        "record": torch.tensor([r for r in records for _ in known[r]], dtype=torch.int64),
        "end": torch.tensor(np.cumsum([len(logps) for logps in sequences]), dtype=torch.int64),
        "logps": whole,
    }
    facts = {"key": key, "sha256": _digest(tensors.values())}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata=facts)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _digest(pieces: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.numpy().tobytes())
    return digest.hexdigest()
