"""The mixture's functions, each with its twin in plain PyTorch, and the ways to differentiate them."""

import math

import torch
from mixture_harness import gaussian_inputs
from torch import nn
from torch.autograd import forward_ad, functional, graph
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from alrao_fast import testing
from alrao_fast.functional import (
    switch_mixture_gaussian_nll,
    switch_mixture_log_prob,
    switch_mixture_mean,
    switch_mixture_nll,
)
from alrao_fast.nn import ClassifierClones, RegressorClones

B, D, C, N = 4, 3, 3, 2
SIGMA2 = 1.5
A = torch.tensor([0.3, 0.7], dtype=torch.float64).log()


def logits(x, weight, bias):
    return torch.einsum("...d,ncd->...nc", x, weight) + bias


def class_logp(x, weight, bias, target):
    index = target[..., None, None].expand(*target.shape, N, 1)
    return logits(x, weight, bias).log_softmax(-1).gather(-1, index).squeeze(-1)


def value_logp(x, weight, bias, target):
    squares = (target.unsqueeze(-2) - logits(x, weight, bias)).square().sum(-1)
    return -squares / (2 * SIGMA2) - C / 2 * math.log(2 * math.pi * SIGMA2)


def criterion_logp(x, weight, bias, target):
    return -(target.unsqueeze(-2) - logits(x, weight, bias)).square().mean(-1)


def plain_loss(logp):
    def loss(x, weight, bias, target):
        mixture = logp(x, weight.detach(), bias.detach(), target)
        own = logp(x.detach(), weight, bias, target).sum(-1).mean()
        return own.detach() - own - torch.logsumexp(A.to(x.device) + mixture, -1).mean()

    return loss


def plain_losses(logp):
    """The losses one by one."""

    def losses(x, weight, bias, target):
        mixture = logp(x, weight.detach(), bias.detach(), target)
        own = logp(x.detach(), weight, bias, target).sum(-1)
        return own.detach() - own - torch.logsumexp(A.to(x.device) + mixture, -1)

    return losses


def regularised_logp(x, weight, bias, target):
    """Minus the loss of each clone with the options REGULARISED."""
    capped = 2.5 * (logits(x, weight, bias) / 2.5).tanh()
    logp = capped.log_softmax(-1)
    index = target[..., None, None].expand(*target.shape, N, 1)
    smoothed = 0.9 * logp.gather(-1, index).squeeze(-1) + 0.1 * logp.mean(-1)
    return smoothed - 0.02 * capped.logsumexp(-1).square()


def plain_capped_log_prob(x, weight, bias, target):
    capped = 2.5 * (logits(x, weight, bias) / 2.5).tanh()
    return torch.logsumexp(A.to(x.device).view(N, 1) + capped.log_softmax(-1), -2)


def plain_log_prob(x, weight, bias, target):
    joint = A.to(x.device).view(N, 1) + logits(x, weight, bias).log_softmax(-1)
    return torch.logsumexp(joint, -2)


def plain_mean(x, weight, bias, target):
    return (A.to(x.device).exp().view(N, 1) * logits(x, weight, bias)).sum(-2)


def op(function, **options):
    def make(backend, device):
        def run(x, weight, bias, *target):
            return function(x, weight, bias, A.to(device), *target, impl=backend, **options)

        return run

    return make


def loss_op(function, **options):
    def make(backend, device):
        run = op(function, **options)(backend, device)
        return lambda *inputs: run(*inputs)[0]

    return make


def prediction_op(function, **options):
    def make(backend, device):
        run = op(function, **options)(backend, device)
        return lambda *inputs: run(*inputs[:3])

    return make


class CloneLoss(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x, target):
        return self.head.clone_loss(x, lambda out: (out - target).square().mean(-1))


def head_of(kind, *, with_targets, criterion=False):
    def make(backend, device):
        options = {"sigma2": SIGMA2} if kind is RegressorClones else {}
        head = kind(D, C, N, device=device, dtype=torch.float64, **options)
        head.switch.log_posterior.copy_(A)
        head.eval()
        module = CloneLoss(head) if criterion else head

        def run(x, weight, bias, target):
            inputs = (x, target) if with_targets else (x,)
            prefix = "head." if criterion else ""
            return functional_call(
                module, {f"{prefix}weight": weight, f"{prefix}bias": bias}, inputs
            )

        return run

    return make


