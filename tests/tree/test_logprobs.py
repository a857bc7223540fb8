"""Log-probabilities of targets: heads of every kind, the loss, and what a call leaves behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import stemtune as st
from stemtune.kernels import head
from stemtune.tree.build import build_tree
from stemtune.tree.logprobs import has_plain_head
from tests.models import tiny_model, with_lora
from tests.trees import CASES, gradient, largest_error, one_by_one, relative_error, spell

EVERYTHING = [sequence for case in CASES.values() for sequence in case]
backends = pytest.mark.parametrize("backend", ["segments", "padded"])


def with_trained_head(model: Any) -> Any:
    model.get_output_embeddings().requires_grad_(True)
    return model


# A model with a head of some kind, and whether it is plain: a frozen matrix and no more.
HEADS: dict[str, tuple[Callable[..., Any], bool]] = {
    "a matrix": (lambda **kw: with_lora(tiny_model("llama", **kw)), True),
    "a tied matrix": (
        lambda **kw: with_lora(tiny_model("llama", tie_word_embeddings=True, **kw)),
        True,
    ),
    "a matrix and a bias": (lambda **kw: with_lora(tiny_model("phi", **kw)), True),
    "a soft cap": (lambda **kw: with_lora(tiny_model("gemma2", **kw)), False),
    "a scale": (lambda **kw: with_lora(tiny_model("cohere", **kw)), False),
    "trained": (lambda **kw: with_trained_head(tiny_model("llama", **kw)), False),
    "trained beside an adapter": (
        lambda **kw: with_lora(tiny_model("llama", **kw), modules_to_save=["lm_head"]),
        False,
    ),
    "with an adapter": (
        lambda **kw: with_lora(tiny_model("llama", **kw), target_modules=["q_proj", "lm_head"]),
        False,
    ),
}
heads = pytest.mark.parametrize("head", HEADS)


@backends
@heads
def test_any_head_is_exact(head: str, backend: str) -> None:
    make, _ = HEADS[head]
    model, oracle = make(), make(attn_implementation="eager").double()
    logps = st.target_logprobs(model, build_tree(EVERYTHING), backend)
    expected = one_by_one(oracle, EVERYTHING)
    assert largest_error(logps, expected) < 1e-5
    assert relative_error(gradient(model, logps), gradient(oracle, expected)) < 1e-5


@heads
def test_has_plain_head(head: str) -> None:
    make, plain = HEADS[head]
    model = make()
    assert has_plain_head(getattr(model, "get_base_model", lambda: model)()) == plain


@pytest.mark.parametrize(
    "change",
    [
        with_trained_head,
        lambda model: with_lora(model, modules_to_save=["lm_head"]),
        lambda model: with_lora(model, target_modules=["q_proj", "lm_head"]),
    ],
    ids=["trained", "trained beside an adapter", "with an adapter"],
)
def test_a_head_may_change_after_it_was_looked_at(change: Callable[[Any], Any]) -> None:
    model = tiny_model("llama")
    tree = build_tree(EVERYTHING)
    st.target_logprobs(model, tree)
    model, oracle = change(model), change(tiny_model("llama", attn_implementation="eager")).double()
    logps, expected = st.target_logprobs(model, tree), one_by_one(oracle, EVERYTHING)
    assert largest_error(logps, expected) < 1e-5
    assert relative_error(gradient(model, logps), gradient(oracle, expected)) < 1e-5


def test_a_small_soft_cap_is_seen() -> None:
    """Logits far below the cap are hardly changed by it, and still it is there."""
    model = tiny_model("gemma2", final_logit_softcapping=30.0, initializer_range=0.02)
    assert not has_plain_head(model)


@backends
def test_chunks_change_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.BLOCKS, "cpu", (3, 5))
    model = with_lora(tiny_model("llama"))
    oracle = with_lora(tiny_model("llama", attn_implementation="eager")).double()
    logps = st.target_logprobs(model, build_tree(EVERYTHING), backend)
    expected = one_by_one(oracle, EVERYTHING)
    assert largest_error(logps, expected) < 1e-5
    assert relative_error(gradient(model, logps), gradient(oracle, expected)) < 1e-5


@backends
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm", "mistral", "gemma2", "cohere"])
def test_the_loss_is_transformers_own(family: str, backend: str) -> None:
    """Of a batch that is padded on the right, with -100 where nothing is trained."""
    width = max(map(len, EVERYTHING))
    ids, mask, labels = (torch.full((len(EVERYTHING), width), x) for x in (0, 0, -100))
    for row, sequence in enumerate(EVERYTHING):
        tokens = torch.tensor(sequence.input_ids)
        ids[row, : len(sequence)] = tokens
        mask[row, : len(sequence)] = 1
        labels[row, : len(sequence)] = tokens.where(torch.tensor(sequence.is_target), -100)
    oracle = tiny_model(family, attn_implementation="eager")
    expected = oracle(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss = -st.target_logprobs(tiny_model(family), build_tree(EVERYTHING), backend).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@backends
def test_comes_sequence_by_sequence_in_the_order_given(backend: str) -> None:
    model = tiny_model("llama")
    single = {
        number: st.target_logprobs(model, build_tree([sequence]), backend)
        for number, sequence in enumerate(EVERYTHING)
        if sequence.num_targets
    }
    order = [number for number in reversed(range(len(EVERYTHING))) if number in single]
    logps = st.target_logprobs(model, build_tree([EVERYTHING[n] for n in order]), backend)
    assert largest_error(logps, torch.cat([single[number] for number in order])) < 1e-5


@backends
def test_no_targets(backend: str) -> None:
    logps = st.target_logprobs(tiny_model("llama"), build_tree([spell("abc")]), backend)
    assert (tuple(logps.shape), logps.dtype) == ((0,), torch.float32)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_is_fp32_whatever_the_model_is(dtype: torch.dtype, backend: str) -> None:
    model = tiny_model("llama").to(dtype)
    logps = st.target_logprobs(model, build_tree(EVERYTHING), backend)
    assert logps.dtype == torch.float32


def test_takes_an_adapted_model_and_the_base_inside_it() -> None:
    model = with_lora(tiny_model("llama"))
    tree = build_tree(EVERYTHING)
    inside = st.target_logprobs(model.get_base_model(), tree)
    assert torch.equal(inside, st.target_logprobs(model, tree))
    with model.disable_adapter():
        bare = st.target_logprobs(model, tree)
    expected = one_by_one(tiny_model("llama", attn_implementation="eager"), EVERYTHING)
    assert largest_error(bare, expected) < 1e-5
    assert largest_error(inside, bare) > 0.1


def test_the_first_call_draws_no_more_dropout_than_the_next() -> None:
    """Else a resumed run would draw other masks than the uninterrupted one."""
    model = with_lora(tiny_model("llama"), lora_dropout=0.5).train()
    tree = build_tree(EVERYTHING)
    calls = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            calls.append(st.target_logprobs(model, tree))
    assert torch.equal(*calls)


@backends
def test_leaves_the_mode_of_the_model_alone(backend: str) -> None:
    model = with_lora(tiny_model("llama")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    st.target_logprobs(model, build_tree(EVERYTHING), backend)
    assert model.training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n in before if "lora_" in n
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
