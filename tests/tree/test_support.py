"""Models that can't attend over a tree: named, refused, and exact without one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import stemtune as st
from stemtune.tree.build import build_tree
from stemtune.tree.selfcheck import self_check
from stemtune.tree.support import has_length_dependent_rope, why_no_tree
from tests.models import tiny_model, with_lora
from tests.trees import CASES, gradient, largest_error, one_by_one, relative_error

SEQUENCES = [*CASES["longer than any window"], *CASES["nothing shared"]]
ROPE = {"rope_theta": 10000.0}
HALF_HEAD = 4  # a factor for each pair of a head's 8 dimensions
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * HALF_HEAD,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 6,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def with_rope(rope: dict[str, Any], longest: int) -> Callable[..., Any]:
    return lambda **kw: tiny_model(
        "llama", rope_parameters={**ROPE, **rope}, max_position_embeddings=longest, **kw
    )


def without_backends(**options: Any) -> Any:
    model = tiny_model("llama", **options)
    model._supports_attention_backend = False
    return model


# A model, and a word of the reason. Sequences here are 5 to 19 tokens long, so that those with
# RoPE that depends on the length have some on each side of where it changes.
UNSUPPORTED: dict[str, tuple[Callable[..., Any], str]] = {
    "no back ends": (without_backends, "from outside"),
    "dynamic RoPE": (with_rope(DYNAMIC, 6), "length"),
    "longrope": (with_rope(LONGROPE, 24), "length"),
    "sinks": (lambda **kw: tiny_model("gpt_oss", **kw), "sinks"),
}
unsupported = pytest.mark.parametrize("kind", UNSUPPORTED)


@unsupported
def test_why_no_tree(kind: str) -> None:
    make, word = UNSUPPORTED[kind]
    assert word in why_no_tree(make())
    assert has_length_dependent_rope(make().config) == (word == "length")


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_that_does_not_depend_on_the_length(kind: str) -> None:
    more = {
        "default": {},
        "linear": {"factor": 2.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    }
    make = with_rope({"rope_type": kind, **more[kind]}, 4096)
    assert why_no_tree(make()) == ""
    logps = st.target_logprobs(make(), build_tree(SEQUENCES))
    assert largest_error(logps, one_by_one(make(attn_implementation="eager"), SEQUENCES)) < 1e-5


def shortest_first(model: torch.nn.Module) -> torch.Tensor:
    """One by one. transformers' dynamic RoPE remembers the longest sequence so far, so that the
    shortest must come first; the result is in the order of SEQUENCES all the same."""
    order = sorted(range(len(SEQUENCES)), key=lambda i: len(SEQUENCES[i]))
    parts = {i: one_by_one(model, [SEQUENCES[i]]) for i in order if SEQUENCES[i].num_targets}
    return torch.cat([parts[i] for i in sorted(parts)])


@unsupported
@pytest.mark.parametrize("backend", ["auto", "segments", "flex"])
def test_a_tree_is_refused(kind: str, backend: str) -> None:
    make, word = UNSUPPORTED[kind]
    with pytest.raises(NotImplementedError, match=word):
        st.target_logprobs(make(), build_tree(SEQUENCES), backend)


@unsupported
def test_padded_is_one_by_one(kind: str) -> None:
    """With their own attention. RoPE that depends on the length looks at the longest row of a
    batch, so that such rows must run one at a time."""
    make, _ = UNSUPPORTED[kind]
    model, oracle = make(), make(attn_implementation="eager")
    before = model.config._attn_implementation
    logps = st.target_logprobs(model, build_tree(SEQUENCES), "padded")
    assert largest_error(logps, shortest_first(oracle)) < 1e-5
    assert model.config._attn_implementation == before != "stemtune"


@pytest.mark.parametrize(
    "kind",
    [
        "dynamic RoPE",
        "longrope",
    ],
)
def test_what_ran_before_does_not_matter(kind: str) -> None:
    """Else micro-batches, the order of a step and a resume would change what is trained."""
    make, _ = UNSUPPORTED[kind]
    model = make()
    for sequence in sorted(SEQUENCES, key=len, reverse=True):
        if sequence.num_targets:
            logps = st.target_logprobs(model, build_tree([sequence]), "padded")
            fresh = make(attn_implementation="eager")
            assert largest_error(logps, one_by_one(fresh, [sequence])) < 1e-5


@pytest.mark.parametrize("kind", ["dynamic RoPE", "longrope"])
def test_the_length_does_matter_there(kind: str) -> None:
    """Else the test above would show nothing: the shortest sequence in a batch with the longest."""
    model = UNSUPPORTED[kind][0]()
    short, long = min(SEQUENCES, key=len), max(SEQUENCES, key=len)
    ids = torch.zeros(2, len(long), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate((short, long)):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.input_ids)
        mask[row, : len(sequence)] = 1
    together = model(input_ids=ids, attention_mask=mask).logits[0, : len(short)]
    alone = model(input_ids=ids[:1, : len(short)]).logits[0]
    assert (together - alone).abs().max() > 0.01


@unsupported
def test_padded_gradients_are_those_of_one_by_one(kind: str) -> None:
    make, _ = UNSUPPORTED[kind]
    adapted = {"target_modules": ["q_proj", "v_proj"]}
    model = with_lora(make(), **adapted)
    oracle = with_lora(make(attn_implementation="eager"), **adapted)
    logps = st.target_logprobs(model, build_tree(SEQUENCES), "padded")
    expected = shortest_first(oracle)
    assert relative_error(gradient(model, logps), gradient(oracle, expected)) < 1e-4


@unsupported
def test_the_self_check_says_why(kind: str) -> None:
    make, word = UNSUPPORTED[kind]
    verdict = self_check(make(), SEQUENCES, "segments")
    assert not verdict.passed
    assert word in verdict.reason
