"""What a run will take of the device's memory, from the base's config alone."""

import hashlib
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

import torch

from stemtune.config import Config, Model
from stemtune.interrupt import held
from stemtune.kernels.kind import standing_for
from stemtune.kernels.segments import forget_masks
from stemtune.model.activations import OffloadedActivations
from stemtune.model.adapter import trainable
from stemtune.model.blueprint import (
    blocks_of,
    blueprint,
    frozen,
    offloadable_by_block,
    packed_bytes,
    quantizable,
    shortened,
    size_of,
)
from stemtune.model.live import LiveBytes, without_numbers
from stemtune.model.load import base_source, choose_dtype
from stemtune.score import autocast
from stemtune.tree.attention import choose_backend
from stemtune.tree.build import Tree
from stemtune.tree.logprobs import base_model, target_logprobs
from stemtune.tree.support import why_no_tree

# What no tensor of ours accounts for, as measured by benchmarks/estimate.py on CPUs and an H100:
# there CUDA's context of 718 MB and two workspaces of cuBLAS, and what a caching allocator holds if
# the largest micro-batch came first.
RUNTIME = {"cpu": 130e6, "cuda": 786e6, "mps": 130e6}  # bytes of libraries, their buffers and code
# glibc can't use a freed aligned block for one of the same size again: holes are left between what
# is kept, and under activation checkpointing by the temporaries of each block.
HOLES = {"cpu": 0.25, "cuda": 0.08, "mps": 0.08}  # of the activations
HOLES_OF_BLOCKS = {"cpu": 0.11, "cuda": 0.0, "mps": 0.0}  # of a checkpointed block's temporaries
HOLES_IN_FLOAT32 = 2.0  # times the holes of blocks
# Weights in few bits are dense for the moment of a product, each between activations that are kept.
HOLES_OF_DENSE = {"cpu": 1.0, "cuda": 0.0, "mps": 0.0}  # of all such weights
SMALL = 4096  # values: bitsandbytes keeps the state of smaller tensors in 32 bits
STATE_BLOCK = 256  # values of its 8-bit state that share a scale


@dataclass(frozen=True)
class Estimate:
    """The largest amount of memory that training takes at once, by part, in bytes.

    Attributes:
        base: frozen weights. adapter: trained ones. gradients, optimizer: of these.
        activations: what the forward pass keeps for the backward pass.
        temporaries: what comes on top for a moment: the head's block, the backward pass of a block.
        runtime: of the libraries.
        holes: freed memory that is too scattered to be used again.
        tokens: of the micro-batch.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    runtime: int
    holes: int
    tokens: int

    @property
    def parts(self) -> dict[str, int]:
        """By name, bytes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokens"}

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, int]:
        """All by name, in bytes."""
        return {**asdict(self), "total": self.total}


class NoEstimateError(Exception):
    """What a base computes depends on numbers, such as which experts a token goes to."""


@dataclass(frozen=True)
class Activations:
    """Bytes of a step's activations.

    Attributes:
        kept: for the backward pass.
        passing: on top of that, for a moment.
    """

    kept: float
    passing: float


