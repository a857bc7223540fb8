"""What engines take of an adapter, by their documentation."""

from stemtune.config import Adapter

LARGEST_RANK = 512  # of vLLM's --max-lora-rank


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
