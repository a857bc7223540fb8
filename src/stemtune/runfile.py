"""Reads a run file, lays overrides over it, and says in which line something is wrong."""

import copy
import difflib
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stemtune.config import OBJECTIVES, Config, Data, Duration, Source, is_hub_id
from stemtune.errors import ConfigError
from stemtune.redact import holds_token

Key = tuple[str, ...]  # `section`, `field`
OBJECTIVE_TYPES = [str(kind.model_fields["type"].default) for kind in OBJECTIVES]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text, since the dot is missing; everybody means a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a run file.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings, the value written as in YAML.

    Raises:
        ConfigError: with the file and line, or the override, at fault.
    """
    stages = load_stages(path, overrides)
    if len(stages) > 1:
        hint = "read it by load_stages, and hand the list to train"
        raise ConfigError("this run file has several stages", where=str(path), hint=hint)
    return stages[0]


def load_stages(path: str | Path, overrides: list[str] | None = None) -> list[Config]:
    """Read a run file whose training may have several stages, such as SFT and then DPO.

    Each entry of `stages` is laid over the rest of the file, and goes on with the adapter of the
    stage before. The last one's output is `output.dir`, the others' lie in its folder `stages`.

    Args:
        path, overrides: as for `load_config`; an override is laid over every stage, or as
            `stages.NAME.section.key=value` over one.

    Returns:
        The stages in order; of a file without `stages` its only one.

    Raises:
        ConfigError: with the file and line, or the override, at fault.
    """
    path = Path(path)
    values, lines = _read_yaml(path)
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    whole, names = _split_stages(values, places)
    for override in overrides or []:
        target = override.split(".", 2)
        if target[0] == "stages" and len(target) == 3 and target[1] in names:
            number = names.index(target[1])
            _apply_override(*whole[number], target[2])
            continue
        for stage, stage_places in whole:
            _apply_override(stage, stage_places, override)
    configs: list[Config] = []
    for stage, stage_places in whole:
        config = _validated(stage, stage_places, path)
        try:
            configs.append(_resolve_paths(config, path.resolve().parent))
        except OSError as error:
            what, hint = f"can't be read: {error.strerror}", "may this user read the folder?"
            raise ConfigError(what, where=str(error.filename), hint=hint) from None
    return _chained(configs, names)


def _split_stages(
    values: dict[str, Any], places: dict[Key, str]
) -> tuple[list[tuple[dict[str, Any], dict[Key, str]]], list[str]]:
    """Each stage's values and where they stand, and the names of all; of a file without stages the
    whole of it."""
    if "stages" not in values:
        return [(values, places)], [""]
    where = places["stages",]
    stages = values.pop("stages")
    if not isinstance(stages, list) or not stages:
        hint = "stages: is a list; each entry has a name, and sections that differ"
        raise ConfigError("`stages` should be a list", where=where, hint=hint)
    whole: list[tuple[dict[str, Any], dict[Key, str]]] = []
    names: list[str] = []
    for number, stage in enumerate(cast(list[object], stages)):
        here = places.get(("stages", str(number)), where)
        if not isinstance(stage, dict) or not re.fullmatch(r"[\w-]+", str(stage.get("name", ""))):  # pyright: ignore
            hint = "give it a name of letters, digits, - and _"
            raise ConfigError("a stage needs a `name`", where=here, hint=hint)
        changes = dict(cast(dict[str, Any], stage))
        names.append(str(changes.pop("name")))
        prefix = ("stages", str(number))
        own = {key[2:]: place for key, place in places.items() if key[:2] == prefix and key[2:]}
        whole.append((_laid_over(values, changes), {**places, **own}))
    if len(set(names)) < len(names):
        raise ConfigError("two stages have the same name", where=where, hint="rename one")
    return whole, names


def _laid_over(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Section by section; an objective is replaced as a whole."""
    result = copy.deepcopy(values)
    for section, inner in changes.items():
        if isinstance(inner, dict) and isinstance(result.get(section), dict):
            kept = {} if section == "objective" else result[section]
            result[section] = {**kept, **inner}
        else:
            result[section] = inner
    return result


def _validated(values: dict[str, Any], places: dict[Key, str], path: Path) -> Config:
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        # An unknown key explains a missing one.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise _explain(errors[0], places, str(path)) from None
    _refuse_tokens(config.model_dump(), (), places, path)
    return config


