"""What engines take of an adapter, by their documentation."""

from stemtune.config import Adapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
LARGEST_RANK = VLLM_RANKS[-1]


def serving_notes(adapter: Adapter) -> list[str]:
    """What would be refused, or run otherwise, where the adapter is served as one: empty for what
    every engine takes. Merged into its base it runs everywhere."""
    notes: list[str] = []
    if adapter.use_dora:
        notes.append("vLLM and llama.cpp refuse DoRA")
    if adapter.modules_to_save:
        names = ", ".join(adapter.modules_to_save)
        notes.append(f"vLLM and llama.cpp refuse layers that are trained whole ({names})")
    if adapter.use_rslora:
        notes.append("llama.cpp knows no rank-stabilised scale: it is to be exported by stemtune")
    if adapter.r > LARGEST_RANK:
        notes.append(f"vLLM takes ranks of up to {LARGEST_RANK}")
    return notes


def llama_cpp_takes(adapter: Adapter) -> bool:
    """Whether it is served by llama.cpp, and so by Ollama, as an adapter."""
    return not adapter.use_dora and not adapter.modules_to_save


def vllm_rank(adapter: Adapter) -> int | None:
    """What vLLM's `--max-lora-rank` is to be; None where it refuses the adapter."""
    if not llama_cpp_takes(adapter):  # it refuses the same kinds
        return None
    return next((rank for rank in VLLM_RANKS if rank >= adapter.r), None)
