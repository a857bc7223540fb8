"""Whether a run goes on with an earlier one, and what the two must have in common."""

import difflib
import logging
import platform
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch

from stemtune import checkpoint
from stemtune.config import Config
from stemtune.errors import ConfigError

log = logging.getLogger(__name__)

# Where the files are, how much memory is used, when is saved: none of it decides what is trained.
FREE = {
    "data.path",
    "data.eval_path",
    "data.license",
    "adapter.init_from",  # its weights are compared
    "objective.reference",
    "model.base",  # its weights are compared, and the data by their ids
    "model.revision",  # a resumed run keeps its commit
    "model.dtype",
    "model.device",
    "model.offload_layers",
    "model.attention",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "train.save_steps",
    "train.save_total_limit",
    "train.keep_every",
    "train.time_limit",
    "train.on_nonfinite",  # what was skipped was skipped; what comes is up to the user
    "train.max_skipped_steps",
}
HINT = "undo the change, allow it by name (--allow-change), or start anew in another output.dir"


def settle_folder(config: Config, resume: bool) -> tuple[Config, bool]:
    """The config with the folder that a run goes to, and whether it goes on with what is there, as
    `output.on_existing` says."""
    folder, wanted = Path(config.output.dir), config.output.on_existing
    if resume or wanted == "refuse" or not _has_run(folder):
        return config, resume
    if wanted == "resume":
        # Interrupted before its first checkpoint, it begins again.
        return config, bool(checkpoint.steps(folder / "checkpoints"))
    number = 2
    while _has_run(folder.with_name(f"{folder.name}-{number}")):
        number += 1
    path = str(folder.with_name(f"{folder.name}-{number}"))
    log.info("%s holds a run already: this one goes to %s", folder, path)
    output = config.output.model_copy(update={"dir": path})
    return config.model_copy(update={"output": output}), False


def refuse_new_folder(stages: Seq[Config]) -> None:
    """Several stages find one another by their folders.

    Raises:
        ConfigError: these are to take other names.
    """
    if any(stage.output.on_existing == "new" for stage in stages):
        hint = "use `resume` or `refuse`, and another output.dir for a new run"
        what = "`new` is for a run without stages"
        raise ConfigError(what, where="output.on_existing", hint=hint)


def _has_run(folder: Path) -> bool:
    try:
        return (folder / "run.json").exists() or (folder / "checkpoints").exists()
    except OSError:  # the run says so when it claims the folder
        return False


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


def settings_difference(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs, and how."""
    return {
        key: f"{before.get(key)!r} → {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def refuse_differences(
    state: dict[str, Any], config: Config, facts: dict[str, str], allowed: Seq[str] = ()
) -> None:
    """Compare a checkpoint's state with the run file and the data of now.

    Args:
        facts: fingerprints, by the name of what they are of.
        allowed: names of what may differ: of facts, settings, or sections of settings.

    Raises:
        ConfigError: with everything that differs, or a name that names nothing.
    """
    settings = training_settings(config)
    _refuse_unknown(allowed, [*settings, *facts])
    changes = settings_difference(state["settings"], settings)
    came_to = {
        "dtype": state["dtype"],
        "attention": state["backend"],
        "revision": state["revision"],
    }
    for key, was in state["wanted"].items():
        wanted = getattr(config.model, key)
        if wanted not in ("auto", was, came_to[key]):
            changes[f"model.{key}"] = f"{was!r} → {wanted!r}"
    changes |= {
        name: "is not what it was"
        for name, value in facts.items()
        if state["facts"].get(name) != value
    }
    told = {key: f"{key}: {change}" for key, change in changes.items()}
    refused = [line for key, line in told.items() if not _is_allowed(key, allowed)]
    if refused:
        what = "can't resume, since this has changed: " + "; ".join(refused)
        raise ConfigError(what, where=config.output.dir, hint=HINT)
    for line in told.values():
        log.warning("allowed to differ from the interrupted run: %s", line)


def _refuse_unknown(allowed: Seq[str], names: Seq[str]) -> None:
    sections = {name.partition(".")[0] for name in names}
    known = sorted({*names, *sections, "base"} - {"adapter"})
    for name in allowed:
        if name in known and not name.startswith("adapter"):
            continue
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "data, base, or a setting: section.key"
        if name.startswith("adapter"):
            hint = "an adapter has the shape that it began with"
        raise ConfigError(f"{name!r} can't be allowed to change", where="--allow-change", hint=hint)


def _is_allowed(name: str, allowed: Seq[str]) -> bool:
    return name in allowed or name.split(".", maxsplit=1)[0] in allowed


def refuse_other_base(state: dict[str, Any], fingerprint: str, allowed: Seq[str] = ()) -> None:
    """Compare the weights of the base.

    Raises:
        ConfigError: they are others, and `base` is not allowed to differ.
    """
    if state["base"] != fingerprint and "base" not in allowed:
        what = "can't resume: this is another base than the run began with"
        raise ConfigError(what, where="model.base", hint=HINT)


def rounding(processes: int) -> dict[str, Any]:
    """What decides in which order numbers are summed, and so a result's last bits."""
    return {
        "processes": processes,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def warn_of_other_rounding(state: dict[str, Any], processes: int) -> None:
    """Say so if the run goes on exactly, but not to the last bit."""
    changes = settings_difference(state["rounding"], rounding(processes))
    if changes:
        told = "; ".join(f"{key}: {change}" for key, change in changes.items())
        log.warning("the last bits of what follows may differ: %s", told)
