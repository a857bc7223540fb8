"""Which blocks of a tree's packed tokens see which: what FlexAttention runs, and where it looks at
single tokens.

Shapes: N packed tokens, in M blocks of SIZE.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stemtune.tree.build import Tree

SIZE = 128
Blocks = NDArray[np.bool_]


def block_mask(tree: Tree, window: int | None, device: torch.device) -> BlockMask:
    """The block mask of a tree, from a few numbers for each block: `create_block_mask` would look
    at all N² pairs.

    Args:
        window: how many tokens of its path, itself included, a token sees; None for all.
    """
    end, position = (
        torch.from_numpy(array).to(device) for array in (tree.subtree_end, tree.position_ids)
    )

    def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mask = (k <= q) & (q < end[k])
        return mask if window is None else mask & (position[q] - position[k] < window)

    touched, whole = visible_blocks(tree, window)
    return BlockMask.from_kv_blocks(
        *_ordered(touched & ~whole, device),
        *_ordered(whole, device),
        BLOCK_SIZE=SIZE,
        mask_mod=visible,
        seq_lengths=(tree.num_distinct, tree.num_distinct),
    )


def visible_blocks(tree: Tree, window: int | None) -> tuple[Blocks, Blocks]:
    """[M, M] queries by keys: whether a token may see one (never false where one does), and whether
    all see all.

    Key k is seen from q where k <= q < end[k]. These ranges start within the block of k, so that
    beyond it what a block's keys are seen from is one range, to their largest end; all of them
    are seen up to their smallest.
    """
    size = tree.num_distinct
    starts = np.arange(0, size, SIZE)
    first_q = starts[:, None]
    largest = np.maximum.reduceat(tree.subtree_end, starts)
    smallest = np.minimum.reduceat(tree.subtree_end, starts)
    touched = (first_q >= starts) & (first_q < largest)
    whole = (first_q > starts) & (first_q + SIZE <= smallest)
    if window is not None:
        lowest = np.minimum.reduceat(tree.position_ids, starts)
        highest = np.maximum.reduceat(tree.position_ids, starts)
        touched &= lowest[:, None] - highest < window
        whole &= highest[:, None] - lowest < window
    return touched, whole


def _ordered(blocks: Blocks, device: torch.device) -> tuple[Any, Any]:
    """How many blocks of keys each block of queries has, [1, 1, M], and which, these first:
    [1, 1, M, M]."""
    counts = blocks.sum(1, dtype=np.int32)
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return tuple(torch.from_numpy(array)[None, None].to(device) for array in (counts, order))  # pyright: ignore[reportReturnType]
