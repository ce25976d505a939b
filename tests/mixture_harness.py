"""What the tests of the mixture share: shapes, results and gradients, the definition, error budgets, dead clones."""

import math

import torch
import torch.nn.functional as F

from alrao_fast import backends, testing
from alrao_fast.functional import switch_mixture_log_prob, switch_mixture_stats

INF, NAN = math.inf, math.nan

# B, D, C, N, memory budget (None: the default)
SHAPES = {
    "one of everything": (1, 1, 1, 1, None),
    "one class": (5, 3, 1, 3, None),
    "one clone": (17, 8, 10, 1, None),
    "lanes exactly full": (16, 8, 10, 4, None),
    "ragged lanes, joint": (33, 20, 7, 5, None),
    "joint, many chunks": (75, 12, 9, 4, 1),
    "joint, several tasks": (130, 96, 60, 8, None),
    # 49072 of the 49152 bytes that a block may have, and with the loss's options all of them.
    "joint, all of shared memory": (3, 4, 2038, 6, None),
    "streamed, ragged last block": (19, 6, 2500, 2, None),
    "streamed, many chunks": (50, 5, 2100, 3, 1),
    "streamed for its many clones": (7, 4, 397, 33, None),
}
# Without the one of hundreds of launches, and that of one large block.
SHORT_SHAPES = [
    name for name in SHAPES if name not in ("streamed, many chunks", "joint, all of shared memory")
]
# One of each way through the kernels.
TILED_SHAPES = ["joint, several tasks", "streamed, ragged last block"]
OTHER_DTYPES = [dtype for dtype in testing.DTYPES if dtype != torch.float32]


def device_of(backend):
    return backends.device_of(backend).type


def case(name, *sizes, device="cpu", **kwargs):
    """Inputs and options of a loss."""
    return testing.loss_case(name, testing.mixture_inputs(*sizes, device=device, **kwargs))


def to(device, inputs, options):
    inputs = type(inputs)(*(t.to(device) for t in inputs))
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return inputs, moved


def gradients(inputs, impl, *, function=switch_mixture_stats, upstream=1.0, **kwargs):
    """(loss, stats, dx, dweight, dbias); gradients not reached are zeros."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs[:3]]
    loss, stats = function(*leaves, *inputs[3:], impl=impl, **kwargs)
    # Losses one by one have different factors.
    factors = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    (loss if loss.dim() == 0 else loss @ factors).mul(upstream).backward()
    grads = [torch.zeros(0) if t is None else t.grad for t in leaves]
    return (loss.detach(), stats, *grads)


def definition(inputs, *, reduction="mean", ignore_index=-100):
    """The same straight from the formulas, one autograd graph for the mixture and one per clone."""
    x, weight, bias, a, y = (None if t is None else t.detach().clone() for t in inputs)
    x.requires_grad_()
    weight.requires_grad_()
    counted = (y != ignore_index).nonzero().squeeze(1)
    total = len(counted) if reduction == "mean" else 1
    offsets = torch.zeros(weight.shape[:2], dtype=weight.dtype) if bias is None else bias
    offsets.requires_grad_()
    logp = [
        F.log_softmax(F.linear(x, w, b), 1)[counted, y[counted]] for w, b in zip(weight, offsets)
    ]
    loss = -sum(
        torch.logsumexp(torch.stack([a[n] + logp[n][i] for n in range(len(a))]), 0)
        for i in range(len(counted))
    )
    loss = loss / total
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    own = [-each.sum() / total for each in logp]
    dweight = torch.stack(
        [torch.autograd.grad(own[n], weight, retain_graph=True)[0][n] for n in range(len(a))]
    )
    dbias = torch.stack(
        [torch.autograd.grad(own[n], offsets, retain_graph=True)[0][n] for n in range(len(a))]
    )
    own_nll = torch.stack([-each.sum() for each in logp]).detach()
    return loss.detach(), own_nll, dx, dweight, dbias


def without_clone(inputs, n):
    keep = [i for i in range(inputs.weight.size(0)) if i != n]
    bias = None if inputs.bias is None else inputs.bias[keep]
    return inputs._replace(
        weight=inputs.weight[keep], bias=bias, log_posterior=inputs.log_posterior[keep]
    ), keep


NAMES = ("loss", "stats", "dx", "dweight", "dbias")


def assert_budget(inputs, impl, function=switch_mixture_stats, slack=None, **kwargs):
    low = gradients(inputs, "reference", function=function, **kwargs)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    truth = gradients(wide, "reference", function=function, **kwargs)
    kwargs.setdefault("memory_budget", None)
    actual = gradients(inputs, impl, function=function, **kwargs)
    for name, got, reference, exact in zip(NAMES, actual, low, truth):
        assert got.dtype == reference.dtype, name
        if name == "stats":
            # Rounding decides ties in the predictions: row 1 is held against its own dtype.
            testing.assert_within_budget(
                got[1:], reference[1:], reference[1:], "stats[1:]", slack=1e-4
            )
            got, reference, exact = got[0], reference[0], exact[0]
            slack_here = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(inputs[0].dtype, 4e-6)
            testing.assert_within_budget(got, reference, exact, name, slack=slack_here)
            continue
        if name == "loss" and slack is None:
            # With one class all that is left of the posterior's terms, of size 1, is their rounding.
            unit = 1e-13 if got.dtype == torch.float64 else 4e-6
            largest = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 1.0
            slack_of_loss = unit / min(max(largest, 1e-30), 1.0)
            testing.assert_within_budget(got, reference, exact, name, slack=slack_of_loss)
            continue
        testing.assert_within_budget(got, reference, exact, name, slack=slack)


def poisoned(kind, inputs, n=1):
    weight, bias, x = inputs.weight.clone(), inputs.bias.clone(), inputs.x.clone()
    if kind == "nan weight":
        weight[n, 2, 1] = NAN
    elif kind == "inf weight":
        weight[n, -1, 0] = INF
    elif kind == "all weights nan":
        weight[n] = NAN
    elif kind == "nan bias":
        bias[n, 0] = NAN
    elif kind == "-inf bias":
        bias[n, 1] = -INF
    return inputs._replace(x=x, weight=weight, bias=bias)


def gaussian_inputs(batch, features, outputs, clones, **kwargs):
    inputs = testing.mixture_inputs(batch, features, outputs, clones, **kwargs)
    target = torch.randn(batch, outputs, generator=torch.Generator().manual_seed(1))
    return inputs._replace(target=target.to(inputs.x))


def log_prob_gradients(inputs, impl, upstream, **kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    value = switch_mixture_log_prob(*leaves, inputs.log_posterior, impl=impl, **kwargs)
    value.backward(upstream.to(value.dtype))
    return value.detach(), *(leaf.grad for leaf in leaves)


# Special values of inputs.


def dead_sample(inputs):
    inputs.x[3, 1] = INF


def ignored_sample_not_finite(inputs):
    inputs.target[::3] = -100
    inputs.x[0] = NAN


def nothing_counted(inputs):
    inputs.target.fill_(-100)


def posterior_with_zeros(inputs):
    inputs.log_posterior[1] = -INF
