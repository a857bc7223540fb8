"""How much memory there is, and how much was taken."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from stemtune.errors import OutOfMemoryError

CGROUP = Path("/sys/fs/cgroup")  # of a container


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


@contextmanager
def memory_told(when: str) -> Generator[None]:
    """Within it memory may run out where no smaller micro-batch helps.

    Raises:
        OutOfMemoryError: it did, and what to do about it.
    """
    try:
        with memory_errors():
            yield
    except torch.OutOfMemoryError as error:
        hint = "`stemtune check` says what fits: model.dtype, model.quantization, adapter.r"
        raise OutOfMemoryError(f"out of memory while {when}", where="train", hint=hint) from error


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; in main memory no more than this process may."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _left_to_container(), _left_to_process())


def _left_to_container() -> int:
    """Of what its control group allows; what is cached of files makes way."""
    try:
        allowed = int((CGROUP / "memory.max").read_text())
        taken = int((CGROUP / "memory.current").read_text())
        kinds = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, allowed - taken + int(kinds["file"]))
    except (OSError, ValueError, KeyError):  # no container, or "max": no limit
        return sys.maxsize


def _left_to_process() -> int:
    """Of the addresses that `ulimit -v` allows."""
    if sys.platform == "win32":
        return sys.maxsize
    import resource

    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(0, allowed - psutil.Process().memory_info().vms)


def used_memory(device: torch.device) -> int:
    """Bytes taken now: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> float:
    """MiB taken at the most so far: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