# What makes the function, the same in plain PyTorch, and whether its targets are classes.
LOSSES = {
    "nll": (loss_op(switch_mixture_nll), plain_loss(class_logp), True),
    "gaussian nll": (
        loss_op(switch_mixture_gaussian_nll, sigma2=SIGMA2),
        plain_loss(value_logp),
        False,
    ),
    "classifier's loss": (
        head_of(ClassifierClones, with_targets=True),
        plain_loss(class_logp),
        True,
    ),
    "regressor's loss": (
        head_of(RegressorClones, with_targets=True),
        plain_loss(value_logp),
        False,
    ),
    "clone_loss": (
        head_of(RegressorClones, with_targets=True, criterion=True),
        plain_loss(criterion_logp),
        False,
    ),
}
REGULARISED = {"label_smoothing": 0.1, "z_loss": 0.02, "logit_softcap": 2.5}
LOSSES["regularised nll"] = (
    loss_op(switch_mixture_nll, **REGULARISED),
    plain_loss(regularised_logp),
    True,
)
# Losses whose backward computes again, from inputs that must be as they were.
ONE_BY_ONE = {
    "nll, one by one": (
        loss_op(switch_mixture_nll, reduction="none"),
        plain_losses(class_logp),
        True,
    ),
    "regularised nll, one by one": (
        loss_op(switch_mixture_nll, reduction="none", **REGULARISED),
        plain_losses(regularised_logp),
        True,
    ),
    "gaussian nll, one by one": (
        loss_op(switch_mixture_gaussian_nll, reduction="none", sigma2=SIGMA2),
        plain_losses(value_logp),
        False,
    ),
}
PREDICTIONS = {
    "capped log_prob": (
        prediction_op(switch_mixture_log_prob, logit_softcap=2.5),
        plain_capped_log_prob,
        True,
    ),
    "log_prob": (prediction_op(switch_mixture_log_prob), plain_log_prob, True),
    "mean": (prediction_op(switch_mixture_mean), plain_mean, False),
    "classifier": (head_of(ClassifierClones, with_targets=False), plain_log_prob, True),
    "regressor": (head_of(RegressorClones, with_targets=False), plain_mean, False),
}
FUNCTIONS = LOSSES | ONE_BY_ONE | PREDICTIONS


def weighted(out):
    """One number of it, through which every entry has its own gradient."""
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device)
    return 1.25 * (out * weights.view(out.shape)).sum()


def leaves_of(inputs):
    return [t.detach().clone().requires_grad_() for t in inputs]


def by_all(mode):
    """A mode that differentiates a number by x, weight and bias; it gets a function of these alone."""
    return lambda f, inputs, y: mode(lambda *t: weighted(f(*t, y)), inputs)


def by_x(mode):
    """A mode that differentiates the whole result by x."""
    return lambda f, inputs, y: mode(lambda x: f(x, *inputs[1:], y), inputs[0])


def backward(s, inputs):
    leaves = leaves_of(inputs)
    s(*leaves).backward()
    return [t.grad for t in leaves]


def accumulated(s, inputs):
    leaves = leaves_of(inputs)
    for _ in range(2):
        s(*leaves).backward()
    return [t.grad for t in leaves]


def kept(s, inputs):
    leaves = leaves_of(inputs)
    value = s(*leaves)
    value.backward(retain_graph=True)
    value.backward()
    return [t.grad for t in leaves]


def part(s, inputs):
    leaves = [*leaves_of(inputs), torch.ones((), requires_grad=True)]
    *found, unused = torch.autograd.grad(s(*leaves[:3]), leaves[1:], allow_unused=True)
    assert unused is None
    return found


def weight_alone(s, inputs):
    x, weight, bias = inputs
    (weight,) = leaves_of([weight])
    return torch.autograd.grad(s(x, weight, bias), weight)