class Estimator:
    """Estimates runs on a device, whose dtype is known: see `with_dtype`. What they have in common
    is simulated once in a process, however many runs it makes.

    Args:
        device: it need not be there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def of(self, config: Config, tree: Tree) -> Estimate:
        """Of a run, with this tree as its largest micro-batch.

        Raises:
            NoEstimateError: see there.
            ModelError, ConfigError: see `blueprint`.
        """
        simulation = self.simulation(config)
        offload = config.train.activation_offload and self.device.type != "cpu"
        found = simulation.activations(tree, self.backend(config), offload=offload)
        away = config.model.offload_layers if self.device.type == "cuda" else None
        brought = config.model.quantization or away
        passing = found.passing + (simulation.dense if brought else 0)
        holes = HOLES[self.device.type] * (found.kept + passing)
        if config.train.activation_checkpointing:
            times = HOLES_IN_FLOAT32 if dtype_of(config) == torch.float32 else 1.0
            holes += times * HOLES_OF_BLOCKS[self.device.type] * simulation.blocks * found.passing
        elif config.model.quantization:
            holes += HOLES_OF_DENSE[self.device.type] * simulation.all_dense
        goes_on = config.adapter.init_from is not None and config.has_reference
        has_start = goes_on or config.adapter.init_weights == "pissa"
        start = simulation.adapter if has_start else 0  # a frozen copy
        return Estimate(
            base=simulation.base(config.model) - simulation.offloaded(away or 0) + start,
            adapter=simulation.adapter,
            gradients=simulation.adapter,
            optimizer=state_bytes(simulation.sizes, config.train.optimizer, self.device),
            activations=int(found.kept),
            temporaries=int(passing),
            runtime=int(RUNTIME[self.device.type]),
            holes=int(holes),
            tokens=tree.num_distinct,
        )

    def backend(self, config: Config) -> str:
        """What `model.attention` comes to, also where the run finds out later: see `self_check`."""
        base = base_model(self.simulation(config).model)
        if why_no_tree(base):
            return "padded"
        return choose_backend(config.model.attention, self.device, dtype_of(config), base.config)

    def simulation(self, config: Config) -> "Simulation":
        """Of a run; that of another one, if it differs in nothing that matters here."""
        dtype = dtype_of(config)
        checkpointing = config.train.activation_checkpointing
        source = base_source(config.model, weights=False)
        shape = (source / "config.json").read_bytes()
        key = f"{source} {shape!r} {config.adapter!r} {dtype} {checkpointing} {self.device.type}"
        if key not in SIMULATIONS:
            if len(SIMULATIONS) == MOST_SIMULATIONS:
                SIMULATIONS.clear()
            SIMULATIONS[key] = Simulation(config, dtype, self.device.type)
        return SIMULATIONS[key]


def with_dtype(config: Config, device: torch.device) -> Config:
    """The run file with what `model.dtype` comes to on a device, which need not be there."""
    if config.model.dtype != "auto":
        return config
    unseen = device.type == "cuda" and not torch.cuda.is_available()
    dtype = torch.bfloat16 if unseen else choose_dtype("auto", device)
    named = {"dtype": str(dtype).removeprefix("torch.")}
    return config.model_copy(update={"model": config.model.model_copy(update=named)})


def dtype_of(config: Config) -> torch.dtype:
    """Of a run file with a dtype of its own."""
    return getattr(torch, config.model.dtype)


class Simulation:
    """A model without weights, and what its steps take on a device of some kind.

    Attributes:
        kind: of the device.
        adapter: bytes of the weights that are trained.
        sizes: how many values each of them has.
        dense: bytes of the largest weight that can be quantized: it is dense in its product.
        all_dense: bytes of all of them.
        blocks: how many there are.
    """

    def __init__(self, config: Config, dtype: torch.dtype, kind: str) -> None:
        self.kind, self.model = kind, blueprint(config, dtype)
        trained = trainable(self.model).values()
        self.adapter, self.sizes = size_of(trained), [p.numel() for p in trained]
        linear = quantizable(self.model)
        self._shapes = [weight.shape for weight in linear]
        self.all_dense, self._frozen = size_of(linear), size_of(frozen(self.model))
        self.dense = max((size_of([weight]) for weight in linear), default=0)
        self._of_blocks = offloadable_by_block(self.model)
        self.blocks = len(blocks_of(self.model))
        self._mode = without_numbers(self.model)
        self._found: dict[str, Activations] = {}

    def base(self, config: Model) -> int:
        """Bytes of all that is frozen."""
        if config.quantization is None:
            return self._frozen
        packed = sum(packed_bytes(shape, config) for shape in self._shapes)
        return self._frozen - self.all_dense + packed

    def offloaded(self, count: int) -> int:
        """Bytes of the weights that wait in main memory, of so many blocks."""
        return sum(self._of_blocks[:count])

    def activations(self, tree: Tree, backend: str, *, offload: bool) -> Activations:
        """Those of a micro-batch.

        Args:
            offload: what is saved for the backward pass waits elsewhere.

        Raises:
            NoEstimateError: see there.
        """
        if backend == "flex":  # it has no backward pass where this runs, and keeps what these do
            capped = getattr(base_model(self.model).config, "attn_logit_softcapping", None)
            backend = "segments" if capped else "varlen"
        key = f"{_content(tree)} {backend} {offload}"
        if key not in self._found:
            self._found[key] = self._simulate(tree, backend, offload)
        return self._found[key]

    def _simulate(self, tree: Tree, backend: str, offload: bool) -> Activations:
        """Forward and backward pass through two blocks of each kind: each more of a kind keeps what
        its second one keeps."""
        model, marks = self.model, list[int]()
        away = OffloadedActivations(model, torch.device("meta")) if offload else nullcontext()
        forget_masks()  # those of a real run, which would not be counted
        with held(), standing_for(self.kind), self._mode, shortened(model) as blocks:
            counted = LiveBytes([*model.parameters(), *model.buffers()])

            def mark(*_: object) -> None:
                counted.mark()

            hooks = [block.register_forward_hook(mark) for block, _ in blocks]
            try:
                with counted:
                    with autocast(model), away:  # a new tree: this one is to keep no fake tensors
                        logps = target_logprobs(model, replace(tree), backend)
                    kept, marks = counted.now, counted.marks[-len(blocks) :]
                    logps.sum().backward()
            except Exception as error:  # whatever a model does with numbers that are not there
                raise NoEstimateError((str(error) or repr(error)).splitlines()[0]) from error
            finally:
                forget_masks()
                model.zero_grad()
                for hook in hooks:
                    hook.remove()
        passing = counted.peak - kept
        for number, (_, stands_for) in enumerate(blocks):
            if stands_for > 1:
                kept += (stands_for - 1) * (marks[number] - marks[number - 1])
        return Activations(kept, passing)


SIMULATIONS: dict[str, Simulation] = {}
MOST_SIMULATIONS = 32


def _content(tree: Tree) -> str:
    """Equal for equal trees."""
    arrays = [tree.input_ids, *tree.paths, tree.target_source, tree.target_id, tree.target_sequence]
    return hashlib.sha256(b"|".join(array.tobytes() for array in arrays)).hexdigest()


def state_bytes(sizes: Seq[int], optimizer: str, device: torch.device) -> int:
    """Bytes of AdamW's two averages of tensors with so many values. Paged ones leave a GPU that has
    no room for them."""
    if optimizer.startswith("paged") and device.type == "cuda":
        return 0
    if not optimizer.endswith("8bit"):
        return 8 * sum(sizes)
    return sum(8 * n if n < SMALL else 2 * n + 8 * -(-n // STATE_BLOCK) for n in sizes)
