"""Memory, traffic and time of a step on paper, by scheme: the table of docs/distributed.md, which a test compares.

A transformer of L layers and D features has P = 12 L D^2 parameters before its head, N clones of C classes have
H = N C D. W ranks with T tokens each train it in bfloat16 with float32 masters and AlraoSGD's momentum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks.show import Table

# Of a parameter: weight and gradient in bfloat16; master weight and momentum in float32.
WEIGHT, GRADIENT, STATE = 2, 2, 8
# Operations for a parameter and token: forward, backward, and the forward once more.
OF_A_PARAMETER = 8
# Of an activation, kept at the entry of each layer (activation checkpointing), and of a rate.
ACTIVATION, RATE = 2, 4
# Bytes per second and rank between nodes and within one, operations per second, bytes of memory.
BETWEEN, WITHIN, OPERATIONS, MEMORY = 50e9, 300e9, 400e12, 80e9
NODE = 8
TOKENS, CLASSES, CLONES = 8192, 50_000, 10


class Model(NamedTuple):
    layers: int
    features: int

    @property
    def backbone(self) -> int:
        return 12 * self.layers * self.features**2

    @property
    def clone(self) -> int:
        return CLASSES * self.features


MODELS = (Model(12, 768), Model(24, 2048), Model(42, 4608), Model(80, 10240))
RANKS = (8, 64, 1000)


class Cost(NamedTuple):
    """Of one rank and step: bytes of memory, bytes sent between nodes and within, operations."""

    memory: float
    between: float
    within: float
    operations: float

    @property
    def seconds(self) -> float:
        """Nothing overlaps: an upper bound, the same for all schemes."""
        return self.between / BETWEEN + self.within / WITHIN + self.operations / OPERATIONS

    @property
    def fits(self) -> bool:
        return self.memory <= MEMORY


def ring(ranks: float, size: float, passes: int) -> float:
    """Bytes that each rank sends in a ring: 1 pass gathers or scatters `size` bytes in all, 2 sum them."""
    return passes * size * (ranks - 1) / ranks


def _cost(
    ranks: int, memory: float, data: tuple[float, float, int], inner: float, operations: float
) -> Cost:
    """`data`: the ring over the batches, which is within a node where all ranks are."""
    sent = ring(*data)
    if ranks <= NODE:
        return Cost(memory, 0, sent + inner, operations)
    return Cost(memory, sent, inner, operations)


def _kept(model: Model) -> float:
    """Activations of a rank's tokens, and the rates of all features, whole on every rank."""
    features = model.backbone / model.features + CLONES
    return ACTIVATION * TOKENS * model.features * model.layers + RATE * features


def ddp(model: Model, ranks: int) -> Cost:
    """DistributedDataParallel: everything on every rank; the gradients are summed."""
    params = model.backbone + CLONES * model.clone
    memory = (WEIGHT + GRADIENT + STATE) * params + _kept(model)
    return _cost(ranks, memory, (ranks, GRADIENT * params, 2), 0, OF_A_PARAMETER * params * TOKENS)


def fsdp(model: Model, ranks: int) -> Cost:
    """fully_shard: weights are gathered twice and gradients scattered once, the head as a whole."""
    head = CLONES * model.clone
    params = model.backbone + head
    unit = max(model.backbone / model.layers, head)
    memory = (WEIGHT + GRADIENT + STATE) * params / ranks + (WEIGHT + GRADIENT) * unit
    return _cost(
        ranks,
        memory + _kept(model),
        (ranks, WEIGHT * params, 3),
        0,
        OF_A_PARAMETER * params * TOKENS,
    )


def _in_nodes(model: Model, ranks: int, head: float, exchanged: float) -> Cost:
    """Tensor and sequence parallelism within a node, which has one batch of its ranks' tokens, the head over its ranks;
    `head`: parameters of the head on a rank; fully_shard over the nodes."""
    nodes = ranks / NODE
    tokens = NODE * TOKENS
    block = model.backbone / model.layers / NODE
    params = model.backbone / NODE + head
    memory = (WEIGHT + GRADIENT + STATE) * params / nodes + (WEIGHT + GRADIENT) * max(block, head)
    features = ACTIVATION * tokens * model.features
    # Each layer gathers and scatters the features twice in the forward, and twice in the backward; the head gathers
    # them, and scatters the sum of their gradient.
    inner = ring(NODE, features, 1) * (8 * model.layers + 2) + exchanged * tokens
    data = (nodes, WEIGHT * params, 3)
    return _cost(ranks, memory + _kept(model), data, inner, OF_A_PARAMETER * params * tokens)


def clones(model: Model, ranks: int) -> Cost:
    """ClonesParallel: of 10 clones on 8 ranks two have two, for which the others wait."""
    head = math.ceil(CLONES / NODE) * model.clone
    # A number of 8 bytes from each rank for each token.
    return _in_nodes(model, ranks, head, ring(NODE, 8 * NODE, 1))


def classes(model: Model, ranks: int) -> Cost:
    """ClassesParallel: the largest of N numbers and the sums of 3 N for each token, of 4 bytes."""
    head = CLONES * model.clone / NODE
    return _in_nodes(model, ranks, head, ring(NODE, 4 * 4 * CLONES, 2))


SCHEMES = {
    "DDP": ddp,
    "FSDP2": fsdp,
    "clones over a node": clones,
    "classes over a node": classes,
}


def fastest(model: Model, ranks: int) -> str | None:
    """The scheme of the shortest step among those that fit into the memory."""
    costs = {name: scheme(model, ranks) for name, scheme in SCHEMES.items()}
    able = [name for name, cost in costs.items() if cost.fits]
    return min(able, key=lambda name: costs[name].seconds, default=None)


def _gigabytes(size: float) -> str:
    number = size / 1e9
    return f"{number:,.0f} GB" if number >= 9.95 else f"{number:.1f} GB"


def _cell(name: str, cost: Cost, best: str | None) -> str:
    if not cost.fits:
        return _gigabytes(cost.memory)
    sent = _gigabytes(cost.between + cost.within)
    text = f"{_gigabytes(cost.memory)}, {sent}, {cost.seconds:.2g} s"
    return f"**{text}**" if name == best else text


def _power(number: float) -> str:
    return f"{number:.1e}".replace("e+0", "e").replace("e+", "e")


def table() -> Table:
    rows = []
    for model in MODELS:
        size = f"{_power(model.backbone)} + {_power(CLONES * model.clone)}"
        for ranks in RANKS:
            best = fastest(model, ranks)
            costs = {name: scheme(model, ranks) for name, scheme in SCHEMES.items()}
            cells = [_cell(name, cost, best) for name, cost in costs.items()]
            rows.append([size, f"{ranks:,}", *cells])
    title = "memory of a rank, bytes that it sends in a step, seconds of the step"
    return Table(title, ["parameters", "GPUs", *SCHEMES], rows)