def of_a_function(s, inputs):
    """The clones' tensors may depend on the features."""
    (x,) = leaves_of(inputs[:1])
    features = x.tanh()
    value = s(features, inputs[1] * features.sum(), inputs[2] + features.mean())
    return torch.autograd.grad(value, x)


def penalty_of_a_function(s, inputs):
    (x,) = leaves_of(inputs[:1])
    features = x.tanh()
    value = s(features, inputs[1] * features.sum(), inputs[2] + features.mean()) ** 2
    (found,) = torch.autograd.grad(value, x, create_graph=True)
    return torch.autograd.grad(found.square().sum(), x)


def hooked(s, inputs):
    leaves = leaves_of(inputs)
    leaves[0].register_hook(lambda g: 2 * g)
    return torch.autograd.grad(s(*leaves), leaves)


def on_cpu(s, inputs):
    leaves = leaves_of(inputs)
    with graph.save_on_cpu():
        value = s(*leaves)
    return torch.autograd.grad(value, leaves)


def complex_upstream(s, inputs):
    leaves = leaves_of(inputs)
    return torch.autograd.grad((s(*leaves) * (1 + 2j)).imag, leaves)


def created(s, inputs):
    leaves = leaves_of(inputs)
    return torch.autograd.grad(s(*leaves), leaves, create_graph=True)


