"""Log-probabilities of a tree's targets.

Shapes: S distinct sources, U distinct (source, token) pairs, T targets.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stemtune.kernels.head import head_logprobs
from stemtune.tree import attention, blocks
from stemtune.tree.blocks import Below
from stemtune.tree.build import Tree
from stemtune.tree.support import has_length_dependent_rope, why_no_tree


def target_logprobs(
    model: nn.Module,
    tree: Tree,
    backend: str = "auto",
    *,
    keep_attention: bool = False,
    below: Below | None = None,
) -> Tensor:
    """Log-probability of every target, through the model once for each distinct token.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        tree: from `build_tree`.
        backend: `segments`, `varlen`, `flex`, `padded`, or `auto` (the best for the device).
        keep_attention: leave the model's attention implementation as it is (padded only).
        below: what the lower blocks give, from `lower_states`: they are not run then.

    Returns:
        fp32 [T]: sequence by sequence, in order.

    Source:
        log p(token | path) = logit[token] - log Σ exp(logits), softmax in fp32.
    """
    base = base_model(model)
    sources, row_of_pair, token_of_pair, pair_of_target = tree.pairs
    if not len(token_of_pair):
        return torch.zeros(0)
    reason = why_no_tree(base)
    if not reason and not keep_attention:
        _use_tree_attention(base)
    if backend == "padded":
        return _padded_logprobs(base, tree)
    if reason:
        raise NotImplementedError(f"no tree for this model: {reason}")
    device = base.device
    rows, tokens = row_of_pair.to(device), token_of_pair.to(device)
    has_plain_head(base)  # the first look at a model runs all of its blocks
    with blocks.given(base, below):
        scores = _score(base, _inputs(base, tree, backend), sources.to(device), rows, tokens)
    return scores[pair_of_target.to(device)]


def lower_states(model: nn.Module, tree: Tree, first: int, backend: str = "auto") -> Tensor:
    """What the blocks below block `first` give for each packed token: its input, [N, D]."""
    base = base_model(model)
    _use_tree_attention(base)
    with blocks.stopped(base, first) as place:
        base.get_decoder()(**_inputs(base, tree, backend), use_cache=False)
    seen: Tensor = place.seen  # pyright: ignore[reportAssignmentType]
    return seen[0]


def _inputs(base: Any, tree: Tree, backend: str) -> dict[str, Any]:
    """What the decoder is called with for a tree."""
    device = base.device
    layout = attention.TreeLayout(
        tree, attention.choose_backend(backend, device, base.dtype, base.config), device
    )
    return {
        "input_ids": torch.from_numpy(tree.input_ids)[None].to(device),
        "position_ids": layout.position_ids[None],
        # An already prepared 4-D mask is handed on as it is: transformers builds none of its own.
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
        "tree": layout,
    }


def _use_tree_attention(base: Any) -> None:
    """Once per model, and for good: the second pass of activation checkpointing must find it.
    Without a tree it is SDPA."""
    if base.config._attn_implementation != attention.NAME:
        attention.register()
        base.set_attn_implementation(attention.NAME)


def _padded_logprobs(base: Any, tree: Tree) -> Tensor:
    """The same by separate sequences, padded on the right: nothing is shared."""
    count = len(tree.paths)
    alone = has_length_dependent_rope(base.config)
    parts: list[Tensor] = []
    for first in range(0, count, 1 if alone else count):
        if alone:  # one short pass makes transformers forget the longest sequence so far
            with torch.no_grad():
                base.get_decoder()(torch.zeros(1, 1, dtype=torch.long, device=base.device))
        parts.append(_padded_rows(base, tree, range(first, first + 1 if alone else count)))
    return torch.cat(parts)


def _padded_rows(base: Any, tree: Tree, rows: range) -> Tensor:
    device = base.device
    width = max(tree.paths[row].size for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, path in enumerate(tree.paths[rows.start : rows.stop]):
        ids[row, : path.size] = torch.from_numpy(tree.input_ids[path])
        mask[row, : path.size] = 1
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    mine = (tree.target_sequence >= rows.start) & (tree.target_sequence < rows.stop)
    depth = tree.position_ids[tree.target_source[mine]]
    places = torch.from_numpy((tree.target_sequence[mine] - rows.start) * width + depth)
    sources, row_of_target = torch.unique(places, return_inverse=True)
    tokens = torch.from_numpy(tree.target_id[mine])
    return _score(base, inputs, sources.to(device), row_of_target.to(device), tokens.to(device))


def _score(
    base: Any, inputs: dict[str, Any], sources: Tensor, rows: Tensor, tokens: Tensor
) -> Tensor:
    """[U] log-probabilities of `tokens` at `sources[rows]`, which count flattened positions."""
    if has_plain_head(base):
        hidden = base.get_decoder()(**inputs, use_cache=False).last_hidden_state
        head = base.get_output_embeddings()
        hidden = hidden.reshape(-1, hidden.shape[-1])[sources]
        return head_logprobs(hidden, head.weight, head.bias, rows, tokens)
    # The model's own head, whatever it does, on the wanted positions alone.
    width = inputs["input_ids"].shape[1]
    columns, column = torch.unique(sources % width, return_inverse=True)
    logits = base(**inputs, use_cache=False, logits_to_keep=columns).logits
    chosen = logits[sources // width, column].float()
    return torch.log_softmax(chosen, dim=-1)[rows, tokens]


_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_plain_head(base: Any) -> bool:
    """Whether the model's logits are just its last hidden state times a frozen matrix: no soft
    cap, no scale, no adapter. Seen from what it does to two tokens, once per model."""
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or any(p.requires_grad for p in head.parameters()):
        return False
    if base not in _plain_heads:
        ids = torch.arange(2, device=base.device)[None]
        training = base.training
        base.eval()  # no dropout: a look must not draw from anybody's random numbers
        try:
            with torch.no_grad():
                output = base(ids, use_cache=False, output_hidden_states=True)
                own = head(output.hidden_states[-1])
        finally:
            base.train(training)
        _plain_heads[base] = torch.equal(own, output.logits)
    return _plain_heads[base]


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model; a bare one is its own base."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
