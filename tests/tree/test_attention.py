"""Attention over a tree against the formula, and through models against transformers' own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import stemtune as st
from stemtune.tree.attention import NAME, TreeLayout, choose_backend, tree_attention
from stemtune.tree.build import Tree, build_tree
from tests.models import tiny_model, with_lora
from tests.trees import CASES, gradient, largest_error, one_by_one, relative_error, spell

CPU = torch.device("cpu")
SCALE = 0.3  # not the default, so that forgetting it shows

cases = pytest.mark.parametrize("case", CASES)
windows = pytest.mark.parametrize("window", [None, 1, 4])
kv_heads = pytest.mark.parametrize("kv_heads", [1, 2, 4])


def visible(tree: Tree, window: int | None) -> list[list[int]]:
    """For each packed token the packed tokens that it sees: the last `window` of its path."""
    seen: dict[int, list[int]] = {}
    for path in tree.paths:
        for end in range(1, path.size + 1):
            start = 0 if window is None else max(0, end - window)
            seen[int(path[end - 1])] = path[start:end].tolist()
    return [seen[index] for index in range(tree.num_distinct)]


def formula(q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]]) -> Tensor:
    """softmax(q kᵀ · scale) v, a head and a token at a time: [1, N, H, D]."""
    _, heads, n, width = q.shape
    result = torch.empty(1, n, heads, width, dtype=q.dtype)
    for head in range(heads):
        kv_head = head * k.shape[1] // heads
        for token in range(n):
            keys, values = k[0, kv_head, seen[token]], v[0, kv_head, seen[token]]
            weights = torch.softmax(SCALE * keys @ q[0, head, token], dim=0)
            result[0, token, head] = weights @ values
    return result


def random_states(n: int, heads: int, seed: int, m: int | None = None) -> tuple[Tensor, ...]:
    """q [1, 4, n, 8] and k, v [1, heads, m, 8], float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, 4, n, 8)] + [(1, heads, n if m is None else m, 8)] * 2
    return tuple(torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)


def attend(backend: str, tree: Tree, states: tuple[Tensor, ...], window: int | None) -> Tensor:
    layout = TreeLayout(tree, backend, CPU)
    kwargs = {"scaling": SCALE, "sliding_window": window, "tree": layout}
    result, weights = tree_attention(torch.nn.Module(), *states, None, **kwargs)
    assert weights is None
    return result


@cases
@windows
@kv_heads
def test_segments(case: str, window: int | None, kv_heads: int) -> None:
    tree = build_tree(CASES[case])
    states = random_states(tree.num_distinct, kv_heads, seed=0)
    expected = formula(*states, visible(tree, window))
    assert largest_error(attend("segments", tree, states, window), expected) < 1e-12


# Compiling takes a compiler and half a minute a shape: CPUs run it as it is, and say so.
uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@uncompiled
@cases
@windows
def test_flex(case: str, window: int | None) -> None:
    tree = build_tree(CASES[case])
    states = random_states(tree.num_distinct, 2, seed=1)
    expected = formula(*states, visible(tree, window))
    states = tuple(part.float() for part in states)
    assert largest_error(attend("flex", tree, states, window), expected) < 1e-5


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What FlashAttention documents: packed sequences [ΣL, H, D] with cumulated lengths, and a
    window (left, right) that is aligned to the bottom right corner."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert (ends_q.dtype, ends_k.dtype) == (torch.int32, torch.int32)
    assert longest_q == int(ends_q.diff().max()) and longest_k == int(ends_k.diff().max())
    assert scale == SCALE
    left, right = window_size
    outputs = []
    for number in range(len(ends_q) - 1):
        rows = slice(int(ends_q[number]), int(ends_q[number + 1]))
        columns = slice(int(ends_k[number]), int(ends_k[number + 1]))
        n, m = rows.stop - rows.start, columns.stop - columns.start
        seen = []
        for row in range(n):
            own = row + m - n
            first = 0 if left < 0 else max(0, own - left)
            seen.append(list(range(first, m if right < 0 else own + right + 1)))
        parts = [x.transpose(0, 1)[None] for x in (q[rows], k[columns], v[columns])]
        outputs.append(formula(*parts, seen)[0])
    return torch.cat(outputs)


