"""Families of models, each proved on a tiny random one: the tree gives what separate sequences
give, or is refused by name; the adapter finds its layers; replies come as from the untouched model.

The table of docs/models.md is what is found here: `python -m tests.invariants.test_families`.
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import stemtune as st
from stemtune.model.targets import find_targets
from stemtune.tree.support import why_no_tree
from tests.models import tiny_model, with_lora
from tests.runs import IGNORED
from tests.trees import CASES, gradient, largest_error, one_by_one, relative_error

pytestmark = IGNORED
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NO_TREE = {
    "phi3 (long)": "its position encoding depends on the length of the sequence",
    "gpt2": "it drops attention weights in training",
    "gpt_oss": "it has attention sinks",
    "mamba": "its attention takes no function from outside",
    "qwen3_next": "its attention takes no function from outside",
}
# family → models of it, and what is special
PROVED = {
    "llama": ("Llama 2 and 3, SmolLM2, Yi, Vicuna", ""),
    "mistral": ("Mistral", "sliding windows"),
    "qwen2": ("Qwen2, Qwen2.5", "sliding windows in some blocks"),
    "qwen3": ("Qwen3", ""),
    "qwen3_moe": ("Qwen3-MoE", "experts are not adapted"),
    "qwen3_next": ("Qwen3-Next", "linear attention; experts are not adapted"),
    "gemma2": ("Gemma 2 without a cap", "alternating windows, a cap on logits"),
    "gemma2 (capped)": ("Gemma 2", "caps on scores and logits, alternating windows"),
    "gemma3": ("Gemma 3", "alternating windows"),
    "phi": ("Phi-1.5, Phi-2", ""),
    "phi3": ("Phi-3 4k, Phi-4", "fused projections"),
    "phi3 (long)": ("Phi-3 128k", "long RoPE; sequences run one at a time"),
    "glm": ("GLM-4-9B (hf), ChatGLM2, ChatGLM3", "fused projections"),
    "glm4": ("GLM-4-0414", "fused projections"),
    "minicpm3": ("MiniCPM3", "multi-head latent attention"),
    "olmo2": ("OLMo 2", ""),
    "granite": ("Granite 3", "scaled logits"),
    "granitemoe": ("Granite 3 MoE", "experts are not adapted"),
    "smollm3": ("SmolLM3", "blocks without RoPE"),
    "starcoder2": ("StarCoder2", "sliding windows"),
    "gpt2": ("GPT-2", "layers of the kind Conv1D"),
    "cohere": ("Command R", "scaled logits"),
    "mixtral": ("Mixtral", "experts are not adapted"),
    "deepseek_v3": ("DeepSeek-V3", "latent attention; experts are not adapted"),
    "gpt_oss": ("gpt-oss", "experts are not adapted"),
    "mamba": ("Mamba", "no attention"),
}
STOP = 0  # of generation: never drawn by chance alone


def adapted(family: str, **options: Any) -> PeftModel:
    model = tiny_model(family, **options)
    return with_lora(model, target_modules=find_targets(model, "auto"))


@lru_cache
def truth(family: str) -> PeftModel:
    attention = None if family in ("mamba",) else "eager"
    return adapted(family, attn_implementation=attention).double()


def expected_logps(family: str, case: str) -> torch.Tensor:
    """The shortest first: transformers' long RoPE remembers the longest sequence so far."""
    oracle, sequences = truth(family), CASES[case]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    parts = {i: one_by_one(oracle, [sequences[i]]) for i in order if sequences[i].num_targets}
    return torch.cat([parts[i] for i in sorted(parts)])


@pytest.mark.parametrize("case", ["targets inside shared stems", "longer than any window"])
@pytest.mark.parametrize("backend", ["segments", "padded"])
@pytest.mark.parametrize("family", PROVED)
def test_exact(family: str, backend: str, case: str) -> None:
    model, tree = adapted(family), st.build_tree(CASES[case])
    assert why_no_tree(tiny_model(family)) == NO_TREE.get(family, "")
    if backend != "padded" and family in NO_TREE:
        with pytest.raises(NotImplementedError, match=NO_TREE[family]):
            st.target_logprobs(model, tree, backend)
        return
    logps = st.target_logprobs(model, tree, backend)
    expected = expected_logps(family, case)
    assert largest_error(logps, expected) < 2e-5
    error = relative_error(gradient(model, logps), gradient(truth(family), expected))
    assert error < 2e-5


@pytest.mark.parametrize("family", PROVED)
def test_replies_are_those_of_the_untouched_model(family: str) -> None:
    """After the tree has been there: attention stays as it was put."""
    ids = torch.tensor([[7, 3, 9, 1, 22, 14]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": STOP}
    attention = None if family in ("mamba",) else "eager"
    untouched = adapted(family, attn_implementation=attention)
    expected = untouched.generate(input_ids=ids, **options)
    model = adapted(family)
    backend = "padded" if family in NO_TREE else "segments"
    st.target_logprobs(model, st.build_tree(CASES["a shared stem"]), backend)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    assert expected.shape == (1, 14)


# -- the table --------------------------------------------------------------------------------


def row(family: str) -> str:
    """A line of docs/models.md."""
    model = tiny_model(family)
    names, notes = PROVED[family]
    reason = why_no_tree(model)
    tree = "yes" if not reason else f"no: {reason}"
    targets = ", ".join(f"`{name}`" for name in find_targets(model, "auto"))
    kind = model.config.model_type
    return f"| {names} | `{kind}` | {tree} | {targets} | {notes} |"


@pytest.mark.parametrize("family", PROVED)
def test_the_page_says_what_is_so(family: str) -> None:
    assert row(family) in PAGE.read_text(encoding="utf-8").splitlines()


def write_page() -> None:
    """The table of the page, anew; what stands before and behind it stays."""
    before, rest = PAGE.read_text(encoding="utf-8").split("<!-- families -->\n")
    _, after = rest.split("<!-- end -->\n") if "<!-- end -->\n" in rest else ("", "")
    head = "| models | `model_type` | tree | `auto` adapts | |\n|---|---|---|---|---|\n"
    table = head + "".join(f"{row(family)}\n" for family in PROVED)
    PAGE.write_text(f"{before}<!-- families -->\n{table}<!-- end -->\n{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_page())
