"""Tiny models and a tiny tokenizer: random, small enough for a CPU, the same on every call.

Their weights are drawn wide (`initializer_range`), so that attention and logits are far from
uniform: a wrong mask or position moves a log-probability by much more than any tolerance here.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MambaConfig,
    MiniCPM3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    Starcoder2Config,
)

VOCAB_SIZE = 64

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
LATENT = {  # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Five letters and more are past where it changes.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 6,
}

# What each family adds to, or changes in, the shape above.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "glm": (GlmConfig, {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "glm4": (Glm4Config, {"head_dim": 8, "partial_rotary_factor": 0.5}),
    # Sliding windows: in every layer, in the second of two, in the first of two.
    "mistral": (MistralConfig, {"sliding_window": 4}),
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": 5.0,
        },
    ),
    # Scores that are capped, in windows and without.
    "gemma2 (capped)": (Gemma2Config, {**GEMMA, "attn_logit_softcapping": 3.0}),
    "gemma3": (
        Gemma3TextConfig,
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (Phi3Config, {}),
    "phi3 (long)": (
        Phi3Config,
        {
            "rope_parameters": LONG_ROPE,
            "original_max_position_embeddings": 6,
            "max_position_embeddings": 24,
        },
    ),
    "minicpm3": (MiniCPM3Config, LATENT),
    "olmo2": (Olmo2Config, {}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0]}),
    "starcoder2": (Starcoder2Config, {"sliding_window": 4}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen3_moe": (Qwen3MoeConfig, {"head_dim": 8, **EXPERTS}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": (GraniteMoeConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            **LATENT,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    # No attention to give a function to, in all of their blocks or in some.
    "mamba": (MambaConfig, {}),
    "qwen3_next": (
        Qwen3NextConfig,
        {
            "head_dim": 8,
            **EXPERTS,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    # Heads that are more than a matrix: a scale, a bias (and a soft cap: gemma2).
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "phi": (PhiConfig, {}),
    # Attention that no tree back end does: sinks.
    "gpt_oss": (
        GptOssConfig,
        {
            "head_dim": 8,
            "sliding_window": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def tiny_model(
    family: str,
    vocab_size: int = VOCAB_SIZE,
    attn_implementation: str | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model of a family of `FAMILIES`, frozen and in eval mode, in fp32.

    Equal arguments give equal weights, so that a second call makes the untouched copy that an
    oracle needs. `overrides` are values of its config.
    """
    config_class, changes = FAMILIES[family]
    config = config_class(**{**SHAPE, **changes, "vocab_size": vocab_size, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Experts one by one, the plain way, where attention is plain as well: for an oracle.
        plain = {"experts_implementation": "eager"} if attn_implementation == "eager" else {}
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attn_implementation, **plain
        )
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):  # transformers starts them at zero
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def with_lora(model: PreTrainedModel, **overrides: Any) -> PeftModel:
    """The model with an adapter on every linear layer; the adapter is random and not zero.

    Equal arguments give equal adapters. `overrides` are values of the `LoraConfig`.
    """
    config = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "fan_in_fan_out": model.config.model_type == "gpt2",  # its layers are transposed
        "task_type": "CAUSAL_LM",
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(**{**config, **overrides}))
    assert isinstance(adapted, PeftModel)
    return adapted.eval()


SENTENCES = [
    "To be, or not to be, that is the question.",
    "What is virtue, and can it be taught? The unexamined life is not worth living.",
    "Alas, poor Yorick! I knew him, Horatio: a fellow of infinite jest.",
    "You are a helpful assistant. Answer in the words of the character.",
    "学而时习之 不亦说乎",
    "有朋自远方来 不亦乐乎",
    "这部电影的导演是谁 我很喜欢他的作品",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that spells any text, with a ChatML template. Its pad token is its end
    token, as in many real ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_model(folder: Path | str, family: str = "llama", **overrides: Any) -> None:
    """Write a base that `model.base` can name: config, weights, tokenizer, template. `overrides`
    are values of its config."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    values = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": end}
    model = tiny_model(family, **values, **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
