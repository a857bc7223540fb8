"""Steps on a GPU: by the tree, by each of its back ends, and by plain loops.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --models llama-8b --works windows,pair_700 --ways flex,plain,trl
    python benchmarks/gpu.py --device cpu --models tiny --rounds 1    # a trial of the file

One file: it needs torch, transformers, peft and stemtune, no data and no network. Weights and
tokens are random; the works have the lengths and the sharing of benchmarks/sft.py and dpo.py. A
step is forward and backward through LoRA (r 16 on attention and MLP) on a frozen base in bfloat16,
or in NF4 (`--held nf4`, where bitsandbytes is there), in micro-batches of `--budget` tokens:

- stemtune's back ends: the step's tree. `alone`: the one that `auto` takes, each sequence a tree of
  its own, packed without padding: the same execution without the sharing.
- `plain`: transformers' own loop on PEFT's adapter: batches padded to the longest of rows of like
  length, SDPA, logits of every position, cross-entropy.
- `hand`: the same by hand: no padding mask, so that SDPA's causal kernel runs, and the head on
  targets alone.
- `trl`: TRL's fused head (its Triton kernels) on such batches, as its trainers run them.

Every round runs each way once; the table has medians, counts tokens as separate sequences have
them, and tells how far each back end is from separate sequences by plain matrix products. *share*
is the share of the bfloat16 matrix peak, measured beside, of the operations that a way needs.
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
from stemtune.plan.pack import pack

# family, then: hidden, intermediate, blocks, heads, key/value heads, vocabulary
ONE = (2048, 8192, 16, 32, 8, 128_256)
MODELS = {
    "tiny": ("Llama", 64, 128, 2, 4, 2, 1000),
    "llama-1b": ("Llama", *ONE),
    "mistral-1b": ("Mistral", *ONE),
    "gemma2-1b": ("Gemma2", *ONE),
    "glm-1b": ("Glm", *ONE),
    "phi3-1b": ("Phi3", *ONE),
    "qwen3-1.7b": ("Qwen3", 2048, 6144, 28, 16, 8, 151_936),
    "qwen3-4b": ("Qwen3", 2560, 9728, 36, 32, 8, 151_936),
    "llama-8b": ("Llama", 4096, 14336, 32, 32, 8, 128_256),
}
MORE: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 256},
    "Gemma2": {"attn_logit_softcapping": 50.0, "sliding_window": 256},
    "Glm": {"partial_rotary_factor": 0.5},
}
BACKENDS = ("flex", "varlen", "segments", "padded")
RANK = 16
Rows = list[st.Sequence]
Step = Callable[[], None]


def main() -> None:
    """Measure, print a table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", default="llama-1b,qwen3-4b,llama-8b")
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--ways", default="flex,varlen,alone,plain,hand,trl")
    parser.add_argument("--held", choices=["bfloat16", "nf4"], default="bfloat16")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "peak_tflops": matmul_peak(options.device) / 1e12,
        "rows": [],
    }
    print(f"{found['device']}, {found['peak_tflops']:.0f} TFLOP/s, {found['versions']}")
    for name in options.models.split(","):
        found["rows"] += measure(options, name, found["peak_tflops"] * 1e12)
        if options.json:  # what was measured stays, whatever comes
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        "| model | work | tokens / distinct | way | s | range | tokens/s | to the best | share |"
        " MiB | error, mean, largest |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(map(line_of, found["rows"])))


# -- works -----------------------------------------------------------------------------------------


