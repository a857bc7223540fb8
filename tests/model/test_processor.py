"""What a CPU is made ready by."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from stemtune.model import processor

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", CORES),
        ("100000 100000\n", 1),
        ("150000 100000\n", min(2, CORES or 1)),
        ("50000 100000\n", 1),
        ("99900000 100000\n", CORES),
        ("", CORES),
        ("something else\n", CORES),
        (None, CORES),
    ],
)
def test_available_cores(
    text: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a container's file allows; no file, or one that says nothing, allows all."""
    file = tmp_path / "cpu.max"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(processor, "CGROUP", file)
    assert processor.available_cores() == expected


# In a process of its own: both last as long as the process.
STEPS = """
import logging, resource, sys, torch
from stemtune.model import processor
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
torch.set_num_threads(7)
processor.available_cores = lambda: 3
processor.prepare_processor()
processor.prepare_processor()
print("threads", torch.get_num_threads())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(3):
    before = faults()
    blocks = [torch.zeros(1 << 24) for _ in range(4)]  # 64 MB each
    del blocks
    taken = faults() - before
print("faults", taken)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is told so on Linux only")
@pytest.mark.parametrize(("environment", "threads"), [({}, 3), ({"OMP_NUM_THREADS": "7"}, 7)])
def test_threads_and_memory(environment: dict[str, str], threads: int) -> None:
    """A later step asks the system for no memory that an earlier one had; what somebody set is
    left as it is."""
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert f"threads {threads}" in lines
    assert sum(line.startswith("freed memory is kept") for line in lines) == 1
    (taken,) = [int(line.split()[1]) for line in lines if line.startswith("faults")]
    assert taken < 256 * 1024 * 1024 // 4096 // 50  # of 65,536 pages
