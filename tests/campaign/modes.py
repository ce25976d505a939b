"""Modes of autograd through heads and ops, and networks that diverge."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import alrao_fast as alrao
from campaign import heads, models, oracles
from campaign.engine import Trial, area
from campaign.oracles import assert_near

BACKENDS = ("cpu", "reference")
# An error may say that a mode is not there, in these words.
MODES = (
    "derivative",
    "derivatives",
    "differentiable",
    "differentiated",
    "backward",
    "forward",
    "vmap",
)
MODES += ("jvp", "functorch", "grad", "gradient", "gradients", "second", "twice", "create_graph")
MODES += ("torch.func", "in-place", "inplace", "autograd")


class Problem:
    """A head in float64, its function of the features, and the same function by formula.

    The loss is the mixture's: of the features alone, with constant clones, ours and the formula's are one function.
    """

    def __init__(self, rng: Random) -> None:
        self.kind = rng.choice(["ClassifierClones", "RegressorClones"])
        self.what = rng.choice(["loss", "loss", "prediction", "loss**2"])
        self.backend = rng.choice(BACKENDS)
        torch.manual_seed(rng.getrandbits(30))
        self.head = heads.make_head(self.kind, dtype=torch.float64, bias=rng.random() < 0.7)
        self.x, self.y = heads._batch(self.head, rng)
        self.head(self.x, self.y)
        self.head.eval().requires_grad_(False)
        self.posterior = self.head.switch.log_posterior.clone()

    @property
    def text(self) -> str:
        return f"{self.what} of {self.kind}, {self.backend}"

    def ours(self, x: Tensor) -> Tensor:
        with alrao.use_backend(self.backend):
            if self.what == "prediction":
                return self.head(x).sin().sum()
            loss = self.head(x, self.y)
            return loss**2 if self.what == "loss**2" else loss

    def formula(self, x: Tensor) -> Tensor:
        w, b = self.head.weight, self.head.bias
        outputs = torch.stack(
            [F.linear(x, w[n], None if b is None else b[n]) for n in range(len(w))]
        )
        a = self.posterior.view(-1, 1)
        if self.what == "prediction":
            if self.kind[0] == "R":
                return (self.posterior.exp().view(-1, 1, 1) * outputs).sum(0).sin().sum()
            return torch.logsumexp(a.unsqueeze(2) + outputs.log_softmax(2), 0).sin().sum()
        if self.kind[0] == "C":
            logp = outputs.log_softmax(2)[:, torch.arange(len(x)), self.y]
        else:
            constant = 0.5 * heads.C * math.log(2 * math.pi)
            logp = -(outputs - self.y).square().sum(2) / 2 - constant
        loss = -torch.logsumexp(a + logp, 0).mean()
        return loss**2 if self.what == "loss**2" else loss


def _penalty(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of |gradient|^2."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    return second


def _penalty_backward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (f(leaf) + grad.square().sum()).backward()
    return leaf.grad


def _first(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf), leaf)
    return grad


def _create_graph(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    return grad.detach()


def _twice(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Two passes through one graph, with a gradient changed in place in between."""
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    (one,) = torch.autograd.grad(out, leaf, retain_graph=True)
    before = one.clone()
    one.mul_(3)
    (two,) = torch.autograd.grad(out, leaf)
    return torch.cat([before, two])


