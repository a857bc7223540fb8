"""What this machine has."""

import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
from huggingface_hub import constants

from stemtune.cache import cache_folder
from stemtune.data.parallel import cores
from stemtune.export.hub import login
from stemtune.model.load import choose_device, choose_dtype

PACKAGES = "stemtune torch transformers peft accelerate tokenizers datasets trl gguf bitsandbytes"


def environment() -> dict[str, str | int | float]:
    """Versions, device, memory and folders, by name."""
    device = choose_device("auto")
    facts: dict[str, str | int | float] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in PACKAGES.split():
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts |= {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "dtype": str(choose_dtype("auto", device)).removeprefix("torch."),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "free_memory_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "cache": str(cache_folder()),
        "hub": constants.ENDPOINT,
        "hub_login": login() or "none",
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts |= {"gpu_memory_gib": round(total / 2**30, 1), "gpu_free_gib": round(free / 2**30, 1)}
    return facts
