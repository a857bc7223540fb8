"""The model card: what a run knows, as Markdown for whoever finds the adapter.

It names nothing of this machine: files by their own names, bases and data by those of the Hub.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stemtune.config import Adapter, AnyObjective, Config
from stemtune.export.curves import curves
from stemtune.export.usage import USE, adapter_usage, fenced, merged_usage
from stemtune.model.names import is_hub_name, shared_name
from stemtune.redact import redacted

Metrics = dict[str, Any]

MOST_FILES = 20  # of the data, in the card; all of them are in the run's run.json
TARGETS = {
    "auto": "the linear layers of attention and MLP in every block",
    "all-linear": "all linear layers but the head",
}
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Known:
    """What a card is written from.

    Attributes:
        config: resolved.
        info: `run.json`.
        lines: of `metrics.jsonl`.
        step: whose weights the adapter has.
    """

    config: Config
    info: dict[str, Any]
    lines: list[Metrics]
    step: int

    @property
    def name(self) -> str:
        """What the adapter is called."""
        output = self.config.output
        return Path(output.push_to_hub or output.dir).name

    @property
    def base(self) -> str:
        """What the base is called."""
        return shared_name(self.config.model.base)

    @property
    def base_is_on_hub(self) -> bool:
        """Whether others find the base by that name."""
        return is_hub_name(self.base)

    @property
    def base_is_converted(self) -> bool:
        """Whether what others find is in another layout than what was trained."""
        return bool(self.info.get("base", {}).get("converted"))


def adapter_card(known: Known) -> str:
    """The card of an adapter's folder."""
    config = known.config
    sections = [
        _intro(known),
        _character(config),
        _training(known),
        _data(known),
        _evaluation(known),
        _sharing(known),
        _licence(config),
        adapter_usage(config, known.name, known.base, converted=known.base_is_converted),
    ]
    return _whole(_metadata(known), "\n\n".join(section for section in sections if section))


def merged_card(card: str, prompt: dict[str, Any]) -> str:
    """The card of a model with the adapter merged in: the adapter's own, but for how it is used.

    Args:
        card: the adapter's.
        prompt: what its `stemtune.json` says.
    """
    found = FRONT_MATTER.match(card)
    data: dict[str, Any] = yaml.safe_load(found[1]) if found else {}
    text = (card[found.end() :] if found else card).partition(USE)[0].strip()
    data |= {"library_name": "transformers"}
    if "base_model" in data:
        data["base_model_relation"] = "finetune"
    heading, _, rest = (text or "# A merged model").partition("\n")
    note = "Here the adapter is merged into its base: these weights need neither PEFT nor the base."
    parts = (heading, note, rest.strip(), merged_usage(prompt))
    return _whole(data, "\n\n".join(part for part in parts if part))


def _whole(data: dict[str, Any], text: str) -> str:
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return redacted(f"---\n{front}---\n\n{text}\n")


def _metadata(known: Known) -> dict[str, Any]:
    """What the Hub files it under: it refuses names that it does not know."""
    config = known.config
    data: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if known.base_is_on_hub:
        data |= {"base_model": known.base, "base_model_relation": "adapter"}
    if config.output.license:
        data["license"] = config.output.license
    ids = [source["dataset"] for source in _sources(known) if "dataset" in source]
    if ids:
        data["datasets"] = list(dict.fromkeys(ids))
    kinds = [objective.type for objective in config.objective]
    return {**data, "tags": ["lora", *dict.fromkeys(kinds), "stemtune"]}


# -- what it is -------------------------------------------------------------------------------


def _intro(known: Known) -> str:
    base, revision = known.base, known.config.model.revision
    link = f"[{base}](https://huggingface.co/{base})" if known.base_is_on_hub else f"`{base}`"
    at = f" at revision `{revision}`" if revision else ""
    text = f"# {known.name}\n\nA LoRA adapter for {link}{at}, trained by stemtune."
    weights = known.info.get("base", {}).get("weights")
    if known.base_is_on_hub or not weights:
        return text
    # Others may know the same weights by another name.
    return f"{text} A sample of the base's weights has the SHA-256 `{weights}`."


def _character(config: Config) -> str:
    """The persona, and what it remembers."""
    data, parts = config.data, list[str]()
    if data.system:
        parts.append(
            "It was trained with this system prompt (`system` in `stemtune.json`) before every "
            "conversation that has none of its own, and expects it:\n\n"
            f"{fenced(data.system, 'text')}"
        )
    if data.memories is not None:
        book = data.memories
        last = book.position == "after_history"
        where = "before the question" if last else "behind the system prompt"
        by = "BM25" if book.by == "bm25" else f"`{Path(book.by).name}`"
        parts.append(
            f"`memories.jsonl` holds memories, one a line. In training, up to {book.count} that "
            f"are most like the question (by {by}) stood {where}, as `stemtune chat` puts them:\n\n"
            f"{fenced(book.template, 'text')}"
        )
    return "\n\n".join(["## The character", *parts]) if parts else ""


