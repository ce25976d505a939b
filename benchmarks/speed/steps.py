"""Cases of whole training steps: gradients dropped, forward, backward, update. Alrao against plain SGD."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.flop_counter import FlopCounterMode

import alrao_fast as alrao
from benchmarks import networks
from benchmarks.networks import ClonesOneByOne, PlainModel, first
from benchmarks.speed import authors, libraries
from benchmarks.speed.case import DTYPES, Call, Candidate, Case, Target

# Images that the losses are compared on: batch normalisation at a float64 forward of 128 would take minutes.
CHECKED_BATCH = 4
LOSSES = ("loss",)


@dataclass(frozen=True)
class Training:
    """What is trained: a backbone, its last layer's size, and the shape of a batch.

    tokens: 0 for images, otherwise the number of different tokens; `shape` is that of a batch of inputs, the batch in
    dimension `batch_dim`.
    """

    backbone: Callable[[], nn.Module]
    classes: int
    clones: int
    lr_range: tuple[float, float]
    shape: tuple[int, ...]
    tokens: int = 0
    batch_dim: int = 0

    def with_batch(self, batch: int) -> Training:
        shape = list(self.shape)
        shape[self.batch_dim] = batch
        return replace(self, shape=tuple(shape))


class Batch(NamedTuple):
    """Inputs of a step: what is trained, in which dtype, the batch, and the seed of the initial values."""

    training: Training
    dtype: torch.dtype
    x: Tensor
    y: Tensor
    seed: int


def inputs(training: Training, dtype: torch.dtype, device: torch.device, seed: int) -> Batch:
    """Random images or tokens with random targets."""
    generator = torch.Generator().manual_seed(seed)
    if training.tokens:
        x = torch.randint(training.tokens, training.shape, generator=generator)
    else:
        x = torch.randn(training.shape, generator=generator).to(dtype)
    y = torch.randint(training.classes, targets_shape(training), generator=generator)
    return Batch(training, dtype, x.to(device), y.to(device), seed)


def targets_shape(training: Training) -> tuple[int, ...]:
    return training.shape if training.tokens else training.shape[:1]


def checked_inputs(
    training: Training, dtype: torch.dtype, device: torch.device, seed: int
) -> Batch:
    """`inputs` with a small batch."""
    batch = min(training.shape[training.batch_dim], CHECKED_BATCH)
    return inputs(training.with_batch(batch), dtype, device, seed)


def _backbone(batch: Batch) -> nn.Module:
    """The same initial values for every candidate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(batch.seed)
        return batch.training.backbone().to(batch.x.device, batch.dtype)


def _layers(batch: Batch, features: int) -> list[nn.Linear]:
    """The initial last layers of the clones, of which plain training takes the first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(batch.seed + 1)
        layers = [nn.Linear(features, batch.training.classes) for _ in range(batch.training.clones)]
    return [layer.to(batch.x.device, batch.dtype) for layer in layers]


def _alrao_net(batch: Batch) -> alrao.AlraoModel:
    backbone, training = _backbone(batch), batch.training
    features = backbone.out_features
    shape = (features, training.classes, training.clones)
    with torch.device(batch.x.device):
        head = alrao.ClassifierClones(*shape, dtype=batch.dtype)
    layers = _layers(batch, features)
    with torch.no_grad():
        head.weight.copy_(torch.stack([layer.weight for layer in layers]))
        head.bias.copy_(torch.stack([layer.bias for layer in layers]))
    return alrao.AlraoModel(backbone, head)


def _plain_net(batch: Batch) -> PlainModel:
    backbone = _backbone(batch)
    net = PlainModel(backbone, backbone.out_features, batch.training.classes)
    net.head = _layers(batch, backbone.out_features)[0]
    return net


def truth(batch: Batch) -> Mapping[str, Tensor]:
    """The mixture's loss under the uniform posterior of the first step, and the plain loss, in float64."""
    x = batch.x if batch.training.tokens else batch.x.double()
    wide = batch._replace(dtype=torch.float64, x=x)
    with alrao.backends.use_backend("reference"), torch.no_grad():
        out = _alrao_net(wide)(wide.x, targets=wide.y)
        plain = _plain_net(wide)(wide.x, targets=wide.y)
    return {"loss": first(out), "plain": plain}


