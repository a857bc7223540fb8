"""A base from a GGUF file: dequantized to safetensors once, in the user's cache."""

import logging
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from stemtune.errors import ModelError
from stemtune.model.converted import converted_once, digest_of, reason_of

log = logging.getLogger(__name__)
SUFFIX = ".gguf"


def require_package(where: str) -> None:
    """Raises: ModelError, if the package gguf is missing."""
    if find_spec("gguf") is None:
        hint = "pip install 'stemtune[gguf]'"
        raise ModelError("a GGUF file needs the package gguf", where=where, hint=hint)


def require_file(file: Path) -> None:
    """Refuse what is no GGUF file, without reading it whole.

    Raises:
        ModelError: there is none, it can't be read, or the package gguf is missing.
    """
    where = str(file)
    require_package("model.base")
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except FileNotFoundError:
        hint = "model.base is relative to the run file"
        raise ModelError("there is no such GGUF file", where=where, hint=hint) from None
    except OSError as error:
        what = f"the base can't be read: {error.strerror}"
        raise ModelError(what, where=where, hint="may this user read the file?") from None
    if magic != b"GGUF":
        hint = "is it whole? Download it again"
        raise ModelError("this is no GGUF file", where=where, hint=hint)


def converted_folder(file: Path) -> Path:
    """The converted base, in float32, made on the first call.

    Raises:
        ModelError: the file is damaged, or of a kind that transformers can't read.
        DiskError: there is no room for it.
    """
    require_file(file)
    return convert_as(f"{file.stem}-{digest_of([file])}", file, f"{file.name} is converted, once")


def convert_as(name: str, file: Path, message: str) -> Path:
    """The same by a name in the cache that the caller chooses; the message is logged before."""

    def convert(folder: Path) -> None:
        log.info(message)
        _convert(file, folder)

    return converted_once(name, "config.json", convert)


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        with redirect_stderr(StringIO()):  # a bar that no setting of transformers' switches off
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # gguf, numpy and transformers: each has its own kinds
        what = f"this GGUF file can't be read: {reason_of(error)}"
        hint = "is it whole, and of an architecture that transformers reads from GGUF?"
        raise ModelError(what, where=str(file), hint=hint) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
