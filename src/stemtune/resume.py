"""What a resumed run must have in common with the run that was interrupted."""

import logging
import platform
from typing import Any

import torch

from stemtune.config import Config
from stemtune.errors import ConfigError

log = logging.getLogger(__name__)

# Where the files are, how much memory is used, when is saved: none of it decides what is trained.
FREE = {
    "data.path",
    "data.eval_path",
    "adapter.init_from",  # its weights are compared
    "objective.reference",
    "model.base",  # its weights are compared, and the data by their ids
    "model.dtype",
    "model.device",
    "model.attention",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "train.save_steps",
    "train.save_total_limit",
}
HINT = "undo the change, or start anew in another output.dir"


def training_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what is trained, as `section.key`."""
    settings = config.model_dump(exclude={"output": True, "tracking": True})
    flat: dict[str, Any] = {}
    for section, values in settings.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:  # several objectives
            flat[section] = values
    return {key: value for key, value in flat.items() if key not in FREE}


def settings_difference(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, a line each."""
    return [
        f"{key}: {before.get(key)!r} → {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def refuse_differences(state: dict[str, Any], config: Config, facts: dict[str, str]) -> None:
    """Compare a checkpoint's state with the run file and the data of now.

    Args:
        facts: fingerprints, by the name of what they are of.

    Raises:
        ConfigError: with everything that differs.
    """
    changes = settings_difference(state["settings"], training_settings(config))
    came_to = {"dtype": state["dtype"], "attention": state["backend"]}
    for key, was in state["wanted"].items():
        wanted = getattr(config.model, key)
        if wanted not in ("auto", was, came_to[key]):
            changes.append(f"model.{key}: {was!r} → {wanted!r}")
    changes += [name for name, value in facts.items() if state["facts"].get(name) != value]
    if changes:
        what = "can't resume, since this has changed: " + "; ".join(changes)
        raise ConfigError(what, where=config.output.dir, hint=HINT)


def refuse_other_base(state: dict[str, Any], fingerprint: str) -> None:
    """Compare the weights of the base.

    Raises:
        ConfigError: they are others.
    """
    if state["base"] != fingerprint:
        what = "can't resume: this is another base than the run began with"
        raise ConfigError(what, where="model.base", hint=HINT)


def rounding() -> dict[str, Any]:
    """What decides in which order numbers are summed, and so a result's last bits."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def warn_of_other_rounding(state: dict[str, Any]) -> None:
    """Say so if the run goes on exactly, but not to the last bit."""
    changes = settings_difference(state["rounding"], rounding())
    if changes:
        log.warning("the last bits of what follows may differ: %s", "; ".join(changes))
