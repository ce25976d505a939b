"""Cases of the last layer: switch_mixture forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from networks import ClonesOneByOne
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from alrao_fast import backends
from alrao_fast.functional import switch_mixture_nll
from alrao_fast.reference import switch_mixture as reference
from alrao_fast.testing import MixtureInputs
from speed import authors, libraries
from speed.case import (
    DTYPES,
    Call,
    Candidate,
    Case,
    Missing,
    Target,
    compiled,
    generator_on,
    sampled,
)

LR_RANGE = (1e-5, 1e-1)
GRADIENTS = ("loss", "dx", "dweight")
OWN = ("own", "dweight")
# On a CPU the truth is computed for as many samples as have this many logits.
CHECKED_LOGITS = 2_000_000
# Beyond this many entries of the weights the truth of 16-bit inputs is float32: twice the memory is not there.
LARGE_WEIGHTS = 2**29


def inputs(
    sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, seed: int
) -> MixtureInputs:
    """Random inputs drawn on the device, logits of about unit variance."""
    generator = generator_on(device, seed)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    samples, features = sizes["samples"], sizes["features"]
    classes, clones = sizes["classes"], sizes["clones"]
    return MixtureInputs(
        normal(samples, features),
        normal(clones, classes, features).mul_(features**-0.5),
        normal(clones, classes) if sizes["bias"] else None,
        torch.randn(clones, device=device, dtype=torch.float64, generator=generator).log_softmax(0),
        torch.randint(classes, (samples,), device=device, generator=generator),
    )


def checked_inputs(
    sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, seed: int
) -> MixtureInputs:
    """`inputs` with fewer samples on a CPU, where the truth of all of them would take minutes."""
    if device.type == "cpu":
        most = CHECKED_LOGITS // (sizes["clones"] * sizes["classes"])
        sizes = {**sizes, "samples": min(sizes["samples"], max(2, most))}
    return inputs(sizes, dtype, device, seed)


def leaves(x: Tensor | None, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """The same memory, as leaves that gradients are wanted of."""
    return [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]


def truth(given: MixtureInputs) -> Mapping[str, Tensor]:
    """The reference in float64, summed over chunks of samples; large weights of 16 bits in float32.

    "own" is the sum of the clones' own losses, what N plain losses add up to.
    """
    large = given.weight.numel() > LARGE_WEIGHTS and given.weight.dtype.itemsize == 2
    dtype = torch.float32 if large else torch.float64
    samples = given.x.size(0)
    _, weight, bias = leaves(
        None, given.weight.to(dtype), None if given.bias is None else given.bias.to(dtype)
    )
    assert weight is not None
    loss, stats, dx = 0.0, 0.0, []
    for x, target in zip(*(t.split(rows_at_once(given)) for t in (given.x, given.target))):
        rows = x.to(dtype).requires_grad_()
        part, part_stats = reference.switch_mixture_nll(
            rows, weight, bias, given.log_posterior, target, ignore_index=-100, reduction="sum"
        )
        part.backward()
        loss, stats = loss + part.detach(), stats + part_stats
        dx.append(rows.grad / samples)
    results = {
        "loss": loss / samples,
        "own": stats[0].sum() / samples,
        "clone_nll": stats[0] / samples,
        "dx": sampled(torch.cat(dx)),
        "dweight": sampled(weight.grad / samples),
    }
    return {name: value.double() for name, value in results.items()}


def rows_at_once(given: MixtureInputs) -> int:
    return max(1, 2**25 // (given.weight.size(0) * given.weight.size(1)))


def outputs_of(results: dict[str, Tensor], x: Tensor, weight: Tensor | list[Tensor]) -> Any:
    """The outputs of a run that leaves its gradients in `x` and `weight` (or in the clones' weights)."""

    def read() -> Mapping[str, Tensor]:
        found = dict(results)
        if x.grad is not None:
            found["dx"] = sampled(x.grad)
        grads = weight.grad if isinstance(weight, Tensor) else torch.stack([w.grad for w in weight])
        return {**found, "dweight": sampled(grads)}

    return read


def _joint(given: MixtureInputs, loss_of: Callable[..., tuple[Tensor, Any]]) -> Call:
    """A candidate whose one scalar carries all gradients: `loss_of(x, weight, bias) -> (loss, clone_nll)`."""
    x, weight, bias = leaves(given.x, given.weight, given.bias)
    assert x is not None and weight is not None
    results: dict[str, Tensor] = {}

    def drop() -> None:
        results.clear()
        for leaf in (x, weight, bias):
            if leaf is not None:
                leaf.grad = None

    def run() -> None:
        drop()
        loss, clone_nll = loss_of(x, weight, bias)
        loss.backward()
        results.update(loss=loss.detach())
        if clone_nll is not None:
            results.update(clone_nll=clone_nll)

    return Call(run, outputs_of(results, x, weight), drop)


def available(op: str, backend: str, device: torch.device) -> None:
    state = backends.status(op, backend)
    if not state.available:
        raise Missing(state.reason)
    if backend not in backends.available(op, device):
        raise Missing(f"it does not run on {device.type} tensors")


def _ours(backend: str, given: MixtureInputs) -> Call:
    if backend != "auto":
        available("switch_mixture", backend, given.x.device)
    return _joint(
        given,
        lambda x, w, b: switch_mixture_nll(
            x, w, b, given.log_posterior, given.target, impl=backend
        ),
    )


def _reference_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor, target: Tensor
) -> Tensor:
    return reference.switch_mixture_nll(
        x, weight, bias, log_posterior, target, ignore_index=-100, reduction="mean"
    )[0]


