"""What the blocks below the first adapted one give, computed once and kept on disk.

They are the base's own: a token's state there depends on its prefix alone, in every epoch. The file
holds one row for each distinct prefix of the training data, whatever records share it.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from stemtune.config import Config
from stemtune.data.prepare import Part
from stemtune.errors import ConfigError, DiskError
from stemtune.metrics import track
from stemtune.model.adapter import has_all_blocks
from stemtune.ranks import Ranks
from stemtune.score import AT_ONCE, Scorer, autocast
from stemtune.tree.blocks import Below, has_blocks
from stemtune.tree.build import Tree, build_tree
from stemtune.tree.logprobs import base_model, lower_states
from stemtune.tree.sequence import Ids

log = logging.getLogger(__name__)
FILE = "lower-states.bin"
SALTS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
GIGABYTE = 1e9
WHERE = "train.keep_lower_states"

Keys = NDArray[np.uint64]


def require_lower_blocks(config: Config, ranks: Ranks) -> None:
    """Refuse a run file without blocks below the adapter, or several processes, before weights
    load. Call `require_adapter` first.

    Raises:
        ConfigError: see above.
    """
    if config.train.keep_lower_states and has_all_blocks(config.adapter):
        what = "there are no blocks below the adapter whose states could be kept"
        hint = "set adapter.layers: the upper half of the model's blocks, say"
        raise ConfigError(what, where=WHERE, hint=hint)
    if config.train.keep_lower_states and ranks.size > 1:
        hint = "leave train.keep_lower_states out, or start one process"
        raise ConfigError("lower states are kept by one process", where=WHERE, hint=hint)


class LowerStates:
    """[M, D] states on disk, and which prefix each row is of.

    Args:
        path: the file; it is made anew.
        scorer: of a model whose adapter leaves the lower blocks alone.
        part: the records whose prefixes are kept.

    Raises:
        ConfigError: the architecture hides its blocks, all of them are adapted, or no tree is run.
        DiskError: too little space.
    """

    def __init__(self, path: Path, scorer: Scorer, part: Part) -> None:
        self.path, self.scorer, self.part = path, scorer, part
        self.model = scorer.model
        base = base_model(self.model)
        self.first = first_adapted(self.model)
        if not self.first or not has_blocks(base) or scorer.backend == "padded":
            what = "the lower states of this model can't be kept"
            if not self.first:
                what = "all blocks are adapted: there are no lower states"
            raise ConfigError(what, where=WHERE, hint="leave train.keep_lower_states out")
        self.key, self.check = _distinct(part)
        self.dtype: torch.dtype = base.dtype
        width: int = base.config.get_text_config().hidden_size
        size = len(self.key) * width * self.dtype.itemsize
        free = shutil.disk_usage(path.parent).free
        if size > free:
            what = f"the states take {size / GIGABYTE:.1f} GB, and {free / GIGABYTE:.1f} are free"
            hint = "leave train.keep_lower_states out, or choose an output.dir on another disk"
            raise DiskError(what, where=str(path.parent), hint=hint)
        log.info(
            "keeping the states of %s tokens below block %d: %.2f GB",
            f"{len(self.key):,}",
            self.first,
            size / GIGABYTE,
        )
        # Bytes: numpy has no bfloat16.
        shape = (len(self.key), width * self.dtype.itemsize)
        self.rows = np.memmap(path, np.uint8, mode="w+", shape=shape)

    def compute(self, after_part: Callable[[], None]) -> None:
        """Fill the file, in the trees that share most.

        Args:
            after_part: called after some of the records; it may raise to stop.
        """
        for start in track(range(0, len(self.part), AT_ONCE), "lower states"):
            sequences = self.part.of(range(start, min(start + AT_ONCE, len(self.part))))
            for batch in self.scorer.micro_batches(sequences):
                tree = build_tree([sequences[index] for index in batch])
                with torch.no_grad(), autocast(self.model):
                    states = lower_states(self.model, tree, self.first, self.scorer.backend)
                as_bytes = states.to("cpu", self.dtype).contiguous().view(torch.uint8)
                self.rows[self._rows_of(tree)] = as_bytes.numpy()
            after_part()

    def of(self, tree: Tree) -> Below | None:
        """What is kept for a tree's tokens; None where it holds others."""
        rows = self._rows_of(tree)
        if rows is None:
            return None
        states = torch.from_numpy(self.rows[rows]).view(self.dtype)
        return Below(self.first, states.to(base_model(self.model).device))

    def remove(self) -> None:
        """The run is done: nobody needs them any more."""
        self.path.unlink(missing_ok=True)

    def _rows_of(self, tree: Tree) -> NDArray[np.int64] | None:
        """[N] the row of each packed token; None where one has none."""
        keys = np.empty((tree.num_distinct, len(SALTS)), np.uint64)
        for path in tree.paths:
            keys[path] = prefix_keys(tree.input_ids[path])
        rows = np.searchsorted(self.key, keys[:, 0]).clip(max=len(self.key) - 1)
        known = (self.key[rows] == keys[:, 0]) & (self.check[rows] == keys[:, 1])
        return rows if known.all() else None


def first_adapted(model: PeftModel) -> int:
    """Number of the first block that has an adapter."""
    config: Any = model.peft_config["default"]
    layers = config.layers_to_transform
    return min([layers] if isinstance(layers, int) else layers) if layers else 0


def prefix_keys(ids: Ids) -> Keys:
    """[n, 2] two numbers that name the prefix which ends at each token.

    Source:
        The sum of a number for each (token, place), as Zobrist 1970 names positions of a game; the
        numbers by SplitMix64, Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195.
    """
    places = np.arange(ids.size, dtype=np.uint64) << np.uint64(32)
    tokens = places | ids.astype(np.uint64)
    return np.stack([np.cumsum(_mixed(tokens + np.uint64(salt))) for salt in SALTS], axis=1)


def _mixed(x: Keys) -> Keys:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _distinct(part: Part) -> tuple[Keys, Keys]:
    """The keys of all prefixes of a part, by the first of the two numbers."""
    found, fresh = np.empty((0, len(SALTS)), np.uint64), list[Keys]()
    for start in range(0, len(part), AT_ONCE):
        sequences = part.of(range(start, min(start + AT_ONCE, len(part))))
        fresh += (prefix_keys(sequence.input_ids) for sequence in sequences)
        # Merged when there are as many again, so that a row is sorted only now and then.
        if sum(map(len, fresh)) > len(found):
            found, fresh = _merged([found, *fresh]), []
    found = _merged([found, *fresh])
    return np.ascontiguousarray(found[:, 0]), np.ascontiguousarray(found[:, 1])


def _merged(parts: list[Keys]) -> Keys:
    keys = np.concatenate(parts)
    return keys[np.unique(keys[:, 0], return_index=True)[1]]