def _refuse_tokens(value: Any, key: Key, places: dict[Key, str], path: Path) -> None:
    """A run file is copied into every run's folder: no place for a secret."""
    if isinstance(value, dict):
        for name, inner in cast(dict[object, object], value).items():
            _refuse_tokens(inner, (*key, str(name)), places, path)
    elif isinstance(value, list):
        for inner in cast(list[object], value):
            _refuse_tokens(inner, key, places, path)
    elif isinstance(value, str) and holds_token(value):
        hint = "take it out, and use `hf auth login` or the variable HF_TOKEN"
        what = f"`{'.'.join(key)}` holds a token of the Hub"
        raise ConfigError(what, where=places.get(key[:2], str(path)), hint=hint)


def _chained(configs: list[Config], names: list[str]) -> list[Config]:
    """Each stage in a folder of its own, going on with the adapter of the one before."""
    result: list[Config] = []
    for config, name in zip(configs, names, strict=True):
        adapter, output = config.adapter, config.output
        if result:
            start = str(Path(result[-1].output.dir).absolute())
            adapter = adapter.model_copy(update={"init_from": start})
        if config is not configs[-1]:
            own = {"dir": str(Path(output.dir) / "stages" / name), "push_to_hub": None}
            output = output.model_copy(update=own)
        result.append(config.model_copy(update={"adapter": adapter, "output": output}))
    return result


def dump_config(config: Config) -> str:
    """The resolved run file, every field written out."""
    values = config.model_dump()
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _resolve_paths(config: Config, folder: Path) -> Config:
    """Paths are relative to the run file; what is no path here may be the name of something on the
    Hub."""
    data = config.data
    changes: dict[str, Any] = {
        "path": _absolute(data.path, folder),
        "eval_path": _absolute(data.eval_path, folder),
    }
    if data.memories is not None and data.memories.path is not None:
        path = str(folder / data.memories.path)
        changes["memories"] = data.memories.model_copy(update={"path": path})
    if data.card is not None:
        changes |= {"system": _read_card(data, folder), "card": None}
    if data.template.endswith(".jinja"):
        changes["template"] = _read_text(folder / data.template, "template")
    adapter = config.adapter
    if adapter.init_from is not None:
        start = str((folder / Path(adapter.init_from).expanduser()).resolve())
        adapter = adapter.model_copy(update={"init_from": start})
    # The folder of the base is one only if it looks like one; else it is a Hub id. A file is GGUF.
    base = config.model.base
    if (folder / base).is_dir() or base.startswith((".", "/", "~")) or base.endswith(".gguf"):
        base = str((folder / Path(base).expanduser()).resolve())
    return config.model_copy(
        update={
            "adapter": adapter,
            "data": data.model_copy(update=changes),
            "model": config.model.model_copy(update={"base": base}),
        }
    )


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(item, folder) for item in cast(list[object], value)]
    if isinstance(value, Source):
        return value.model_copy(update={"path": _absolute(value.path, folder)})
    if value is None or (is_hub_id(value) and not (folder / value).exists()):
        return value
    path = Path(value).expanduser()
    if any(c in value for c in "*?[") and not (folder / path).exists() and not path.is_absolute():
        return str(Path(glob.escape(str(folder))) / path)  # the folder's own name is no pattern
    return str(folder / path)


def _read_card(data: Data, folder: Path) -> str:
    if data.system is not None:
        hint = "keep one of them"
        what = "`data.system` and `data.card` both give the system prompt"
        raise ConfigError(what, where="data.card", hint=hint)
    return _read_text(folder / str(data.card), "card").strip()