class Draw:
    """Random tokens, and sequences of them."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.generator = vocabulary, torch.Generator().manual_seed(1)

    def __call__(self, count: int) -> list[int]:
        return torch.randint(1, self.vocabulary, (count,), generator=self.generator).tolist()

    def answers(self, prompt: int, answer: int, count: int) -> Rows:
        """As many answers to one prompt."""
        stem = self(prompt)
        return [answered(stem, self(answer + 7 * (n % 3))) for n in range(count)]

    def dialogue(self, persona: list[int], turns: int) -> tuple[list[int], list[tuple[int, int]]]:
        """A dialogue of questions and answers of about 40 and 110 tokens: ids, and each answer's
        place."""
        ids, places = list(persona), []
        for turn in range(turns):
            ids += self(30 + 10 * (turn % 3))
            places.append((len(ids), len(ids) + 90 + 20 * (turn % 3)))
            ids += self(places[-1][1] - places[-1][0])
        return ids, places


def answered(prompt: list[int], answer: list[int]) -> st.Sequence:
    """The answer is trained."""
    return st.Sequence(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def windows(draw: Draw) -> Rows:
    """16 windows: each answer of four dialogues of one persona behind all that came before it."""
    persona = draw(375)
    dialogues = [draw.dialogue(persona, 4) for _ in range(4)]
    return [answered(ids[:start], ids[start:end]) for ids, at in dialogues for start, end in at]


def turns(draw: Draw) -> Rows:
    """The same, each dialogue as one sequence of which every answer is trained."""
    persona = draw(375)
    rows = []
    for ids, places in (draw.dialogue(persona, 4) for _ in range(4)):
        mask = [any(start <= n < end for start, end in places) for n in range(len(ids))]
        rows.append(st.Sequence(ids, mask))
    return rows


WORKS: dict[str, Callable[[Draw], Rows]] = {
    "windows": windows,
    "turns": turns,
    "pair_700": lambda draw: [row for _ in range(4) for row in draw.answers(700, 30, 2)],
    "pair_2100": lambda draw: [row for _ in range(2) for row in draw.answers(2100, 100, 2)],
    "ranked_700": lambda draw: [row for _ in range(4) for row in draw.answers(700, 30, 4)],
    "single": lambda draw: [answered(draw(150 + 10 * n), draw(200)) for n in range(12)],
}


# -- models ----------------------------------------------------------------------------------------


def make_model(options: argparse.Namespace, name: str, *, ours: bool) -> PeftModel:
    """A random model with an adapter; `ours`: in stemtune's layers."""
    family, hidden, inner, blocks, heads, kv_heads, vocabulary = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128 if hidden // heads > 64 or family == "Qwen3" else hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=0,
        **MORE.get(family, {}),
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.requires_grad_(False)
    if not ours and family == "Gemma2":  # no other attention of its own caps its scores
        base.set_attn_implementation("eager")
    if options.held == "nf4":
        quantize(base, options.device, ours=ours)
    elif not ours and find_spec("trl") is not None:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(base)
    targets = find_targets(base, "auto")
    # Not zero: an adapter that does something.
    lora = LoraConfig(
        r=RANK, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(0)
    model = get_peft_model(base, use_fast_layers(lora) if ours else lora)
    assert isinstance(model, PeftModel)
    return model.train()


def quantize(base: Any, device: str, *, ours: bool) -> None:
    """The layers of the blocks in NF4, as a base that is loaded so has them."""
    from bitsandbytes.nn.modules import Linear4bit

    for name in [n for n, m in base.named_modules() if type(m) is torch.nn.Linear and "." in n]:
        layer = base.get_submodule(name)
        with torch.device(device):  # on a CPU the random start of 8 billion weights takes minutes
            packed = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                quant_type="nf4",
                compute_dtype=torch.bfloat16,
            )
        packed.load_state_dict(layer.state_dict())
        packed.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, packed.to(device))
    base.is_quantized = True
    if ours:
        hold_packed(base)


# -- ways ------------------------------------------------------------------------------------------


def by_tree(model: PeftModel, batches: list[Rows], backend: str) -> Step:
    """Through stemtune; the trees are built in the step's time."""

    def step() -> None:
        for rows in batches:
            logps = st.target_logprobs(model, st.build_tree(rows), backend)
            (-logps.mean() / len(batches)).backward()

    return step


def unshared(rows: Rows) -> Rows:
    """The same lengths, and nothing in common."""
    return [
        st.Sequence([number + 1, *row.input_ids[1:].tolist()], row.is_target)
        for number, row in enumerate(rows)
    ]


