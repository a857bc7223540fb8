"""stemtune: fine-tune open language models, every shared token computed once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemtune.config import Config
    from stemtune.errors import StemtuneError
    from stemtune.model.load import load_model
    from stemtune.runfile import load_config, load_stages
    from stemtune.trainer import Trainer, train
    from stemtune.tree.build import build_tree
    from stemtune.tree.logprobs import target_logprobs
    from stemtune.tree.sequence import Sequence

__version__ = "0.1.0"

# Public names are imported when first used: `stemtune --help` must not wait for torch.
_HOMES = {
    "Config": "stemtune.config",
    "Sequence": "stemtune.tree.sequence",
    "StemtuneError": "stemtune.errors",
    "Trainer": "stemtune.trainer",
    "build_tree": "stemtune.tree.build",
    "load_config": "stemtune.runfile",
    "load_model": "stemtune.model.load",
    "load_stages": "stemtune.runfile",
    "target_logprobs": "stemtune.tree.logprobs",
    "train": "stemtune.trainer",
}

__all__ = [
    "Config",
    "Sequence",
    "StemtuneError",
    "Trainer",
    "build_tree",
    "load_config",
    "load_model",
    "load_stages",
    "target_logprobs",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stemtune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
