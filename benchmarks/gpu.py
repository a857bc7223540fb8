"""The tree on a GPU: families × {bfloat16, NF4} × back ends: exact? how fast? how much memory?

    python benchmarks/gpu.py --json gpu.json                  # about 1 billion parameters each
    python benchmarks/gpu.py --size 8b --families llama,qwen3
    python benchmarks/gpu.py --device cpu --size tiny          # what a CPU can: a trial of the file

One file: it needs torch, transformers, peft and stemtune, no data and no network; NF4 runs where
bitsandbytes is there, TRL's loss where trl is. Weights are random. The work is a step of a
role-play: a persona, and rows that go on from it. Each back end's log-probabilities are compared
with separate sequences in the same dtype, whose own distance (`padded`, plain matrix products
against SDPA) stands beside it; a training step (forward and backward, LoRA on every linear layer of
every block) is timed. `plain` is transformers' own padded forward and cross-entropy, `trl` the same
through TRL's `selective_log_softmax`. Medians; tokens/s count each sequence whole.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F

import stemtune as st
from stemtune.model.lora import use_fast_layers
from stemtune.model.quantized import hold_packed
from stemtune.model.targets import find_targets

ON = {"cuda": ["segments", "varlen", "flex", "padded"], "cpu": ["segments", "padded"]}
# hidden, intermediate, blocks, heads, key/value heads
SIZES = {
    "tiny": (64, 128, 2, 4, 2),
    "1b": (2048, 8192, 16, 32, 8),
    "3b": (3072, 8192, 28, 24, 8),
    "8b": (4096, 14336, 32, 32, 8),
}
VOCABULARY = {"tiny": 1000}
GEMMA = {"attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 128}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 256}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {**GEMMA, "sliding_window": 256}),
    "glm": ("GlmConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {}),
}
Step = Callable[[], torch.Tensor]


def main() -> None:
    """Measure and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="1b")
    parser.add_argument("--families", default="llama,qwen3,mistral,gemma2,glm,phi3")
    parser.add_argument("--persona", type=int, default=600, help="tokens that all rows share")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--row", type=int, default=120, help="tokens of a row behind the persona")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    head = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "options": {k: v for k, v in vars(options).items() if k != "json"},
    }
    rows: list[dict[str, Any]] = []
    for family in options.families.split(","):
        for held in ("bfloat16", "nf4"):
            if held == "nf4" and find_spec("bitsandbytes") is None:
                continue
            for row in measure(options, family, held):
                rows.append(row)
                print(json.dumps(row), flush=True)
                if options.json:  # what was measured stays, whatever comes
                    text = json.dumps({**head, "rows": rows}, indent=1)
                    options.json.write_text(text + "\n", encoding="utf-8")


def measure(options: argparse.Namespace, family: str, held: str) -> list[dict[str, Any]]:
    """A line for each way of running a step."""
    model = make_model(options, family, held)
    sequences = make_sequences(options, model.config.vocab_size)
    tree = st.build_tree(sequences)
    few = sequences[:3]
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16):
        model.get_base_model().set_attn_implementation("eager")
        tree_of_few = st.build_tree(few)
        truth = st.target_logprobs(model, tree_of_few, "padded", keep_attention=True).cpu()
    found = []
    ways: dict[str, Step] = {name: ours(model, tree, name) for name in ON[options.device]}
    ways["plain"] = plain(model, sequences)
    if find_spec("trl") is not None:
        ways["trl"] = by_trl(model, sequences)
    for name, step in ways.items():
        row: dict[str, Any] = {"family": family, "held": held, "way": name}
        try:
            if name in ON[options.device]:
                row |= error(model, few, name, truth, options.device)
            row |= timed(step, options, sum(len(s) for s in sequences))
        except (RuntimeError, NotImplementedError, ValueError) as problem:
            row["refused"] = str(problem).splitlines()[0]
        found.append(row)
    return found


