"""What a run will take of the device's memory, from the base's config alone."""

from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, fields

import torch

from stemtune.config import Config, Model
from stemtune.model.adapter import trainable
from stemtune.model.blueprint import (
    adapted_blocks,
    blueprint,
    frozen,
    packed_bytes,
    quantizable,
    shortened,
    size_of,
)
from stemtune.model.live import LiveBytes, without_numbers
from stemtune.model.load import choose_dtype
from stemtune.score import autocast
from stemtune.tree.attention import choose_backend
from stemtune.tree.build import Tree
from stemtune.tree.logprobs import target_logprobs

# What no tensor of ours accounts for. Of a CPU both are measured: benchmarks/estimate.py.
RUNTIME = {"cpu": 60e6, "cuda": 600e6, "mps": 60e6}  # bytes of libraries, their buffers and code
HOLES = {"cpu": 0.04, "cuda": 0.08, "mps": 0.08}  # of what is allocated and freed in each step
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
    """Estimates runs on a device. What simulations of runs have in common is done once.

    Args:
        device: it need not be there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._simulations: dict[str, Simulation] = {}

    def of(self, config: Config, tree: Tree) -> Estimate:
        """Of a run, with this tree as its largest micro-batch.

        Raises:
            NoEstimateError: see there.
            ModelError, ConfigError: see `blueprint`.
        """
        simulation = self.simulation(config)
        found = simulation.activations(tree, self.backend(config))
        offload = config.train.activation_offload and self.device.type != "cpu"
        kept = 0.0 if offload else found.kept
        passing = found.passing + (simulation.dense if config.model.quantization else 0)
        starts = config.adapter.init_from is not None or config.adapter.init_weights == "pissa"
        start = simulation.adapter if starts and config.has_reference else 0  # the reference
        return Estimate(
            base=simulation.base(config.model) + start,
            adapter=simulation.adapter,
            gradients=simulation.adapter,
            optimizer=state_bytes(simulation.sizes, config.train.optimizer, self.device),
            activations=int(kept),
            temporaries=int(passing),
            runtime=int(RUNTIME[self.device.type]),
            holes=int(HOLES[self.device.type] * (kept + passing)),
            tokens=tree.num_distinct,
        )

    def dtype(self, config: Config) -> torch.dtype:
        """What `model.dtype` comes to."""
        unseen = self.device.type == "cuda" and not torch.cuda.is_available()
        if config.model.dtype == "auto" and unseen:
            return torch.bfloat16
        return choose_dtype(config.model.dtype, self.device)

    def backend(self, config: Config) -> str:
        """What `model.attention` comes to."""
        return choose_backend(config.model.attention, self.device, self.dtype(config))

    def simulation(self, config: Config) -> "Simulation":
        """Of a run; that of another one, if it differs in nothing that matters here."""
        dtype = self.dtype(config)
        checkpointing = config.train.activation_checkpointing
        key = f"{config.model.base} {config.adapter!r} {dtype} {checkpointing}"
        if key not in self._simulations:
            self._simulations[key] = Simulation(config, dtype)
        return self._simulations[key]


class Simulation:
    """A model without weights, and what its steps take.

    Attributes:
        adapter: bytes of the weights that are trained.
        sizes: how many values each of them has.
        dense: bytes of the largest weight that can be quantized: it is dense in its product.
        blocks: how many there are.
    """

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        self.model = blueprint(config, dtype)
        trained = trainable(self.model).values()
        self.adapter, self.sizes = size_of(trained), [p.numel() for p in trained]
        linear = quantizable(self.model)
        self._shapes = [weight.shape for weight in linear]
        self._linear, self._frozen = size_of(linear), size_of(frozen(self.model))
        self.dense = max((size_of([weight]) for weight in linear), default=0)
        self.trained_blocks, self.other_blocks = adapted_blocks(self.model)
        self._mode = without_numbers(self.model)
        self._found: dict[tuple[Tree, str], Activations] = {}

    @property
    def blocks(self) -> int:
        """Of the decoder."""
        return self.trained_blocks + self.other_blocks

    def base(self, config: Model) -> int:
        """Bytes of all that is frozen."""
        if config.quantization is None:
            return self._frozen
        packed = sum(packed_bytes(shape, config) for shape in self._shapes)
        return self._frozen - self._linear + packed

    def activations(self, tree: Tree, backend: str) -> Activations:
        """Those of a micro-batch. A few blocks are simulated: each more keeps what one more keeps.

        Raises:
            NoEstimateError: see there.
        """
        if (tree, backend) not in self._found:
            self._found[tree, backend] = self._extended(tree, backend)
        return self._found[tree, backend]

    def _extended(self, tree: Tree, backend: str) -> Activations:
        trained, others = min(self.trained_blocks, 2), min(self.other_blocks, 1)
        found = self._run(tree, backend, trained, others)
        kept = found.kept
        if self.trained_blocks > trained:
            less = self._run(tree, backend, trained - 1, others).kept
            kept += (self.trained_blocks - trained) * (found.kept - less)
        if self.other_blocks > others:  # they keep nothing, unless what is below them is trained
            more = self._run(tree, backend, trained, others + 1).kept
            kept += (self.other_blocks - others) * (more - found.kept)
        return Activations(kept, found.passing)

    def _run(self, tree: Tree, backend: str, trained: int, others: int) -> Activations:
        """Forward and backward pass through so many blocks of each kind."""
        model = self.model
        with self._mode, shortened(model, trained, others):
            counted = LiveBytes([*model.parameters(), *model.buffers()])
            try:
                with counted:
                    with autocast(model):
                        logps = target_logprobs(model, tree, backend)
                    kept = counted.now
                    logps.sum().backward()
            except RuntimeError as error:
                raise NoEstimateError(str(error).splitlines()[0]) from error
            finally:
                model.zero_grad()
        return Activations(kept, counted.peak - kept)


def state_bytes(sizes: Seq[int], optimizer: str, device: torch.device) -> int:
    """Bytes of AdamW's two averages of tensors with so many values. Paged ones leave a GPU that has
    no room for them."""
    if optimizer.startswith("paged") and device.type == "cuda":
        return 0
    if not optimizer.endswith("8bit"):
        return 8 * sum(sizes)
    return sum(8 * n if n < SMALL else 2 * n + 8 * -(-n // STATE_BLOCK) for n in sizes)
