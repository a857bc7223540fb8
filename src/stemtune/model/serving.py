"""What engines take of an adapter, by their documentation."""

from collections.abc import Sequence as Seq

from stemtune.config import Adapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank


def serving_notes(adapter: Adapter) -> list[str]:
    """What would be refused, or run otherwise, where the adapter is served as one: empty for what
    every engine takes. Merged into its base it runs everywhere."""
    refused = refused_parts(adapter.use_dora, adapter.modules_to_save)
    notes = [f"vLLM and llama.cpp refuse {part}" for part in refused]
    if adapter.use_rslora:
        notes.append("llama.cpp knows no rank-stabilised scale: it is to be exported by stemtune")
    if adapter.init_weights == "loftq":
        notes.append("an adapter that begins by LoftQ belongs on its own rounded base: merge it")
    if vllm_rank(saved_rank(adapter)) is None:
        notes.append(f"vLLM takes ranks of up to {VLLM_RANKS[-1]}")
    return notes


def refused_parts(use_dora: bool, modules_to_save: Seq[str]) -> list[str]:
    """What of an adapter neither vLLM nor llama.cpp, and so Ollama, loads."""
    parts = ["DoRA"] if use_dora else []
    if modules_to_save:
        parts.append(f"layers that are trained whole ({', '.join(modules_to_save)})")
    return parts


def saved_rank(adapter: Adapter) -> int:
    """The rank of the adapter that a run leaves: see `stemtune.model.pissa`."""
    return 2 * adapter.r if adapter.init_weights == "pissa" else adapter.r


def vllm_rank(rank: int) -> int | None:
    """What vLLM's `--max-lora-rank` is to be for an adapter; None where it takes none so large."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