def by_upstream(s, inputs):
    """The gradient is linear in the one that comes in."""
    leaves = leaves_of(inputs)
    factor = torch.full((), 3.0, dtype=torch.float64, requires_grad=True, device=leaves[0].device)
    found = torch.autograd.grad(factor * s(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(weighted(g) for g in found), factor)


def batched(s, inputs):
    leaves = leaves_of(inputs)
    factors = torch.tensor([1.0, 2.0], dtype=torch.float64, device=leaves[0].device)
    return torch.autograd.grad(s(*leaves), leaves, factors, is_grads_batched=True)


def mapped_upstream(s, inputs):
    leaves = leaves_of(inputs)
    value = s(*leaves)
    factors = torch.tensor([1.0, 2.0], dtype=torch.float64, device=leaves[0].device)
    return vmap(lambda v: torch.autograd.grad(value, leaves, v, retain_graph=True))(factors)


def pulled(s, inputs):
    value, pull = vjp(s, *inputs)
    return pull(torch.full_like(value, 1.5))


def per_sample(f, inputs, y):
    """Per-sample gradients: each sample is a batch of one."""
    x, weight, bias = inputs
    each = grad(lambda w, b, x, y: weighted(f(x, w, b, y)), argnums=(0, 1, 2))
    return vmap(each, in_dims=(None, None, 0, 0))(weight, bias, x[:, None], y[:, None])


def ensemble(f, inputs, y):
    x, weight, bias = inputs
    weights, biases = (torch.stack([t, 2 * t, -t]) for t in (weight, bias))
    return vmap(lambda w, b: f(x, w, b, y))(weights, biases)


def dual(s, inputs):
    with forward_ad.dual_level():
        value = s(*(forward_ad.make_dual(t, weighted(t) * t.cos()) for t in inputs))
        return forward_ad.unpack_dual(value).tangent


def pushed(s, inputs):
    return jvp(s, inputs, tuple(t.cos() for t in inputs))


def along(s, inputs):
    _, push = linearize(s, *inputs)
    return push(*(t.cos() for t in inputs))


def penalty(s, inputs):
    leaves = leaves_of(inputs)
    found = torch.autograd.grad(s(*leaves), leaves, create_graph=True)
    sum(g.square().sum() for g in found).backward()
    return [t.grad for t in leaves]


def penalty_by_part(s, inputs):
    """The term reaches what is asked for through the features alone."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True, device=inputs[0].device)
    x = inputs[0] * scale
    (found,) = torch.autograd.grad(s(x, *inputs[1:]) ** 2, x, create_graph=True)
    found.square().sum().backward(inputs=[scale])
    return scale.grad


def penalty_of_weight(s, inputs):
    x, weight, bias = inputs
    (weight,) = leaves_of([weight])
    (found,) = torch.autograd.grad(s(x, weight, bias) ** 2, weight, create_graph=True)
    return torch.autograd.grad(found.square().sum(), weight)


def direction(x):
    return x.cos()


# Name: who has this derivative, and how it is taken.
MODES = {
    "backward": ("all", by_all(backward)),
    "accumulated": ("all", by_all(accumulated)),
    "kept graph": ("all", by_all(kept)),
    "part": ("all", by_all(part)),
    "weight alone": ("all", by_all(weight_alone)),
    "of a function": ("all", by_all(of_a_function)),
    "hook": ("all", by_all(hooked)),
    "save_on_cpu": ("all", by_all(on_cpu)),
    "complex upstream": ("all", by_all(complex_upstream)),
    "squared": ("all", by_all(lambda s, inputs: backward(lambda *t: s(*t) ** 2, inputs))),
    "create_graph": ("all", by_all(created)),
    "by upstream": ("all", by_all(by_upstream)),
    "functional.jvp": (
        "all",
        by_x(lambda f, x: functional.jvp(f, x, direction(x))[1]),
    ),
    "is_grads_batched": ("all", by_all(batched)),
    "vmap of grad's upstream": ("all", by_all(mapped_upstream)),
    "jacobian": ("all", by_x(functional.jacobian)),
    "vectorized jacobian": ("all", by_x(lambda f, x: functional.jacobian(f, x, vectorize=True))),
    "func.grad": ("all", by_all(lambda s, inputs: grad(s, argnums=(0, 1, 2))(*inputs))),
    "func.vjp": ("all", by_all(pulled)),
    "jacrev": ("all", by_x(lambda f, x: jacrev(f)(x))),
    "per sample": ("all", per_sample),
    "ensemble": ("all", ensemble),
    "dual": ("predictions", by_all(dual)),
    "func.jvp": ("predictions", by_all(pushed)),
    "linearize": ("predictions", by_all(along)),
    "jacfwd": ("predictions", by_x(lambda f, x: jacfwd(f)(x))),
    "forward-mode jacobian": (
        "predictions",
        by_x(lambda f, x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode")),
    ),
    "hessian": ("predictions", by_all(functional.hessian)),
    "vectorized hessian": (
        "predictions",
        by_all(lambda s, inputs: functional.hessian(s, inputs, vectorize=True)),
    ),
    "hessian of the square": (
        "predictions",
        by_all(lambda s, inputs: functional.hessian(lambda *t: s(*t) ** 2, inputs)),
    ),
    "hvp": (
        "predictions",
        by_all(lambda s, inputs: functional.hvp(s, inputs, tuple(map(direction, inputs)))),
    ),
    "vhp": (
        "predictions",
        by_all(lambda s, inputs: functional.vhp(s, inputs, tuple(map(direction, inputs)))),
    ),
    "penalty": ("predictions", by_all(penalty)),
    "penalty by part": ("predictions", by_all(penalty_by_part)),
    "penalty of a function": ("predictions", by_all(penalty_of_a_function)),
    "penalty of weight": ("predictions", by_all(penalty_of_weight)),
    "func.hessian": ("predictions", by_x(lambda f, x: hessian(lambda x: weighted(f(x)))(x))),
    "grad of grad": (
        "predictions",
        by_x(lambda f, x: grad(lambda x: weighted(grad(lambda x: weighted(f(x)))(x)))(x)),
    ),
    "jacrev of jacrev": ("predictions", by_x(lambda f, x: jacrev(jacrev(f))(x))),
    "jvp of grad": (
        "predictions",
        by_x(lambda f, x: jvp(grad(lambda x: weighted(f(x))), (x,), (direction(x),))[1]),
    ),
    "grad of jvp": (
        "predictions",
        by_x(lambda f, x: grad(lambda x: weighted(jvp(f, (x,), (direction(x),))[1]))(x)),
    ),
}


def case(name, backend, device):
    """The function, its twin in plain PyTorch, x, weight and bias, and the target."""
    make, plain, classes = FUNCTIONS[name]
    inputs = gaussian_inputs(B, D, C, N, dtype=torch.float64, device=device)
    if classes:
        inputs = testing.mixture_inputs(B, D, C, N, dtype=torch.float64, device=device)
    return make(backend, device), plain, tuple(inputs[:3]), inputs.target