@cases
@windows
@kv_heads
def test_varlen_layout(
    case: str, window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrays and options handed to FlashAttention, with its documented formula in its place:
    the real one takes CUDA (below)."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    tree = build_tree(CASES[case])
    states = random_states(tree.num_distinct, kv_heads, seed=2)
    expected = formula(*states, visible(tree, window))
    assert largest_error(attend("varlen", tree, states, window), expected) < 1e-12


@cases
def test_varlen_arrays(case: str) -> None:
    tree = build_tree(CASES[case])
    seen = visible(tree, None)
    keys, ends_q, ends_k, longest_q, longest_k = TreeLayout(tree, "varlen", CPU).varlen
    paths = [seen[segment.end - 1] for segment in tree.segments]
    expected = [index for path in paths for index in path]
    assert (list(range(tree.num_distinct)) if keys is None else keys.tolist()) == expected
    assert ends_q.tolist() == [0, *(segment.end for segment in tree.segments)]
    assert ends_k.diff().tolist() == [len(path) for path in paths]
    assert longest_q == max(segment.end - segment.start for segment in tree.segments)
    assert longest_k == max(map(len, paths))


def random_sequences(stem: int, branch: int) -> list[st.Sequence]:
    """Three that share a stem, each with its own branch as target; longer than a block of rows."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(64, (stem + 3 * branch,), generator=generator).tolist()
    mask = [False] * stem + [True] * branch
    starts = [stem + number * branch for number in range(3)]
    return [st.Sequence(ids[:stem] + ids[i : i + branch], mask) for i in starts]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_bfloat16_is_as_near_to_the_truth_as_eager(family: str) -> None:
    """The truth is the same bfloat16 weights in float64; eager bfloat16 sets the measure."""
    sequences = random_sequences(stem=300, branch=270)
    model = with_lora(tiny_model(family).bfloat16())
    eager = with_lora(tiny_model(family, attn_implementation="eager").bfloat16())
    truth = with_lora(tiny_model(family, attn_implementation="eager").bfloat16()).double()
    logps = [st.target_logprobs(model, build_tree(sequences))]
    logps += [one_by_one(oracle, sequences) for oracle in (eager, truth)]
    assert logps[0].dtype == torch.float32
    grads = [gradient(m, x) for m, x in zip((model, eager, truth), logps, strict=True)]
    assert 0 < relative_error(logps[0], logps[2]) < 2 * relative_error(logps[1], logps[2])
    assert 0 < relative_error(grads[0], grads[2]) < 2 * relative_error(grads[1], grads[2])


@uncompiled
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "mistral", "gemma2"])
def test_flex_through_a_model(family: str) -> None:
    sequences = CASES["longer than any window"] + CASES["nothing shared"]
    oracle = tiny_model(family, attn_implementation="eager")
    with torch.no_grad():
        logps = st.target_logprobs(tiny_model(family), build_tree(sequences), "flex")
        assert largest_error(logps, one_by_one(oracle, sequences)) < 1e-5


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "chosen"),
    [
        ("auto", "cuda", torch.bfloat16, "varlen"),
        ("auto", "cuda", torch.float16, "varlen"),
        ("auto", "cuda", torch.float32, "segments"),
        ("auto", "cpu", torch.bfloat16, "segments"),
        ("auto", "mps", torch.float16, "segments"),
        ("flex", "cuda", torch.bfloat16, "flex"),
        ("segments", "cuda", torch.bfloat16, "segments"),
    ],
)
def test_choose_backend(wanted: str, device: str, dtype: torch.dtype, chosen: str) -> None:
    config = LlamaConfig()
    assert choose_backend(wanted, torch.device(device), dtype, config) == chosen


def test_a_cap_on_scores_is_not_for_varlen() -> None:
    device, capped = torch.device("cuda"), Gemma2Config(attn_logit_softcapping=50.0)
    assert choose_backend("auto", device, torch.bfloat16, capped) == "segments"
    tree = build_tree(CASES["a shared stem"])
    states = random_states(tree.num_distinct, 2, seed=5)
    layout = TreeLayout(tree, "varlen", CPU)
    with pytest.raises(NotImplementedError, match="a cap on scores"):
        tree_attention(torch.nn.Module(), *states, None, tree=layout, softcap=50.0)


@pytest.mark.parametrize("extra", ["s_aux", "position_bias"])
def test_refuses_what_no_back_end_does(extra: str) -> None:
    tree = build_tree(CASES["a shared stem"])
    states = random_states(tree.num_distinct, 2, seed=5)
    layout = TreeLayout(tree, "segments", CPU)
    with pytest.raises(NotImplementedError, match=extra):
        tree_attention(torch.nn.Module(), *states, None, tree=layout, **{extra: torch.ones(4)})


def test_refuses_attention_dropout() -> None:
    model = with_lora(tiny_model("llama", attention_dropout=0.1)).train()
    with pytest.raises(NotImplementedError, match="it drops attention weights in training"):
        st.target_logprobs(model, build_tree(CASES["a shared stem"]))


def test_without_a_tree_it_is_sdpa() -> None:
    states = random_states(6, 4, seed=6)
    mask = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(7)) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    module = torch.nn.Module()
    result, _ = tree_attention(module, *states, mask, scaling=SCALE)
    expected, _ = sdpa_attention_forward(module, *states, mask, scaling=SCALE)
    assert torch.equal(result, expected)


PROMPTS = ["abcdefghij", "cab", "fedcbagh"]


def generate(model: Any, prompts: list[str]) -> list[list[int]]:
    """Greedily, from a batch that is padded on the left."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + spell(p).input_ids.tolist() for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return output[:, width:].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "mistral", "qwen2", "gemma2"])
def test_generation_is_what_it_was(family: str) -> None:
    model, oracle = tiny_model(family), tiny_model(family, attn_implementation="eager")
    st.target_logprobs(model, build_tree(CASES["a shared stem"]))
    assert model.config._attn_implementation == NAME
    alone = [generate(oracle, [prompt])[0] for prompt in PROMPTS]
    assert [generate(model, [prompt])[0] for prompt in PROMPTS] == alone
    assert generate(model, PROMPTS) == alone
    assert len({tuple(ids) for ids in alone}) == len(PROMPTS), "every prompt gives the same"
