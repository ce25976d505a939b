"""Protects the meaning of the options of the mixture's loss, on every backend that is available.

- Torch's F.cross_entropy where there is one clone, the formulas where there are more, and a few values by hand.
"""

import math
from math import log as LOG

import pytest
import torch
import torch.nn.functional as F
from mixture_harness import case, gradients, to

from alrao_fast import testing
from alrao_fast.functional import switch_mixture_nll

OP = "switch_mixture"
pytestmark = pytest.mark.emulated


def cross_entropy(inputs, options):
    """The loss of one clone by torch, float64; and the gradients to x, weight and bias."""
    x, weight, bias, _, y = inputs
    leaves = [x.double().nan_to_num(), weight[0].double(), bias[0].double()]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    logits = F.linear(*leaves)
    softcap = options.get("logit_softcap")
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    ignored, classes = options.get("ignore_index", -100), logits.size(1)
    class_weight = options.get("class_weight", torch.ones(classes)).to(logits)
    smoothing = options.get("label_smoothing", 0.0)
    target = y if y.dim() == 1 else y.double()
    terms = {
        "weight": class_weight,
        "label_smoothing": smoothing,
        "ignore_index": ignored,
    }
    each = F.cross_entropy(logits, target, reduction="none", **terms)
    q = F.one_hot(y.clamp(min=0), classes).double() if y.dim() == 1 else y.double()
    share = ((1 - smoothing) * q + smoothing / classes) @ class_weight
    each = each + options.get("z_loss", 0.0) * share * logits.logsumexp(1).square()
    v = options.get("sample_weight", torch.ones(len(x))).to(each)
    if y.dim() == 1:
        v = torch.where(y == ignored, 0, v)
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        loss = v * each
        total = loss @ torch.linspace(0.5, 1.5, len(x), dtype=loss.dtype)
    elif options.keys() <= {"reduction", "class_weight", "label_smoothing", "logit_softcap"}:
        # Torch's own reduction.
        total = loss = F.cross_entropy(logits, target, reduction=reduction, **terms)
    else:
        divisor = (v * (class_weight[y] if y.dim() == 1 else 1)).sum()
        divisor = divisor if reduction == "mean" else 1
        total = loss = (v * each).sum() / options.get("num_items_in_batch", divisor)
    total.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("name", testing.LOSS_CASES)
def test_one_clone_has_the_cross_entropy(backend, device, name):
    inputs, options = case(name, 11, 4, 5, 1, dtype=torch.float64)
    if "other sums" in " ".join(testing.LOSS_CASES[name]) and "label_smoothing" in options:
        # Torch does not weigh the share of the other classes by the sum.
        inputs = inputs._replace(target=inputs.target / inputs.target.sum(1, keepdim=True))
        inputs.target[-1] = 0.2
    inputs = inputs._replace(log_posterior=torch.zeros(1, dtype=torch.float64))
    expected = cross_entropy(inputs, options)
    inputs, options = to(device, inputs, options)
    loss, _, dx, dweight, dbias = gradients(inputs, backend, **options)
    for got, want in zip((loss, dx, dweight[0], dbias[0]), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want)


def formulas(inputs, options):
    """Loss and gradients to x, weight and bias straight from the formulas: one graph for the mixture, one per clone."""
    x, weight, bias, a, y = inputs
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x.nan_to_num(), weight, bias))
    n_clones, classes, _ = weight.shape
    hard = y.dim() == 1
    v = options.get("sample_weight", torch.ones(len(x))).double()
    v = torch.where(y == options.get("ignore_index", -100), 0, v) if hard else v
    q = F.one_hot(y, classes).double() if hard else y.double()
    sums = q.sum(1)
    q = q / torch.where(sums == 0, 1, sums)[:, None]
    w = options.get("class_weight", torch.ones(classes)).double()
    e, z, k = (options.get(s, 0.0) for s in ("label_smoothing", "z_loss", "logit_softcap"))
    t = w * ((1 - e) * q + e / classes)
    total = t.sum(1)
    factor = v * sums * total
    t = t / torch.where(total == 0, 1, total)[:, None]
    norm = (v * w[y]).sum() if hard else v.sum()
    norm = options.get("num_items_in_batch", norm if "reduction" not in options else 1)

    def losses(n):
        s = F.linear(x, weight[n], bias[n])
        s = k * (s / k).tanh() if k else s
        return -(t * s.log_softmax(1)).sum(1) + z * s.logsumexp(1).square()

    own = torch.stack([losses(n) for n in range(n_clones)])
    each = -factor * torch.logsumexp(a[:, None] - own, 0) / norm
    value = each if options.get("reduction") == "none" else each.sum()
    upstream = torch.linspace(0.5, 1.5, len(x), dtype=torch.float64)
    upstream = upstream if value.dim() else torch.ones(len(x))
    (dx,) = torch.autograd.grad((each * upstream).sum(), x, retain_graph=True)
    own = (own * factor * upstream).sum(1) / norm
    dweight, dbias = torch.autograd.grad(own.sum(), (weight, bias))
    return value.detach(), dx, dweight, dbias


@pytest.mark.parametrize("name", testing.LOSS_CASES)
def test_formulas(backend, device, name):
    inputs, options = case(name, 11, 4, 5, 3, dtype=torch.float64)
    expected = formulas(inputs, options)
    inputs, options = to(device, inputs, options)
    loss, _, *grads = gradients(inputs, backend, **options)
    for got, want in zip((loss, *grads), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want)


# By hand: one clone of two classes with the probabilities 3/4 and 1/4, the first is the target.
BY_HAND = {
    "label smoothing": ({"label_smoothing": 0.5}, -0.75 * LOG(3 / 4) - 0.25 * LOG(1 / 4)),
    "class weights": ({"class_weight": [2.0, 1.0], "reduction": "sum"}, -2 * LOG(3 / 4)),
    "both": (
        {"class_weight": [2.0, 1.0], "label_smoothing": 0.5},
        (-0.75 * 2 * LOG(3 / 4) - 0.25 * LOG(1 / 4)) / 2,
    ),
    "z-loss": ({"z_loss": 0.5}, -LOG(3 / 4) + 0.5 * LOG(4) ** 2),
    "softcap": ({"logit_softcap": LOG(3)}, LOG(1 + 3 ** -math.tanh(1))),
    "sample weight": ({"sample_weight": [3.0], "reduction": "sum"}, -3 * LOG(3 / 4)),
    "num_items": ({"num_items_in_batch": 4}, -LOG(3 / 4) / 4),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(backend, device, name):
    options, expected = BY_HAND[name]
    options = {
        k: torch.tensor(v, device=device) if isinstance(v, list) else v for k, v in options.items()
    }
    x, a = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    weight = torch.tensor([[[LOG(3)], [0.0]]], device=device)
    y = torch.tensor([0], device=device)
    loss, own = switch_mixture_nll(x, weight, None, a, y, impl=backend, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    seen = LOG(1 + 3 ** -math.tanh(1)) if name == "softcap" else -LOG(3 / 4)
    assert own.item() == pytest.approx(seen, rel=1e-5)