def _read_text(path: Path, key: str) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        hint = f"data.{key} is a UTF-8 text file, relative to the run file"
        raise ConfigError(f"can't read the {key}: {error}", where=str(path), hint=hint) from None
    if not text.strip():
        hints = {"card": "write who the character is", "template": "write a chat template"}
        raise ConfigError(f"the {key} is empty", where=str(path), hint=hints[key])
    return text


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except RecursionError:
        hint = "a run file has sections, and settings in them"
        raise ConfigError("nested too deeply", where=str(path), hint=hint) from None
    except FileNotFoundError:
        hint = "`stemtune init` writes a commented one"
        raise ConfigError("there is no such run file", where=str(path), hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        hint = "a run file is a UTF-8 text file"
        raise ConfigError(f"can't read the run file: {error}", where=str(path), hint=hint) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not readable"
        hint = "look at the indentation, the colons and the quotes near this line"
        raise ConfigError(f"not valid YAML: {problem}", where=where, hint=hint) from None
    if node is None:
        node = yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        hint = "a run file has sections: model, adapter, data, objective, train, output, tracking"
        raise ConfigError("the run file is not a mapping", where=f"{path}:1", hint=hint)
    lines: dict[Key, int] = {}
    for key, line, repeated in _walk(node, (), set()):
        if repeated:
            hint = "keep one of them"
            what = f"`{'.'.join(key)}` stands twice"
            raise ConfigError(what, where=f"{path}:{line}", hint=hint)
        lines[key] = line
    try:
        values = _Loader("").construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1 if mark else _unreadable(node) or 1}"
        hint = "quote it, if it is text; tags such as `!!python/…` are refused"
        raise ConfigError("not a plain YAML value", where=where, hint=hint) from None
    return cast(dict[str, Any], values), lines


def _unreadable(node: yaml.Node) -> int | None:
    """The line of the first value that can't be made of its text."""
    if isinstance(node, yaml.ScalarNode):
        try:
            _Loader("").construct_object(node)
        except (yaml.YAMLError, ValueError, TypeError):
            return node.start_mark.line + 1
        return None
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(n,) for n in node.value]
    inner = (child for pair in pairs for child in pair)
    return next((line for child in inner if (line := _unreadable(child))), None)


def _walk(node: yaml.Node, prefix: Key, above: set[int]) -> Iterator[tuple[Key, int, bool]]:
    """Every key with its line, and whether it stands twice; an alias may lead back up."""
    if not isinstance(node, yaml.MappingNode) or id(node) in above:
        return
    seen: set[str] = set()
    for key_node, value_node in node.value:
        name = str(key_node.value)
        key = (*prefix, name)
        yield key, key_node.start_mark.line + 1, name in seen
        seen.add(name)
        yield from _walk(value_node, key, above | {id(node)})
        if key == ("stages",) and isinstance(value_node, yaml.SequenceNode):
            for number, item in enumerate(value_node.value):
                yield (*key, str(number)), item.start_mark.line + 1, False
                yield from _walk(item, (*key, str(number)), above | {id(node)})


def _apply_override(values: dict[str, Any], places: dict[Key, str], override: str) -> None:
    where = f"the override {override!r}"
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        hint = "write section.key=value, for example train.learning_rate=2e-4"
        raise ConfigError("not an override", where=where, hint=hint)
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError):
        hint = "quote the value as you would in YAML"
        raise ConfigError("the value can't be read", where=where, hint=hint) from None
    section = values
    for part in key[:-1]:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    section[key[-1]] = value
    for length in range(1, len(key) + 1):
        places[key[:length]] = where


def _explain(error: ErrorDetails, places: dict[Key, str], path: str) -> ConfigError:
    tag = next((str(part) for part in error["loc"] if part in OBJECTIVE_TYPES), "")
    key = tuple(str(part) for part in error["loc"] if str(part) != tag)
    if key[:1] == ("objective",):
        key = tuple(part for part in key if not part.isdigit())
    # The location of a union's member, or of a list's item, goes deeper than the file does.
    known = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in places), ())
    where = places.get(known, path)
    name = ".".join(known or key)
    if error["type"] == "extra_forbidden":
        unknown = key if len(known) >= len(key) - 1 else (*known, key[-1])
        hint = f"{tag} has {', '.join(_own_fields(tag))}" if tag else _nearest(unknown)
        return ConfigError(f"unknown key `{'.'.join(unknown)}`", where=where, hint=hint)
    if error["type"] == "missing":
        name = ".".join(key)
        hint = f"add it under `{key[0]}:`" if len(key) > 1 else "add this section"
        return ConfigError(f"`{name}` is missing", where=where, hint=hint)
    if error["type"].startswith("union_tag"):
        found = error["input"].get("type")
        near = difflib.get_close_matches(str(found), OBJECTIVE_TYPES, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(OBJECTIVE_TYPES)}"
        what = f"`objective.type` can't be {found!r}" if found else "`objective.type` is missing"
        return ConfigError(what, where=places.get((*known, "type"), where), hint=hint)
    found = cast(object, error["input"])
    hint = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and (not key or key[-1:] == ("objective",)):
        # Of several fields together: at the one that is named, or else at the objective.
        named = [tuple(name.split(".")) for name in re.findall(r"\w+(?:\.\w+)+", hint)]
        places_of = [places[key] for key in [*named, ("objective",)] if key in places]
        more = "docs/run-file.md says what goes together"
        return ConfigError(hint, where=places_of[0] if places_of else where, hint=more)
    expected = _expected(known)
    what = f"`{name}` can't be {found!r}" + (f": expected {expected}" if expected else "")
    return ConfigError(what, where=where, hint=hint)


