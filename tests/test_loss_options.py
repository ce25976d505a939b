"""Protects the options of the mixture's loss, on every backend that is available.

- Every option alone and together, over shapes, dtypes and memory budgets: error budgets against float64; dead clones.
- The meaning of each: torch's F.cross_entropy where there is one clone, the formulas where there are more.
- What is observed: the likelihood of the data, whatever the loss is made of.
"""

import pytest
import torch
import torch.nn.functional as F
from mixture_harness import (
    SHAPES,
    TILED_SHAPES,
    assert_budget,
    gradients,
    skip_without_options,
)

from alrao_fast import testing

OP = "switch_mixture"
pytestmark = pytest.mark.emulated
# One of each way through the kernels, and the smallest.
OPTION_SHAPES = [
    "one of everything",
    "one class",
    "ragged lanes, joint",
    "joint, many chunks",
    "streamed, ragged last block",
]
COMBINED = [name for name in testing.LOSS_CASES if name.startswith("all")]


def case(name, *sizes, device="cpu", **kwargs):
    return testing.loss_case(name, testing.mixture_inputs(*sizes, device=device, **kwargs))


@pytest.mark.interpreted(shape=["one class", "ragged lanes, joint"])
@pytest.mark.sanitized(shape=["ragged lanes, joint", "streamed, ragged last block"])
@pytest.mark.parametrize("shape", OPTION_SHAPES)
@pytest.mark.parametrize("name", testing.LOSS_CASES)
def test_error_budgets(backend, device, name, shape):
    *sizes, memory_budget = SHAPES[shape]
    inputs, options = case(name, *sizes, device=device)
    skip_without_options(backend)
    assert_budget(inputs, backend, memory_budget=memory_budget, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", TILED_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", COMBINED)
def test_error_budgets_of_dtypes(backend, device, name, dtype, shape, bias):
    *sizes, _ = SHAPES[shape]
    inputs, options = case(name, *sizes, device=device, dtype=dtype, bias=bias)
    skip_without_options(backend)
    assert_budget(inputs, backend, **options)


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
    on_device = type(inputs)(*(t.to(device) for t in inputs))
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    skip_without_options(backend)
    loss, _, dx, dweight, dbias = gradients(on_device, backend, **options)
    for got, want in zip((loss, dx, dweight[0], dbias[0]), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want)