def padded(model: PeftModel, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels, right-padded."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        own = torch.from_numpy(row.input_ids).long()
        ids[number, : len(row)], seen[number, : len(row)] = own, 1
        labels[number, : len(row)] = own.where(torch.from_numpy(row.is_target), -100)
    return ids.to(model.device), seen.to(model.device), labels.to(model.device)


def plain(model: PeftModel, batches: list[Rows]) -> Step:
    """As transformers' own loop has it."""

    def loss(rows: Rows) -> torch.Tensor:
        ids, seen, labels = padded(model, rows)
        return model(input_ids=ids, attention_mask=seen, labels=labels, use_cache=False).loss

    return looped(batches, loss)


def hand(model: PeftModel, batches: list[Rows]) -> Step:
    """By hand, as well as one can without sharing."""
    base: Any = model.get_base_model()

    def loss(rows: Rows) -> torch.Tensor:
        ids, _, labels = padded(model, rows)
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100
        logits = base.get_output_embeddings()(hidden[wanted])
        return F.cross_entropy(logits.float(), labels[:, 1:][wanted])

    return looped(batches, loss)


def by_trl(model: PeftModel, batches: list[Rows]) -> Step:
    """With TRL's head, as its trainers call it."""

    def loss(rows: Rows) -> torch.Tensor:
        ids, seen, labels = padded(model, rows)
        more = {"use_cache": False, "fused_lm_head": True}
        return model(input_ids=ids, attention_mask=seen, labels=labels, **more).loss

    return looped(batches, loss)


def looped(batches: list[Rows], loss: Callable[[Rows], torch.Tensor]) -> Step:
    """One micro-batch after another."""

    def step() -> None:
        for rows in batches:
            (loss(rows) / len(batches)).backward()

    return step


PEERS = {"plain": plain, "hand": hand, "trl": by_trl}


def cut(rows: Rows, budget: int, *, shared: bool) -> list[Rows]:
    """Micro-batches."""
    return [[rows[i] for i in batch] for batch in pack(rows, budget, shared=shared)[0]]


# -- figures ---------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, name: str, peak: float) -> list[dict[str, Any]]:
    """A line for each way of each work: ours on one model, the peers' on another."""
    works = {work: WORKS[work](Draw(MODELS[name][-1])) for work in options.works.split(",")}
    found: list[dict[str, Any]] = []
    for ours in (True, False):
        ways = [way for way in options.ways.split(",") if (way not in PEERS) == ours]
        model = make_model(options, name, ours=ours) if ways else None
        for work, rows in works.items() if model is not None else ():
            head = {
                "model": name,
                "held": options.held,
                "work": work,
                "tokens": sum(map(len, rows)),
            }
            head |= {"distinct": st.build_tree(rows).num_distinct}
            lines = [head | line for line in timed(options, model, rows, ways, peak)]
            print("\n".join(map(line_of, lines)), flush=True)
            found += lines
        del model
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    for line in found:
        same = [one for one in found if one["work"] == line["work"] and "median" in one]
        peers = [one["median"] for one in same if one["way"] in PEERS]
        if peers and "median" in line:
            line["to_best_peer"] = min(peers) / line["median"]
    return sorted(found, key=lambda line: list(works).index(line["work"]))


def timed(
    options: argparse.Namespace, model: PeftModel, rows: Rows, ways: list[str], peak: float
) -> list[dict[str, Any]]:
    """A line for each way: each runs once in a round."""
    made = {way: step_of(model, rows, way, options.budget) for way in ways}
    lines = {way: warmed(step, model, options) for way, (step, _, _) in made.items()}
    for _ in range(options.rounds):
        for way, (step, _, _) in made.items():
            if "refused" not in lines[way]:
                lines[way]["seconds"].append(clocked(step, model, options))
    for way, (_, tokens, flops) in made.items():
        line = lines[way]
        line |= {"way": way, "computed": tokens, "flops": flops(model)}
        if line["seconds"]:
            line["median"] = statistics.median(line["seconds"])
            line["share"] = line["flops"] / line["median"] / peak
            line["tokens_per_second"] = sum(map(len, rows)) / line["median"]
            if way in BACKENDS:
                line |= error_of(model, rows[:3], way, options.device)
    return list(lines.values())


def error_of(model: PeftModel, rows: Rows, backend: str, device: str) -> dict[str, float]:
    """How far a back end's log-probabilities are from those of separate sequences by plain matrix
    products, both in the dtype of a step. What `padded` has here, is what two right ways differ."""
    tree = st.build_tree(rows)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        model.get_base_model().set_attn_implementation("eager")
        truth = st.target_logprobs(model, tree, "padded", keep_attention=True)
        difference = (st.target_logprobs(model, tree, backend) - truth).abs()
    return {"mean_error": float(difference.mean()), "max_error": float(difference.max())}


def step_of(model: PeftModel, rows: Rows, way: str, budget: int) -> tuple[Step, int, Any]:
    """A way's step, the tokens it computes, and a function that counts its operations."""
    if way in PEERS:
        batches = cut(rows, budget, shared=False)
        tokens = sum(len(batch) * max(map(len, batch)) for batch in batches)
        pairs = sum(len(batch) * max(map(len, batch)) ** 2 / 2 for batch in batches)
        scored = tokens if way == "plain" else sum(row.num_targets for row in rows)
        return PEERS[way](model, batches), tokens, lambda m: flops_of(m, tokens, scored, pairs)
    rows = unshared(rows) if way == "alone" else rows
    batches = cut(rows, budget, shared=True)
    trees = [st.build_tree(batch) for batch in batches]
    tokens = sum(tree.num_distinct for tree in trees)
    pairs = sum(int(tree.position_ids.sum()) + tree.num_distinct for tree in trees)
    scored = sum(len(tree.pairs[0]) for tree in trees)
    backend = "auto" if way == "alone" else way
    return by_tree(model, batches, backend), tokens, lambda m: flops_of(m, tokens, scored, pairs)


def flops_of(model: PeftModel, tokens: int, scored: int, pairs: float) -> float:
    """Of forward and backward: frozen products twice (no gradient of weights), LoRA's three times,
    attention's two products three and a half times (scores again), the head forward and back."""
    base: Any = model.get_base_model()
    config = base.config
    inner = [m for n, m in base.named_modules() if hasattr(m, "lora_A")]
    frozen = sum(m.in_features * m.out_features for m in inner)
    lora = sum(RANK * (m.in_features + m.out_features) for m in inner)
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    head = config.hidden_size * config.vocab_size
    return 2.0 * (tokens * (2 * frozen + 3 * lora) + scored * 2 * head + pairs * 7 * width)


def warmed(step: Step, model: PeftModel, options: argparse.Namespace) -> dict[str, Any]:
    """The first two steps, untimed: what is compiled is compiled; the memory at the most."""
    result: dict[str, Any] = {"seconds": []}
    if options.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        result["first"] = clocked(step, model, options)
        result["second"] = clocked(step, model, options)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as problem:
        result["refused"] = (str(problem) or repr(problem)).splitlines()[0][:200]
    if options.device == "cuda":
        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return result


def clocked(step: Step, model: PeftModel, options: argparse.Namespace) -> float:
    """Seconds of a step."""
    model.zero_grad()
    settle(options.device)
    start = time.perf_counter()
    with torch.autocast(options.device, torch.bfloat16):
        step()
    settle(options.device)
    return time.perf_counter() - start


def settle(device: str) -> None:
    """Wait until a GPU is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_peak(device: str) -> float:
    """Operations per second of a large bfloat16 product."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    best = 0.0
    for _ in range(8):
        settle(device)
        start = time.perf_counter()
        for _ in range(8):
            a @ b
        settle(device)
        best = max(best, 8 * 2 * size**3 / (time.perf_counter() - start))
    return best


def line_of(row: dict[str, Any]) -> str:
    """Of the table."""
    counts = f"{row['tokens']:,} / {row['distinct']:,}"
    head = f"| {row['model']} | {row['work']} | {counts} | {row['way']} |"
    if "median" not in row:
        return f"{head} refused: {row['refused']} |"
    low, high = min(row["seconds"]), max(row["seconds"])
    ratio = f"{row['to_best_peer']:.2f}x" if "to_best_peer" in row else ""
    error = f"{row['mean_error']:.1e}, {row['max_error']:.1e}" if "mean_error" in row else ""
    return (
        f"{head} {row['median']:.4f} | {low:.4f}-{high:.4f} | {row['tokens_per_second']:,.0f} |"
        f" {ratio} | {row['share']:.0%} | {row.get('peak_mib', 0):,.0f} | {error} |"
    )


if __name__ == "__main__":
    main()
