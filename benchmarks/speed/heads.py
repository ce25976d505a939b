"""Cases of the last layer: switch_mixture forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from alrao_fast.functional import switch_mixture_nll
from alrao_fast.reference import switch_mixture as reference
from alrao_fast.testing import MixtureInputs
from benchmarks.networks import ClonesOneByOne
from benchmarks.speed import authors, libraries
from benchmarks.speed import case as cases
from benchmarks.speed.case import DTYPES, Call, Candidate, Case, Missing, Target, sampled

GRADIENTS = ("loss", "dx", "dweight")
# On a CPU the truth is computed for as many samples as have this many logits.
CHECKED_LOGITS = 2_000_000
# Beyond this many entries of the weights the truth of 16-bit inputs is float32: twice the memory is not there.
LARGE_WEIGHTS = 2**29


class Head(NamedTuple):
    """The clones of a last layer and a batch of its features; `label` says whose head it is."""

    label: str
    samples: int
    features: int
    classes: int
    clones: int
    dtype: str = "float32"
    bias: bool = True

    def tiny(self) -> Head:
        """At sizes at which the same code runs in a moment."""
        most = {"samples": 8, "features": 8, "classes": 12, "clones": 3}
        return self._replace(**{name: min(getattr(self, name), n) for name, n in most.items()})

    def sizes(self) -> dict[str, int]:
        names = ("samples", "features", "classes", "clones", "bias")
        return {name: int(getattr(self, name)) for name in names}

    def logits(self) -> int:
        return self.samples * self.clones * self.classes

    def clones_bytes(self) -> int:
        """Of the clones' weights."""
        width = DTYPES[self.dtype].itemsize
        return width * self.clones * self.classes * (self.features + self.bias)

    def features_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * self.samples * self.features

    def inputs(self, device: torch.device, seed: int) -> MixtureInputs:
        """Random inputs drawn on the device, logits of about unit variance."""
        generator = cases.generator_on(device, seed)

        def normal(*shape: int, dtype: torch.dtype = DTYPES[self.dtype]) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

        return MixtureInputs(
            normal(self.samples, self.features),
            normal(self.clones, self.classes, self.features).mul_(self.features**-0.5),
            normal(self.clones, self.classes) if self.bias else None,
            normal(self.clones, dtype=torch.float64).log_softmax(0),
            torch.randint(self.classes, (self.samples,), device=device, generator=generator),
        )

    def checked_inputs(self, device: torch.device, seed: int) -> MixtureInputs:
        """`inputs` with fewer samples on a CPU, where the truth of all of them would take minutes."""
        most = max(2, CHECKED_LOGITS // (self.clones * self.classes))
        samples = min(self.samples, most) if device.type == "cpu" else self.samples
        return self._replace(samples=samples).inputs(device, seed)

    def case(self, kind: str, *, flops: int, **fields: Any) -> Case:
        """A case of this head that takes `flops` for each logit and feature."""
        return Case(
            name=f"{kind}, {self.label}",
            op="switch_mixture",
            sizes=self.sizes(),
            dtype=self.dtype,
            inputs=self.inputs,
            check_inputs=self.checked_inputs,
            flops=flops * self.logits() * self.features,
            **fields,
        )


def _leaf(tensor: Tensor | None) -> Tensor | None:
    """The same memory, as a leaf that gradients are wanted of."""
    return None if tensor is None else tensor.detach().requires_grad_()


def truth(given: MixtureInputs) -> Mapping[str, Tensor]:
    """The reference in float64, summed over chunks of samples; large weights of 16 bits in float32.

    "own" is the sum of the clones' own losses, what N plain losses add up to.
    """
    large = given.weight.numel() > LARGE_WEIGHTS and given.weight.dtype.itemsize == 2
    dtype = torch.float32 if large else torch.float64
    samples = given.x.size(0)
    weight, bias = (None if t is None else _leaf(t.to(dtype)) for t in given[1:3])
    loss, stats, dx = 0.0, 0.0, []
    for x, target in in_chunks(given):
        rows = x.to(dtype).requires_grad_()
        part, part_stats = reference.switch_mixture_nll(
            rows, weight, bias, given.log_posterior, target, ignore_index=-100, reduction="sum"
        )
        part.backward()
        loss, stats = loss + part.detach(), stats + part_stats
        dx.append(rows.grad)
    results = {"loss": loss, "own": stats[0].sum(), "clone_nll": stats[0]}
    results |= {"dx": sampled(torch.cat(dx)), "dweight": sampled(weight.grad)}
    return {name: (value / samples).double() for name, value in results.items()}


def in_chunks(given: MixtureInputs) -> Any:
    """Features and targets, as many rows at once as have a bearable number of logits."""
    rows = max(1, 2**25 // (given.weight.size(0) * given.weight.size(1)))
    return zip(given.x.split(rows), given.target.split(rows))


def _joint(given: MixtureInputs, loss_of: Callable[..., tuple[Tensor, Any]]) -> Call:
    """A candidate whose one scalar carries all gradients: `loss_of(x, weight, bias) -> (loss, clone_nll)`."""
    x, weight, bias = map(_leaf, given[:3])
    assert weight is not None

    def compute() -> Mapping[str, Tensor]:
        loss, clone_nll = loss_of(x, weight, bias)
        loss.backward()
        found = {"loss": loss.detach()}
        return found if clone_nll is None else {**found, "clone_nll": clone_nll}

    return cases.leaving_gradients(compute, x, [weight], [bias])


def _ours(backend: str, given: MixtureInputs) -> Call:
    rest = (given.log_posterior, given.target)
    return _joint(given, lambda x, w, b: switch_mixture_nll(x, w, b, *rest, impl=backend))


def _reference_loss(*given: Tensor | None) -> Tensor:
    return reference.switch_mixture_nll(*given, ignore_index=-100, reduction="mean")[0]


def _compiled(given: MixtureInputs) -> Call:
    loss = cases.compiled(_reference_loss)
    return _joint(given, lambda x, w, b: (loss(x, w, b, given.log_posterior, given.target), None))


def _layers(given: MixtureInputs) -> list[nn.Linear]:
    """The clones as layers, in the same memory."""
    clones, classes, features = given.weight.shape
    options = {"bias": given.bias is not None, "device": "meta"}
    layers = [nn.Linear(features, classes, **options) for _ in range(clones)]
    for k, layer in enumerate(layers):
        layer.weight = nn.Parameter(given.weight[k])
        if given.bias is not None:
            layer.bias = nn.Parameter(given.bias[k])
    return layers


def _vmapped(given: MixtureInputs) -> Call:
    """torch.func's ensemble: one functional call, vectorised over the stacked clones, for each kind of gradient."""
    layers = _layers(given)
    params, buffers = stack_module_state(layers)
    x = given.x.detach().requires_grad_()

    def logits(stacked: Mapping[str, Tensor], features: Tensor) -> Tensor:
        call = vmap(lambda p, b: functional_call(layers[0], (p, b), (features,)))
        return call(stacked, buffers).float()

    def compute() -> Mapping[str, Tensor]:
        index = given.target.expand(len(layers), -1).unsqueeze(2)
        own = F.cross_entropy(logits(params, x.detach()).flatten(0, 1), index.flatten())
        fixed = {name: value.detach() for name, value in params.items()}
        logp = logits(fixed, x).log_softmax(2).gather(2, index).squeeze(2)
        loss = -torch.logsumexp(given.log_posterior.float().unsqueeze(1) + logp, 0).mean()
        # The mean over clones and samples, where each clone's own mean is wanted.
        (loss + own * len(layers)).backward()
        return {"loss": loss.detach()}

    return cases.leaving_gradients(compute, x, [params["weight"]], [params.get("bias")])


def _one_by_one(given: MixtureInputs) -> Call:
    clones, classes, features = given.weight.shape
    with torch.device("meta"):
        net = ClonesOneByOne(nn.Identity(), features, classes, clones)
    net.clones = nn.ModuleList(_layers(given))
    net.log_posterior = given.log_posterior.to(given.x.dtype)
    x = given.x.detach().requires_grad_()

    def compute() -> Mapping[str, Tensor]:
        mixture, own = net.losses(x, targets=given.target)
        net.backward(mixture, own)
        return {"loss": mixture.detach()}

    weights, biases = zip(*((layer.weight, layer.bias) for layer in net.clones))
    return cases.leaving_gradients(compute, x, weights, biases)


def _plain(given: MixtureInputs) -> Call:
    """The last layer of an ordinary network: a single one, and so nothing of the mixture."""
    layer = _layers(given)[0]
    x = given.x.detach().requires_grad_()

    def compute() -> Mapping[str, Tensor]:
        F.cross_entropy(layer(x), given.target).backward()
        return {}

    return cases.leaving_gradients(compute, x, [layer.weight], [layer.bias])


class Scaled(nn.Module):
    """The network below a head that is measured alone: a single parameter, times the features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def authors_step(given: MixtureInputs) -> Call:
    """Their model and `alrao_step`, which also updates the switch and the clones, by the smallest of rates."""
    package = authors.load()
    clones, classes, features = given.weight.shape
    if given.bias is None:
        raise Missing("their last layer has a bias")
    net = authors.model(package, Scaled(), clones, features, classes)
    net = net.to(given.x.device, given.x.dtype)
    layers = [layer.fc for layer in net.last_layers()]
    with torch.no_grad():
        for layer, weight, bias in zip(layers, given.weight, given.bias):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    rate = torch.full((), 1e-12, device=given.x.device)
    last = (net.last_layers_parameters_list(), [1e-12] * clones)
    optimizer = package.optim_spec.SGDAlrao(net.parameters_internal_nn(), [rate], *last)

    def compute() -> Mapping[str, Tensor]:
        optimizer.zero_grad()
        F.nll_loss(net(given.x), given.target).backward()
        package.optim_spec.alrao_step(net, optimizer, F.nll_loss, given.target)
        return {}

    return cases.leaving_gradients(compute, None, [layer.weight for layer in layers])


def mixture_candidates() -> tuple[Candidate, ...]:
    """Ours by backend, plain PyTorch in its several ways, and N calls of each library's fused loss."""
    return (
        *cases.ours("switch_mixture", _ours, (*GRADIENTS, "clone_nll")),
        Candidate("torch.compile", _compiled, GRADIENTS, slow=True),
        Candidate("torch.func.vmap", _vmapped, GRADIENTS),
        Candidate("one by one", _one_by_one, GRADIENTS),
        Candidate("plain head", _plain, (), whole=False),
        *libraries.candidates(),
        Candidate("authors", authors_step, ("dweight",)),
    )


def mixture_case(
    head: Head,
    *,
    memory: bool = False,
    keep: tuple[str, ...] | None = None,
    targets: tuple[Target, ...] = (),
) -> Case:
    """Loss, dx and the clones' gradients of a head."""
    # x, dx, the weights and their gradients, once each.
    half = head.features_bytes() + head.clones_bytes()
    return head.case(
        "switch_mixture",
        flops=6,
        truth=truth,
        candidates=tuple(c for c in mixture_candidates() if keep is None or c.name in keep),
        bytes=2 * half,
        set_bytes=half,
        memory=memory,
        small=mixture_case(head.tiny()) if memory else None,
        # The gradients, two float32 buffers of the features' size, and one clone's logits.
        allowed_memory=half + 8 * head.samples * head.features + 4 * head.samples * head.classes,
        targets=targets,
    )