def _step(
    optimizer: Any,
    compute: Callable[[], Tensor],
    name: str = "loss",
    update: Callable[[], object] | None = None,
) -> Call:
    """A training step whose `compute` returns the loss with its gradients done; the first is kept for comparison.

    `update` stands in place of the optimizer's step.
    """
    results: dict[str, Tensor] = {}
    update = update or optimizer.step

    def run() -> None:
        optimizer.zero_grad()
        loss = compute()
        update()
        if not results:
            results[name] = loss.detach().clone()

    return Call(run, lambda: results, optimizer.zero_grad)


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def _sgd(params: Iterable[Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=1e-3, fused=True)


def _alrao(batch: Batch) -> Call:
    net = _alrao_net(batch)
    generator = torch.Generator().manual_seed(0)
    optimizer = alrao.AlraoSGD(net, lr_range=batch.training.lr_range, generator=generator)
    return _step(optimizer, lambda: _backward(first(net(batch.x, targets=batch.y))))


def _plain(batch: Batch) -> Call:
    net = _plain_net(batch)
    optimizer = _sgd(net.parameters())
    return _step(optimizer, lambda: _backward(net(batch.x, targets=batch.y)), "plain")


def _plain_with(library: str, batch: Batch) -> Call:
    """Plain SGD with a library's fused loss in place of the last layer and cross-entropy."""
    loss_of = libraries.loss_of(library, batch.x.device)
    backbone = _backbone(batch)
    layer = _layers(batch, backbone.out_features)[0]

    def compute() -> Tensor:
        features = first(backbone(batch.x)).flatten(0, -2)
        # Without the bias, which not all of them take: less work than the peer of the others does.
        return _backward(loss_of(features, layer.weight, None, batch.y.flatten(), "mean"))

    return _step(_sgd([*backbone.parameters(), layer.weight]), compute, "unbiased")


def _one_by_one(batch: Batch) -> Call:
    backbone = _backbone(batch)
    training = batch.training
    net = ClonesOneByOne(backbone, backbone.out_features, training.classes, training.clones)
    net.clones = nn.ModuleList(_layers(batch, backbone.out_features))
    net.log_posterior = net.log_posterior.to(batch.x.device)

    def compute() -> Tensor:
        mixture, own = net.losses(batch.x, targets=batch.y)
        net.backward(mixture, own)
        return mixture

    return _step(_sgd(net.parameters()), compute)


def _authors(batch: Batch) -> Call:
    """Their model, optimizer and `alrao_step`, with their last layer for images or for tokens."""
    package = authors.load()
    training, backbone = batch.training, _backbone(batch)
    kind, attribute = ("LinearClassifier", "fc")
    if training.tokens:
        kind, attribute = ("LinearClassifierRNN", "decoder")
    shape = (training.clones, backbone.out_features, training.classes)
    net = authors.model(package, backbone, *shape, kind).to(batch.x.device, batch.dtype)
    layers = [getattr(layer, attribute) for layer in net.last_layers()]
    with torch.no_grad():
        for layer, initial in zip(layers, _layers(batch, backbone.out_features)):
            layer.load_state_dict(initial.state_dict())
    spec = package.optim_spec
    # It prints the clones' rates.
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = spec.init_alrao_optimizer(net, training.clones, *training.lr_range)
    targets = batch.y.flatten()

    def update() -> None:
        spec.alrao_step(net, optimizer, nll_loss, targets)

    return _step(
        optimizer, lambda: _backward(nll_loss(first(net(batch.x)), targets)), update=update
    )


def _images(backbone: Callable[[float], nn.Module], batch: int, tiny: bool) -> Training:
    shape = (2 if tiny else batch, 3, 32, 32)
    return Training(partial(backbone, 0.1 if tiny else 1.0), 10, 10, (1e-5, 10.0), shape)


def _lstm(tokens: int, length: int, tiny: bool) -> Training:
    tokens, length, batch = (20, 3, 2) if tiny else (tokens, length, 20)
    make = partial(networks.LSTMBackbone, tokens)
    shape = (length, batch)
    return Training(make, tokens, 6, (1e-3, 100.0), shape, tokens=tokens, batch_dim=1)


def _transformer(
    features: int, layers: int, heads: int, batch: int, context: int, tiny: bool
) -> Training:
    tokens, vocabulary = 50304, 50000
    if tiny:
        tokens, vocabulary, features, layers, heads, batch, context = 50, 40, 8, 2, 2, 2, 6
    make = partial(networks.TransformerLM, tokens, features, layers, heads, context)
    return Training(make, vocabulary, 6, (1e-5, 1.0), (batch, context), tokens=vocabulary)


# Networks by name: batch -> what is trained; the batch counts streams of text where there is one.
TRAININGS: dict[str, Callable[[int, bool], Training]] = {
    "MLP": lambda batch, tiny: Training(
        networks.MLP, 10, 10, (1e-5, 10.0), (2 if tiny else batch, 64)
    ),
    "GoogLeNet": partial(_images, networks.GoogLeNet),
    "VGG19": partial(_images, networks.VGG19),
    "MobileNetV2": partial(_images, networks.MobileNetV2),
    "SENet18": partial(_images, networks.SENet18),
    "LSTM, 50 characters": lambda batch, tiny: _lstm(50, 70, tiny),
    "LSTM, 10,000 words": lambda batch, tiny: _lstm(10_000, 35, tiny),
    "transformer, 50,000 tokens": lambda batch, tiny: _transformer(128, 2, 4, batch, 64, tiny),
    "GPT 124M": lambda batch, tiny: _transformer(768, 12, 12, batch, 1024, tiny),
    "GPT 1.3B": lambda batch, tiny: _transformer(2048, 24, 16, batch, 1024, tiny),
}


def _plain_flops(training: Training) -> float | None:
    """Flops of a forward and backward of the plain network; None if torch cannot count them.

    Three times the forward's, which torch counts on meta tensors: its count of a grouped convolution's backward leaves
    the groups out.
    """
    with torch.device("meta"):
        backbone = training.backbone()
        net = PlainModel(backbone, backbone.out_features, training.classes)
        x = torch.zeros(training.shape, dtype=torch.int64 if training.tokens else None)
        y = torch.zeros(targets_shape(training), dtype=torch.int64)
        try:
            with FlopCounterMode(display=False) as counter:
                net(x, targets=y)
        except (RuntimeError, NotImplementedError):
            return None
    return 3.0 * counter.get_total_flops() or None


def _samples(training: Training) -> int:
    return math.prod(targets_shape(training))


def clones_flops(training: Training) -> float:
    """What the clones cost beyond one last layer: 6 per sample, clone and weight."""
    with torch.device("meta"):
        features = training.backbone().out_features
    return 6.0 * _samples(training) * (training.clones - 1) * training.classes * features


def step_case(
    network: str,
    batch: int = 32,
    dtype: str = "float32",
    *,
    tiny: bool = False,
    fused_heads: tuple[str, ...] = (),
    targets: tuple[Target, ...] = (),
    floor_targets: tuple[Target, ...] = (),
) -> Case:
    """A training step of `network`; `fused_heads` names libraries whose loss serves the plain network.

    `floor_targets` have limits in units of the ratio of flops, Alrao's to the plain network's.
    """
    training = TRAININGS[network](batch, tiny)
    flops = _plain_flops(training)
    total = None if flops is None else flops + clones_flops(training)
    if flops is not None and total is not None:
        targets += tuple(replace(t, limit=t.limit * total / flops) for t in floor_targets)
    sizes = {"batch": training.shape[training.batch_dim], "samples": _samples(training)}
    sizes |= {"classes": training.classes, "clones": training.clones}
    return Case(
        name=f"training step, {network}",
        op="training_step",
        sizes=sizes,
        dtype=dtype,
        inputs=partial(inputs, training, DTYPES[dtype]),
        check_inputs=partial(checked_inputs, training, DTYPES[dtype]),
        truth=truth,
        candidates=(
            Candidate("alrao", _alrao, LOSSES),
            Candidate("sgd", _plain, ("plain",), whole=False),
            *(
                Candidate(f"sgd, {name}", partial(_plain_with, name), (), whole=False)
                for name in fused_heads
            ),
            Candidate("one by one", _one_by_one, LOSSES, slow=training.classes > 1000),
            Candidate("authors", _authors, LOSSES),
        ),
        bytes=None,
        flops=total,
        # A step overwrites the caches by itself.
        set_bytes=float("inf"),
        targets=targets,
    )