def _accumulated(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    out.backward(retain_graph=True)
    leaf.grad.mul_(2)
    out.backward(retain_graph=True)
    out.backward()
    return leaf.grad


def _checkpoint(reentrant: bool) -> Callable[..., Tensor]:
    def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        checkpoint(f, leaf, use_reentrant=reentrant).backward()
        return leaf.grad

    return gradient


def _forward_mode(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
    return torch.zeros(()) if tangent is None else tangent


def _batched(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    weights = torch.tensor([1.0, 2.0], dtype=x.dtype)
    (grad,) = torch.autograd.grad(out, leaf, weights, is_grads_batched=True)
    return grad


AUTOGRAD: dict[str, tuple[str, Callable[..., Any]]] = {
    "grad": ("right", _first),
    "grad twice, changed in place in between": ("either", _twice),
    "backward three times": ("right", _accumulated),
    "create_graph": ("either", _create_graph),
    "checkpoint": ("right", _checkpoint(False)),
    "reentrant checkpoint": ("right", _checkpoint(True)),
    "gradient penalty": ("either", _penalty),
    "gradient penalty, backward": ("either", _penalty_backward),
    "hessian": ("either", lambda f, x: torch.autograd.functional.hessian(f, x)),
    "vectorized hessian": (
        "either",
        lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    ),
    "functional.jvp": (
        "either",
        lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x))[1],
    ),
    "functional.vhp": (
        "either",
        lambda f, x: torch.autograd.functional.vhp(f, x, torch.ones(()).to(x))[1],
    ),
    "functional.hvp": (
        "either",
        lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x))[1],
    ),
    "jacobian": ("right", lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "forward mode": ("either", _forward_mode),
    "is_grads_batched": ("either", _batched),
    "func.grad": ("either", lambda f, x: torch.func.grad(f)(x)),
    "func.vjp": ("either", lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0]),
    "func.jvp": ("either", lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]),
    "func.hessian": ("either", lambda f, x: torch.func.hessian(f)(x)),
    "func.jacrev": ("either", lambda f, x: torch.func.jacrev(f)(x)),
    "vmap": ("either", lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x, -x]))),
    "vmap of grad": (
        "either",
        lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    ),
}
del AUTOGRAD["functional.vhp"]


@area("autograd", weight=4)
def autograd(rng: Random) -> Trial:
    problem = Problem(rng)
    text = rng.choice(list(AUTOGRAD))
    expect, mode = AUTOGRAD[text]

    def right(result: Tensor) -> None:
        assert_near(result, mode(problem.formula, problem.x), text, 1e-7)

    run = lambda: mode(problem.ours, problem.x)  # noqa: E731
    call = f"{text} of the {problem.text}"
    return Trial(call, run, expect, right, MODES, None, [problem.head, problem.x])


