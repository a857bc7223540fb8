"""The model that every contestant starts from: the same base, the same LoRA adapter."""

from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from workload import ROOT

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


def random_base(folder: Path) -> str:
    """A base of the shape of Llama-3.2-1B with random weights, in bfloat16, and a small tokenizer:
    for memory, which numbers don't change."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(ROOT / "src/stemtune/starter/hamlet.jsonl")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        eos_token_id=fast.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return str(folder)
