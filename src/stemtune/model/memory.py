"""How much memory a micro-batch takes, and how much was taken."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn

from stemtune.tree.build import build_tree
from stemtune.tree.logprobs import target_logprobs
from stemtune.tree.sequence import Sequence

PROBE_TOKENS = 128
USABLE = 0.5  # of the free memory: temporaries and fragmentation take the rest
SMALLEST = 512
LARGEST = {"cpu": 8192, "cuda": 65536, "mps": 8192}  # past these a larger tree is not faster


def auto_micro_batch_tokens(
    model: nn.Module, sequence: Sequence, device: torch.device, backend: str
) -> int:
    """Distinct tokens whose activations should fit: the free memory over what one token of a short
    probe keeps for the backward pass. Running out of memory later halves it."""
    free = free_memory(device) * USABLE
    budget = int(free / _bytes_per_token(model, sequence, backend))
    return max(SMALLEST, min(budget, LARGEST[device.type]))


def _bytes_per_token(model: nn.Module, sequence: Sequence, backend: str) -> float:
    """Bytes that the forward pass of one token keeps, each storage counted once."""
    seen: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = min(PROBE_TOKENS, len(sequence))
    ids = sequence.input_ids[:size]
    probe = Sequence(ids, [False] * (size - 1) + [size > 1])

    def unchanged(tensor: Any) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, unchanged):
        kept = target_logprobs(model, build_tree([probe]), backend)
    total = sum(seen.values())
    del kept
    return max(1.0, total / size)


@contextmanager
def memory_errors() -> Generator[None]:
    """Within it a CPU out of memory raises what a GPU does: torch's allocator there raises a plain
    RuntimeError, with this text.

    Raises:
        torch.OutOfMemoryError: see above.
    """
    try:
        yield
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from error
    except RuntimeError as error:
        if any(text in str(error) for text in ("can't allocate memory", "std::bad_alloc")):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> float:
    """MiB taken at the most so far: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