def make_model(options: argparse.Namespace, family: str, held: str) -> PeftModel:
    """A random model with an adapter that does something."""
    name, more = FAMILIES[family]
    hidden, inner, blocks, heads, kv_heads = SIZES[options.size]
    config = getattr(transformers, name)(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=VOCABULARY.get(options.size, 128_256),
        max_position_embeddings=8192,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.requires_grad_(False)
    if held == "nf4":
        quantize(base, options.device)
    targets = find_targets(base, "auto")
    lora = LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, use_fast_layers(lora))
    assert isinstance(model, PeftModel)
    return model.eval()


def quantize(base: Any, device: str) -> None:
    """The layers of the blocks in NF4, as a base that is loaded so has them."""
    from bitsandbytes.nn.modules import Linear4bit

    for name in [n for n, m in base.named_modules() if type(m) is torch.nn.Linear and "." in n]:
        layer = base.get_submodule(name)
        packed = Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4"
        )
        packed.load_state_dict(layer.state_dict())
        packed.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, packed.to(device))
    base.is_quantized = True
    hold_packed(base)


def make_sequences(options: argparse.Namespace, vocabulary: int) -> list[st.Sequence]:
    """A persona, and rows of different lengths whose second half is trained."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, vocabulary, (count,), generator=generator).tolist()

    persona = tokens(options.persona)
    sequences = []
    for number in range(options.rows):
        own = tokens(max(4, options.row * (number % 4 + 1) // 3))
        mask = [False] * (len(persona) + len(own) // 2)
        mask += [True] * (len(persona) + len(own) - len(mask))
        sequences.append(st.Sequence(persona + own, mask))
    return sequences


def ours(model: PeftModel, tree: Any, backend: str) -> Step:
    """Through stemtune."""
    return lambda: -st.target_logprobs(model, tree, backend).mean()


def padded(model: PeftModel, sequences: list[st.Sequence]) -> tuple[Any, ...]:
    """Ids, attention mask and target mask, right-padded."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    seen, wanted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence.input_ids)
        wanted[row, : len(sequence)] = torch.tensor(sequence.is_target)
        seen[row, : len(sequence)] = 1
    return tuple(x.to(model.device) for x in (ids, seen, wanted))


def plain(model: PeftModel, sequences: list[st.Sequence]) -> Step:
    """As transformers' own loop has it: the whole padded batch, labels, cross-entropy."""
    ids, seen, wanted = padded(model, sequences)
    labels = ids.masked_fill(~wanted, -100)

    def step() -> torch.Tensor:
        model.get_base_model().set_attn_implementation(own_attention(model))
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        flat = logits[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)

    return step


def own_attention(model: PeftModel) -> str:
    """The fastest that transformers has for the family without further packages."""
    return "eager" if model.config.model_type == "gemma2" else "sdpa"


def by_trl(model: PeftModel, sequences: list[st.Sequence]) -> Step:
    """Log-probabilities as TRL's trainers take them."""
    from trl.trainer.utils import selective_log_softmax

    ids, seen, wanted = padded(model, sequences)

    def step() -> torch.Tensor:
        model.get_base_model().set_attn_implementation(own_attention(model))
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        logps = selective_log_softmax(logits[:, :-1], ids[:, 1:])
        return -logps[wanted[:, 1:]].mean()

    return step


def error(
    model: PeftModel, few: list[st.Sequence], backend: str, truth: torch.Tensor, device: str
) -> dict[str, float]:
    """Distance from separate sequences, both in the dtype of a step."""
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        logps = st.target_logprobs(model, st.build_tree(few), backend).float().cpu()
    difference = (logps - truth).abs()
    return {"mean_error": float(difference.mean()), "max_error": float(difference.max())}


def timed(step: Step, options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Seconds of forward and backward behind a first untimed one; memory at the most."""
    on_gpu = options.device == "cuda"
    seconds: list[float] = []
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.rounds + 1):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(options.device, torch.bfloat16):
            loss = step()
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[1:])
    row: dict[str, Any] = {"seconds": middle, "tokens_per_second": tokens / middle}
    if on_gpu:
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


if __name__ == "__main__":
    main()