def _training(known: Known) -> str:
    config, versions = known.config, known.info.get("versions", {})
    train, data = config.train, config.data
    steps = str(known.info.get("steps", ""))
    steps += f" ({train.num_train_epochs:g} epochs)" if train.max_steps is None else ""
    rate, warm = f"{train.learning_rate:g}, {train.lr_scheduler_type}", f"{train.warmup_ratio:.0%}"
    limit = f"gradients up to {train.max_grad_norm:g}" if train.max_grad_norm else ""
    decay = f"weight decay {train.weight_decay:g}" if train.weight_decay else ""
    rows = {
        "objective": "; ".join(_objective(one) for one in config.objective),
        **_lora(config.adapter),
        "batch size": f"{train.batch_size:,}",
        "steps": steps.strip(),
        "this adapter": f"the weights of step {known.step}",
        "learning rate": f"{rate}, {warm} warm-up",
        "optimizer": ", ".join(part for part in (train.optimizer, decay, limit) if part),
        "longest sequence": f"{data.max_length} tokens",
        "template": "its own" if "{" in data.template else data.template,
        "base held in": config.model.quantization or config.model.dtype,
        "seed": str(train.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return "## Training\n\n" + _table(["", ""], [[k, v] for k, v in rows.items() if v])


def _lora(adapter: Adapter) -> dict[str, str]:
    names = adapter.target_modules
    targets = TARGETS.get(names, f"`{names}`") if isinstance(names, str) else _listed(names)
    upper = f", in the upper {adapter.layers} blocks" if adapter.layers else ""
    shape = f"r {adapter.r}, alpha {adapter.alpha}, dropout {adapter.dropout:g}"
    shape += ", rank-stabilised" if adapter.use_rslora else ""
    shape += ", weight-decomposed (DoRA)" if adapter.use_dora else ""
    shape += f", {adapter.init_weights} start" if adapter.init_weights != "default" else ""
    return {
        "LoRA": shape,
        "adapted": targets + upper,
        "trained whole": _listed(adapter.modules_to_save),
        "started from": f"the adapter `{Path(adapter.init_from).name}`"
        if adapter.init_from
        else "",
    }


def _objective(objective: AnyObjective) -> str:
    """Its type, and what was set of it."""
    values = objective.model_dump(exclude={"type"}, exclude_defaults=True)
    if (beta := getattr(objective, "beta", None)) is not None:
        values = {"beta": beta, **values}
    set_ = ", ".join(f"{name} {value}" for name, value in values.items())
    return f"{objective.type} ({set_})" if set_ else objective.type


# -- data, and what came of it ----------------------------------------------------------------


def _sources(known: Known) -> list[dict[str, Any]]:
    return known.info.get("data", [])


def _data(known: Known) -> str:
    sources, ledger = _sources(known), known.info.get("ledger", {})
    parts: list[str] = []
    if sources:
        head = ["source", "rows", "SHA-256"]
        parts.append(_table(head, [_source(source) for source in sources[:MOST_FILES]]))
    if len(sources) > MOST_FILES:
        parts.append(f"And {len(sources) - MOST_FILES:,} more files.")
    if ledger:
        refused = f"; {ledger['num_refused']:,} rows were left out" if ledger["num_refused"] else ""
        kinds = ", ".join(sorted(ledger["formats"]))
        parts.append(
            f"{ledger['train_records']:,} records were trained on, {ledger['eval_records']:,} held "
            f"out ({kinds}){refused}."
        )
    return "\n\n".join(["## Data", *parts]) if parts else ""


def _source(source: dict[str, Any]) -> list[str]:
    """Its row of the table."""
    rows = f"{source['rows']:,}"
    if "file" in source:
        return [f"`{source['file']}`", rows, f"`{source['sha256']}`"]
    name = source["dataset"]
    more = ", ".join(source[key] for key in ("name", "split", "revision") if key in source)
    return [f"[{name}](https://huggingface.co/datasets/{name}) ({more})", rows, ""]


def _evaluation(known: Known) -> str:
    """Held-out figures at the start and at the adapter's step, and pictures."""
    parts: list[str] = []
    lines = [line for line in known.lines if "eval_loss" in line]
    if lines:
        before = lines[0]
        after = next((line for line in lines if line["step"] == known.step), lines[-1])
        names = [n for n in after if n.startswith("eval_") and "/" not in n and n != "eval_targets"]
        words = {name: name.removeprefix("eval_").replace("_", " ") for name in names}
        rows = [[words[n], _number(before.get(n)), _number(after[n])] for n in names]
        parts.append(_table(["held out", f"step {before['step']}", f"step {after['step']}"], rows))
    parts += [f"![{title}]({file})" for file, (title, _) in curves(known.lines).items()]
    return "\n\n".join(["## Evaluation", *parts]) if parts else ""


def _sharing(known: Known) -> str:
    steps = [line for line in known.lines if "distinct_tokens" in line]
    if not steps:
        return ""
    total, distinct, seconds = (
        sum(line[name] for line in steps) for name in ("tokens", "distinct_tokens", "seconds")
    )
    shared = (
        f"{total:,} tokens of training, of which {distinct:,} went through the model: "
        f"{total / distinct:.2f} times fewer, since what several answers of a step share was "
        "computed once."
    )
    told = (
        shared if distinct < total else f"{total:,} tokens of training; no two answers shared any."
    )
    took = f"{len(steps):,} steps took {_duration(seconds)} on {known.config.model.device}."
    return f"## What was computed\n\n{told} {took}"


def _licence(config: Config) -> str:
    adapter, data = config.output.license, config.data.license
    told = [f"the adapter: {adapter}" if adapter else "", f"the data: {data}" if data else ""]
    told = [part for part in told if part] or ["not given"]
    return f"## Licence\n\n{_capital('; '.join(told))}. The base has its own."


# -- Markdown ---------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} seconds"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
