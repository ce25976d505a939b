"""Protects the heads as modules: initial values, sizes, dtypes, the meta device, copies, state_dict, messages, repr."""

import copy
import math
import pickle

import pytest
import torch
from clones_harness import (
    C,
    D,
    N,
    assert_same,
    batch,
    classifier,
    regressor,
    state,
)
from torch import nn

from alrao_fast.nn import ClassifierClones, RegressorClones

OP = "switch_mixture"

pytestmark = pytest.mark.usefixtures("used_backend", "used_device")


@pytest.mark.parametrize("make", [ClassifierClones, RegressorClones])
@pytest.mark.parametrize("bias", [True, False])
def test_initial_values_are_those_of_linear_layers(make, bias):
    torch.manual_seed(3)
    head = make(D, C, N, bias)
    torch.manual_seed(3)
    layers = [nn.Linear(D, C, bias) for _ in range(N)]
    for n, layer in enumerate(layers):
        assert torch.equal(head.weight[n], layer.weight)
        assert not bias or torch.equal(head.bias[n], layer.bias)
    assert bias or head.bias is None


@pytest.mark.parametrize("make", [ClassifierClones, RegressorClones])
def test_number_of_parameters(make):
    def count(num_clones):
        return sum(p.numel() for p in make(D, C, num_clones).parameters())

    assert count(1) == sum(p.numel() for p in nn.Linear(D, C).parameters())
    assert count(7) - count(1) == 6 * (D * C + C)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_keeps_the_state(backend, dtype):
    head = classifier()
    x, y = batch(5)
    head(x, y)
    head.clone_lr.copy_(torch.tensor([1e-5, 1e-2, 10.0]))
    before = state(head)
    head.to(dtype)
    assert head.weight.dtype == dtype
    assert [b.dtype for b in head.buffers()] == [b.dtype for b in before]
    assert_same(state(head), before)
    loss = head(x.to(dtype), y)
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert head.weight.grad.dtype == dtype
    assert head(x.to(dtype)).dtype == loss.dtype


def test_features_of_another_dtype(backend):
    """As under autocast: bfloat16 features, float32 clones."""
    head = classifier()
    x, y = batch(5)
    low = x.detach().bfloat16().requires_grad_()
    loss = head(low, y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, head.eval()(low.float(), y), rtol=0.2, atol=0)


def test_meta_device_then_reset():
    with torch.device("meta"):
        head = classifier()
    assert all(t.is_meta for t in (*head.parameters(), *head.buffers()))
    head.to_empty(device="cpu")
    torch.manual_seed(0)
    head.reset_parameters()
    torch.manual_seed(0)
    fresh = classifier()
    assert_same(head.parameters(), fresh.parameters())
    assert torch.equal(head.switch.logw, fresh.switch.logw)
    assert head.clone_lr.isnan().all() and head.clone_lr.dtype == torch.float32
    assert not head.running.any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [classifier, regressor])
def test_copies(make, duplicate):
    head = make()
    x, y = batch(5)
    y = y if make is classifier else torch.randn(5, C)
    head(x, y)
    other = duplicate(head)
    assert_same(state(other), state(head))
    assert torch.equal(other(x, y), head(x, y))
    assert_same(state(other), state(head))


def test_state_dict():
    head = classifier()
    assert set(head.state_dict()) == {
        "weight",
        "bias",
        "clone_lr",
        "switch.logw",
        "switch.log_posterior",
        "switch.t",
    }
    with pytest.raises(RuntimeError, match=r"size mismatch for switch\.logw"):
        head.load_state_dict(ClassifierClones(D, C, N + 1).state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierClones(0, 2), "in_features: got 0, expected an integer, at least 1"),
        (
            lambda: ClassifierClones(2, 2, ignore_index=2**63),
            "ignore_index: got 9223372036854775808, expected an integer of 64 bits",
        ),
        (lambda: ClassifierClones(2, 0), "num_classes: got 0"),
        (lambda: ClassifierClones(2, 2, 0), "num_clones: got 0"),
        (lambda: RegressorClones(2, -1), "out_features: got -1"),
        (
            lambda: RegressorClones(2, 1, sigma2=0.0),
            "sigma2: got 0.0, expected a finite variance > 0",
        ),
        (lambda: RegressorClones(2, 1, sigma2=math.nan), "sigma2: got nan"),
        (lambda: classifier(theta=1.5), "theta: got 1.5"),
        (lambda: classifier(evidence="max"), "evidence: got 'max', expected 'mean' or 'sum'"),
        (
            lambda: regressor(reduction="average"),
            "reduction: got 'average', expected 'mean', 'sum' or 'none'",
        ),
        (lambda: classifier(memory_budget=0), "memory_budget: got 0"),
        (
            lambda: classifier()(torch.randn(2, 5, D), torch.zeros(5, 2, dtype=torch.long)),
            r"target: got shape \[5, 2\], expected \[2, 5\], that of x without the features, its last dimension",
        ),
        (
            lambda: regressor()(torch.randn(5, D), torch.randn(5)),
            r"target: got shape \[5\], expected \[5, 4\]",
        ),
    ],
)
def test_invalid(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_repr():
    assert repr(classifier(bias=False)).splitlines()[1].strip() == (
        "in_features=6, num_classes=4, num_clones=3, bias=False"
    )
    assert "out_features=4, num_clones=3, bias=True, sigma2=2.0" in repr(regressor(sigma2=2.0))