def _own_fields(tag: str) -> list[str]:
    """What an objective of this type has."""
    return next([*k.model_fields] for k in OBJECTIVES if k.model_fields["type"].default == tag)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, be it directly, or null, or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = [section for part in get_args(annotation) for section in sections_in(part)]
    return list(dict.fromkeys(found))


def _section(key: Key) -> type[BaseModel] | None:
    """The section that a key names."""
    section: type[BaseModel] = Config
    for part in key:
        field = section.model_fields.get(part)
        inner = sections_in(field.annotation) if field else []
        if not inner:
            return None
        section = inner[0]
    return section


def _expected(key: Key) -> str:
    section = _section(key[:-1]) if key else None
    field = section.model_fields.get(key[-1]) if section else None
    return type_name(field.annotation) if field else ""


_TYPE_NAMES: list[tuple[Any, str]] = [
    (int, "a whole number"),
    (float, "a number"),
    (str, "text"),
    (bool, "true or false"),
    (type(None), "null"),
    (Duration, "seconds or h:mm:ss"),
]


def type_name(annotation: Any) -> str:
    """A field's type in words."""
    name = next((name for known, name in _TYPE_NAMES if annotation == known), None)
    if name is not None:
        return name
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section with keys"
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return type_name(parts[0])
    if get_origin(annotation) in (list, dict):
        lists = "a list of texts" if parts == (str,) else "a list of these"
        return lists if get_origin(annotation) is list else "keys with texts"
    if all(isinstance(part, str) for part in parts):
        return " or ".join(parts)
    return " or ".join(type_name(part) for part in parts)


# What other tools, and people, call them.
_ALIASES = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "model_name_or_path": "model.base",
    "base_model": "model.base",
    "output_dir": "output.dir",
    "hub_model_id": "output.push_to_hub",
    "hub_token": "`hf auth login` or HF_TOKEN: a token has no place in a run file",
    "dataset": "data.path",
    "val_size": "data.eval_fraction",
    "report_to": "tracking.trackers",
    "gradient_checkpointing": "train.activation_checkpointing",
    "gradient_accumulation_steps": "train.micro_batch_tokens: batch_size is exact without it",
    "per_device_train_batch_size": "train.batch_size: exact, whatever fits in memory",
}


def _nearest(key: Key) -> str:
    section, name = key[:-1], key[-1]
    if name in _ALIASES:
        return f"stemtune calls it {_ALIASES[name]}"
    sections = difflib.get_close_matches(name, list(Config.model_fields), 1)
    if not section and sections:
        return f"did you mean `{sections[0]}:`?"
    fields = list(_fields(Config, ()))
    near = difflib.get_close_matches(name, [f[-1] for f in fields if f[:-1] == section], 1)
    if near:
        return f"did you mean `{'.'.join((*section, near[0]))}`?"
    near = difflib.get_close_matches(name, [f[-1] for f in fields], 1, 0.75)
    if near:
        places = " or ".join(f"`{'.'.join(f)}`" for f in fields if f[-1] == near[0])
        return f"did you mean {places}?"
    return "docs/run-file.md lists the keys; the sections are " + ", ".join(Config.model_fields)


def _fields(section: type[BaseModel], prefix: Key) -> Iterator[Key]:
    """Every field of every section, as a key."""
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        if prefix or not inner:
            yield (*prefix, name)
        for part in inner:
            yield from _fields(part, (*prefix, name))
