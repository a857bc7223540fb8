"""A CPU made ready to train on: as many threads as there are cores to run them, and an allocator
that keeps what it has."""

import ctypes
import logging
import math
import mmap
import os
import platform
import sys
from functools import cache
from pathlib import Path

import psutil
import torch

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds it may run, and in how many
# mallopt(3) and madvise(2)
M_TRIM_THRESHOLD, M_MMAP_MAX, MADV_HUGEPAGE = -1, -4, 14
DISABLED = -1


@cache
def prepare_processor() -> None:
    """Once per process, before weights load."""
    # The processes of one run share the cores.
    cores = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if cores < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores)
        log.info("%d threads: this process may use no more cores", cores)
    _keep_freed_memory()


def available_cores() -> int:
    """Cores that this process may use: a container, or `taskset`, can allow fewer than there are,
    and threads that wait for one another slow a step down many times over."""
    process = psutil.Process()
    cores = len(process.cpu_affinity() or []) if hasattr(process, "cpu_affinity") else 0
    cores = cores or psutil.cpu_count() or 1
    try:
        quota, period = CGROUP.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or "max": no limit
        return cores


def _keep_freed_memory() -> None:
    """Keep freed blocks for the next step, and have them in huge pages. On Linux with glibc.

    By itself glibc gives every large block back to the system at once and takes it anew, and the
    system clears it page by page, 4 kB at a time: a third of a step's time on two cores.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, DISABLED)
    if kept:
        huge = _in_huge_pages(libc)
        log.info("freed memory is kept for the next step%s", ", in huge pages" if huge else "")


def _in_huge_pages(libc: ctypes.CDLL) -> bool:
    """Ask for huge pages where the heap is going to grow: addresses alone, no memory is taken."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free(libc.malloc(psutil.virtual_memory().available // 2))
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith("[heap]"):
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            return libc.madvise(first, last - first, MADV_HUGEPAGE) == 0
    return False