@area("second order training", weight=1)
def penalised_training(rng: Random) -> Trial:
    """A gradient penalty on the inputs of a whole model, with clones that learn: right for the backbone, or refused."""
    net, _opt, x, y = models.trained(rng, dtype=torch.float64)
    net.double().eval()
    x = x.double().requires_grad_()
    what = rng.choice(["loss", "prediction"])
    backend = rng.choice(BACKENDS)

    def penalty(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = function(x)
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        total = out + grad.square().sum()
        return list(torch.autograd.grad(total, list(net.backbone.parameters())))

    def ours(x: Tensor) -> Tensor:
        with alrao.use_backend(backend):
            return net(x, targets=y) if what == "loss" else net(x)[:, 0].sum()

    def plain(x: Tensor) -> Tensor:
        features = net.backbone(x)
        w, b = net.head.weight.detach(), net.head.bias.detach()
        logp = (torch.einsum("bd,ncd->nbc", features, w) + b.unsqueeze(1)).log_softmax(2)
        mixed = torch.logsumexp(net.head.switch.log_posterior.view(-1, 1, 1) + logp, 0)
        return F.nll_loss(mixed, y) if what == "loss" else mixed[:, 0].sum()

    def right(result: list[Tensor]) -> None:
        for own, other in zip(result, penalty(plain)):
            assert_near(own, other, "gradient to the backbone", 1e-7)

    call = f"gradient penalty on the {what} of a model, {backend}"
    return Trial(call, lambda: penalty(ours), "either", right, MODES, None, [net, x])


DAMAGES: dict[str, Callable[[Any], None]] = {
    "huge rates": lambda net: None,
    "a clone is NaN": lambda net: net.head.weight[0].fill_(torch.nan),
    "a clone is infinite": lambda net: net.head.weight[1].fill_(torch.inf),
    "a clone overflows": lambda net: net.head.weight[0].fill_(3e38),
    "all clones but one are NaN": lambda net: net.head.weight[1:].fill_(torch.nan),
    "all clones are NaN": lambda net: net.head.weight.fill_(torch.nan),
    "a unit of the backbone is NaN": lambda net: net.backbone.linear.weight[0].fill_(torch.nan),
    "the backbone is infinite": lambda net: net.backbone.linear.bias.fill_(torch.inf),
}


@contextmanager
def _heard(said: list[Any]) -> Iterator[None]:
    """Adds the warnings within to `said`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said += caught


@area("diverging", weight=4)
def diverging(rng: Random) -> Trial:
    """A network in which something dies: what it predicts is a distribution, the living go on, and somebody is told."""
    kind = rng.choice(["ClassifierClones", "RegressorClones"])
    backend = rng.choice(BACKENDS)
    text = rng.choice(list(DAMAGES))
    net, _opt, x, y = models.trained(rng, kind)
    rates = (1e6, 1e9) if text == "huge rates" else (1e-3, 1e-1)
    make = rng.choice([alrao.AlraoSGD, alrao.AlraoAdam])
    opt = make(net, rates, generator=torch.Generator().manual_seed(1))
    # An affine layer lets the backbone itself overflow.
    net.backbone.wrap = (lambda f: f * 1e3) if text == "huge rates" else None
    with torch.no_grad():
        DAMAGES[text](net)
    said: list[Any] = []

    def run() -> None:
        with alrao.use_backend(backend), _heard(said):
            for _ in range(12):
                models.step(net, opt, x, y)

    def right(result: None) -> None:
        assert_near(net.posterior().sum(), 1.0, "sum of the posterior", 1e-6)
        net.eval()
        with torch.no_grad(), alrao.use_backend(backend), _heard(said):
            features, result = net.backbone(x), net(x)
            suggested, answer = True, None
            try:
                answer = net.suggested_lr()
            except RuntimeError:
                suggested = False
        outputs = torch.einsum("bd,ncd->nbc", features, net.head.weight)
        alive = (outputs + net.head.bias.unsqueeze(1)).isfinite().all(2).any(0)
        if kind[0] == "C":
            total = result[alive].double().exp().sum(-1)
            assert_near(total, torch.ones_like(total), "sum of the probabilities", 1e-4)
        else:
            assert result[alive].isfinite().all(), "a prediction is no number"
        if not alive.any() or not features.isfinite().all():
            words = ("finite", "NaN", "died", "dead", "diverged", "overflow")
            told = [str(w.message) for w in said if any(word in str(w.message) for word in words)]
            assert told, f"nobody is told, warnings: {[str(w.message) for w in said]}"
            assert len(told) <= 3, f"{len(told)} warnings"
            assert not suggested, f"suggested_lr() is {answer}"

    call = f"{text}, {kind}, {make.__name__}, {backend}"
    return Trial(call, run, "right", right)


@area("averages", weight=1)
def averages(rng: Random) -> Trial:
    """torch.optim.swa_utils.AveragedModel, of parameters alone and of buffers too."""
    kind = rng.choice(["ClassifierClones", "RegressorClones"])
    net, opt, x, y = models.trained(rng, kind, steps=0)
    buffers = rng.random() < 0.7
    ema = rng.random() < 0.5
    function = torch.optim.swa_utils.get_ema_multi_avg_fn(0.7) if ema else None

    def run() -> nn.Module:
        average = torch.optim.swa_utils.AveragedModel(
            net, multi_avg_fn=function, use_buffers=buffers
        )
        for k in range(5):
            models.step(net, opt, x.roll(k, 0) * (1 + k), y.roll(2 * k, 0))
            average.update_parameters(net)
        return average.eval()

    def right(average: Any) -> None:
        own = average.module
        assert_near(own.posterior().sum(), 1.0, "sum of the posterior", 1e-9)
        assert int(own.head.switch.t) == own.head.switch.t and own.head.switch.t >= 1
        result = average(x)
        assert_near(result, models.prediction(own, x), "eval")
        if kind[0] == "C":
            total = result.exp().sum(-1)
            assert_near(total, torch.ones_like(total), "sum of the probabilities", 1e-4)
        # It may be trained on: one more observation from where it stands.
        before = oracles.SwitchState.of(own.head.switch.logw, own.head.switch.t, 0.999)
        own.train()(x, targets=y)
        assert int(own.head.switch.t) == before.t + 1
        assert_near(own.posterior().sum(), 1.0, "sum of the posterior after an observation", 1e-9)

    call = f"AveragedModel({'EMA, ' if ema else ''}use_buffers={buffers}), {kind}"
    return Trial(call, run, "right", right)
