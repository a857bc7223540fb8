"""The model that every contestant starts from: the same base, the same LoRA adapter."""

from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model

import stemtune as st
from stemtune.config import Adapter, Model
from stemtune.model.adapter import add_adapter

Dtype = Literal["float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_base(dtype: Dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct on the CPU with its frozen weights held in `dtype`, and its tokenizer.

    Attention is set to plain SDPA, the fastest for every peer; stemtune puts its own in by itself.
    """
    model, tokenizer = st.load_model(Model(base="smollm2", dtype=dtype, device="cpu"))
    model.set_attn_implementation("sdpa")
    return model, tokenizer


def load_adapted(dtype: Dtype, *, ours: bool = False) -> tuple[Any, Any]:
    """The base with a fresh fp32 adapter, the same numbers for every caller: r 16, alpha 32, no
    dropout, on every linear layer of every block. `ours`: as stemtune makes it."""
    model, tokenizer = load_base(dtype)
    torch.manual_seed(0)
    if ours:
        adapted = add_adapter(model, Adapter(r=16, alpha=32, dropout=0.0), seed=0)
    else:
        config = LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
    adapted.train()
    return adapted, tokenizer