def _compiled(given: MixtureInputs) -> Call:
    loss = compiled(_reference_loss)
    return _joint(given, lambda x, w, b: (loss(x, w, b, given.log_posterior, given.target), None))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    classes, features = weight.shape
    layer = nn.Linear(features, classes, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _layers(given: MixtureInputs) -> list[nn.Linear]:
    biases = [None] * len(given.weight) if given.bias is None else list(given.bias)
    return [_linear(weight, bias) for weight, bias in zip(given.weight, biases)]


def _vmapped(given: MixtureInputs) -> Call:
    """torch.func's ensemble: one functional call, vectorised over the stacked clones, for each kind of gradient."""
    layers = _layers(given)
    params, buffers = stack_module_state(layers)
    x = given.x.detach().requires_grad_()
    results: dict[str, Tensor] = {}

    def logits(stacked: Mapping[str, Tensor], features: Tensor) -> Tensor:
        call = vmap(lambda p, b: functional_call(layers[0], (p, b), (features,)))
        return call(stacked, buffers).float()

    def drop() -> None:
        results.clear()
        for leaf in (x, *params.values()):
            leaf.grad = None

    def run() -> None:
        drop()
        index = given.target.expand(len(layers), -1).unsqueeze(2)
        own = F.cross_entropy(logits(params, x.detach()).flatten(0, 1), index.flatten())
        fixed = {name: value.detach() for name, value in params.items()}
        logp = logits(fixed, x).log_softmax(2).gather(2, index).squeeze(2)
        loss = -torch.logsumexp(given.log_posterior.float().unsqueeze(1) + logp, 0).mean()
        # The mean over clones and samples, where each clone's own mean is wanted.
        (loss + own * len(layers)).backward()
        results.update(loss=loss.detach())

    return Call(run, outputs_of(results, x, params["weight"]), drop)


def _one_by_one(given: MixtureInputs) -> Call:
    clones, classes, features = given.weight.shape
    with torch.device("meta"):
        net = ClonesOneByOne(nn.Identity(), features, classes, clones)
    net.clones = nn.ModuleList(_layers(given))
    net.log_posterior = given.log_posterior.to(given.x.dtype)
    x = given.x.detach().requires_grad_()
    results: dict[str, Tensor] = {}

    def drop() -> None:
        results.clear()
        x.grad = None
        net.zero_grad()

    def run() -> None:
        drop()
        mixture, own = net.losses(x, targets=given.target)
        net.backward(mixture, own)
        results.update(loss=mixture.detach())

    weights = [layer.weight for layer in net.clones]
    return Call(run, outputs_of(results, x, weights), drop)


def _plain(given: MixtureInputs) -> Call:
    """The last layer of an ordinary network: a single one, and so nothing of the mixture."""
    layer = _layers(given)[0]
    x = given.x.detach().requires_grad_()

    def drop() -> None:
        x.grad = None
        layer.zero_grad()

    def run() -> None:
        drop()
        F.cross_entropy(layer(x), given.target).backward()

    return Call(run, dict, drop)


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
    net = package.alrao_model.AlraoModel(
        "classification",
        nn.NLLLoss(),
        Scaled(),
        clones,
        package.custom_layers.LinearClassifier,
        features,
        classes,
    ).to(given.x.device, given.x.dtype)
    layers = [layer.fc for layer in net.last_layers()]
    with torch.no_grad():
        for layer, weight, bias in zip(layers, given.weight, given.bias):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    optimizer = package.optim_spec.SGDAlrao(
        net.parameters_internal_nn(),
        [torch.full((), 1e-12, device=given.x.device)],
        net.last_layers_parameters_list(),
        [1e-12] * clones,
    )

    def run() -> None:
        optimizer.zero_grad()
        F.nll_loss(net(given.x), given.target).backward()
        package.optim_spec.alrao_step(net, optimizer, F.nll_loss, given.target)

    weights = [layer.weight for layer in layers]
    return Call(
        run,
        lambda: {"dweight": sampled(torch.stack([w.grad for w in weights]))},
        optimizer.zero_grad,
    )


def mixture_candidates() -> tuple[Candidate, ...]:
    """Ours by backend, plain PyTorch in its several ways, and N calls of each library's fused loss."""
    return (
        Candidate("alrao", partial(_ours, "auto"), (*GRADIENTS, "clone_nll")),
        *(
            Candidate(f"alrao {name}", partial(_ours, name), (*GRADIENTS, "clone_nll"))
            for name in backends.BACKENDS
        ),
        Candidate("torch.compile", _compiled, GRADIENTS, slow=True),
        Candidate("torch.func.vmap", _vmapped, GRADIENTS),
        Candidate("one by one", _one_by_one, GRADIENTS),
        Candidate("plain head", _plain, (), whole=False),
        *libraries.candidates(),
        Candidate("authors", authors_step, ("dweight",)),
    )


def sizes_of(samples: int, features: int, classes: int, clones: int, bias: bool, tiny: bool) -> Any:
    if tiny:
        samples, features, classes = min(samples, 8), min(features, 8), min(classes, 12)
        clones = min(clones, 3)
    return {
        "samples": samples,
        "features": features,
        "classes": classes,
        "clones": clones,
        "bias": int(bias),
    }


def head_bytes(sizes: Mapping[str, int], width: int) -> int:
    """x, dx, the weights and their gradients, once each."""
    per_clone = sizes["classes"] * (sizes["features"] + sizes["bias"])
    return 2 * width * (sizes["samples"] * sizes["features"] + sizes["clones"] * per_clone)


def logits_of(sizes: Mapping[str, int]) -> int:
    return sizes["samples"] * sizes["clones"] * sizes["classes"]


def mixture_case(
    label: str,
    samples: int,
    features: int,
    classes: int,
    clones: int,
    dtype: str = "float32",
    *,
    bias: bool = True,
    tiny: bool = False,
    memory: bool = False,
    keep: tuple[str, ...] | None = None,
    targets: tuple[Target, ...] = (),
) -> Case:
    """Loss, dx and the clones' gradients of a head; `label` says whose head it is."""
    sizes = sizes_of(samples, features, classes, clones, bias, tiny)
    small = None
    if memory and not tiny:
        small = mixture_case(label, samples, features, classes, clones, dtype, bias=bias, tiny=True)
    total = head_bytes(sizes, DTYPES[dtype].itemsize)
    return Case(
        name=f"switch_mixture, {label}",
        op="switch_mixture",
        sizes=sizes,
        dtype=dtype,
        inputs=partial(inputs, sizes, DTYPES[dtype]),
        check_inputs=partial(checked_inputs, sizes, DTYPES[dtype]),
        truth=truth,
        candidates=tuple(c for c in mixture_candidates() if keep is None or c.name in keep),
        bytes=total,
        flops=6 * logits_of(sizes) * sizes["features"],
        set_bytes=total / 2,
        memory=memory,
        small=small,
        # The gradients, two float32 buffers of the features' size, and one clone's logits.
        allowed_memory=total / 2
        + 8 * sizes["samples"] * sizes["features"]
        + 4 * sizes["samples"] * sizes["classes"],
        targets=targets,
    )
