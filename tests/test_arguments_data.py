"""Data of another kind, in every backend: what is no tensor, is sparse, or has no values is named."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import alrao_fast as alrao
from alrao_fast import backends, compat, functional
from alrao_fast.ops.switch_update import switch_observe_

BACKENDS = ["cpu", "reference"]
X, WEIGHT, BIAS = torch.randn(5, 3), torch.randn(2, 4, 3), torch.randn(2, 4)
LOG_POSTERIOR = torch.full((2,), -math.log(2), dtype=torch.float64)
CLASSES, VALUES = torch.tensor([0, 1, 2, 3, 0]), torch.randn(5, 4)
ODD = {
    "sparse": (lambda t: t.to_sparse(), RuntimeError, "got layout torch.sparse_coo, expected"),
    "compressed": (
        lambda t: (t if t.dim() == 2 else t.reshape(1, -1)).to_sparse_csr(),
        RuntimeError,
        "got layout torch.sparse_csr, expected",
    ),
    "numpy": (lambda t: t.numpy(), TypeError, r"got .*, expected a tensor"),
    "list": (lambda t: t.tolist(), TypeError, r"got .*, expected a tensor"),
}
odd = pytest.mark.parametrize(("change", "error", "said"), ODD.values(), ids=ODD)
backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@odd
@backend
@pytest.mark.parametrize(
    ("op", "target"),
    [
        (functional.switch_mixture_nll, CLASSES),
        (functional.switch_mixture_gaussian_nll, VALUES),
        (functional.switch_mixture_log_prob, None),
        (functional.switch_mixture_mean, None),
    ],
)
def test_mixture(op, target, backend, change, error, said):
    good = {"x": X, "weight": WEIGHT, "bias": BIAS, "log_posterior": LOG_POSTERIOR}
    good |= {} if target is None else {"target": target}
    for name, tensor in good.items():
        with pytest.raises(error, match=f"^{name}: {said}"):
            op(**{**good, name: change(tensor)}, impl=backend)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@odd
@backend
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (lambda: alrao.ClassifierClones(3, 4, 2), CLASSES),
        (lambda: alrao.RegressorClones(3, 4, 2), VALUES),
    ],
)
def test_heads(make, targets, backend, change, error, said):
    head = make()
    criterion = alrao.MixtureLoss(head)
    with alrao.use_backend(backend):
        for features, given, name in ((change(X), targets, "x"), (X, change(targets), "target")):
            with pytest.raises(error, match=f"^{name}: {said}"):
                head(features, given)
        with pytest.raises(error, match=f"^x: {said}"):
            head.eval()(change(X))
        with pytest.raises(error, match=f"^features: {said}"):
            head.clone_loss(change(X), lambda out: out.sum(-1))
        prediction = head(X)
        for one, other, name in (
            (change(prediction.detach()), targets, "prediction"),
            (prediction, change(targets), "targets"),
        ):
            with pytest.raises(error, match=f"^{name}: {said}"):
                criterion(one, other)
    assert int(head.switch.t) == 1


@odd
@backend
def test_switch(backend, change, error, said):
    switch = alrao.Switch(3)
    with alrao.use_backend(backend), pytest.raises(error, match=f"^log_likelihood: {said}"):
        switch.update(change(torch.zeros(3)))
    assert int(switch.t) == 1


@backend
@pytest.mark.parametrize("observe", [False, True])
def test_the_tensor_of_another_number_of_clones(backend, observe):
    logw, log_posterior = torch.zeros(2, 3).double(), torch.zeros(3).double()
    good = {"logw": logw, "log_posterior": log_posterior, "t": torch.tensor(1)}
    if observe:
        good |= {"running": torch.zeros(3, 3).double(), "stats": torch.ones(3, 3).double()}
        op = switch_observe_
    else:
        good["log_likelihood"], op = torch.zeros(3), functional.switch_update_
    for name, tensor in good.items():
        if name != "t":
            wrong = torch.cat([tensor, tensor[..., :1]], -1)
            with pytest.raises(
                RuntimeError, match=rf"^{name}: got shape \[.*4\], expected \[.*3\]"
            ):
                op(**{**good, name: wrong}, impl=backend)


def lists(kind):
    params = [torch.ones(3, 2), torch.ones(4)]
    good = {
        "params": params,
        "grads": [torch.ones_like(p) for p in params],
        "rates": [torch.ones(3), torch.ones(4)],
        "steps": torch.tensor([1, 1]),
    }
    names = ["momentum_buffers"] if kind == "sgd" else ["exp_avgs", "exp_avg_sqs"]
    return good | {name: [torch.ones_like(p) for p in params] for name in names}


ENTRIES = {
    "none": (lambda t: None, TypeError, "got None, expected a tensor"),
    "text": (lambda t: "t", TypeError, "got 't', expected a tensor"),
    "nested": (lambda t: [t], TypeError, r"got \[.*, expected a tensor"),
    "numpy": (lambda t: t.numpy(), TypeError, r"got array\(.*, expected a tensor"),
    "meta": (lambda t: t.to("meta"), RuntimeError, "is on meta, expected a tensor with data"),
    "sparse": (lambda t: t.to_sparse(), RuntimeError, "is sparse.*, expected an ordinary"),
}


@backend
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_feature_lists(kind, backend):
    op = functional.feature_sgd_ if kind == "sgd" else functional.feature_adam_
    options = {"impl": backend} | ({"momentum": 0.5} if kind == "sgd" else {})
    good = lists(kind)
    for name in [name for name in good if name != "steps"]:
        for wrong in (None, 3, "text", {"a": 1}, torch.ones(2, 3)):
            if wrong is None and name == "momentum_buffers":
                continue
            with pytest.raises(TypeError, match=f"^feature_{kind}_: {name}: got .*expected a list"):
                op(**{**good, name: wrong}, **options)
        for change, error, said in ENTRIES.values():
            entries = [good[name][0], change(good[name][1])]
            with pytest.raises(error, match=rf"^feature_{kind}_: {name}\[1\]:? {said}"):
                op(**{**good, name: entries}, **options)
    with pytest.raises(TypeError, match=f"^feature_{kind}_: steps: got 'a', expected a tensor"):
        op(**{**good, "steps": "a"}, **options)
    for name in ("inners", "seeds"):
        with pytest.raises(
            TypeError, match=rf"^feature_{kind}_: {name}\[0\]: got 'a', expected an"
        ):
            op(**good, **{name: ["a", 1]}, **options)
    for name in ("lr", "grad_scale", "found_inf"):
        for wrong in (torch.ones((), device="meta"), torch.ones(1).to_sparse()):
            with pytest.raises(ValueError, match=f"^{name}: got a tensor of shape .*expected"):
                op(**good, **{name: wrong}, **options)
    assert all(torch.equal(p, torch.ones_like(p)) for p in good["params"])
    op(**{k: tuple(v) if isinstance(v, list) else v for k, v in good.items()}, **options)
    assert not any(torch.equal(p, torch.ones_like(p)) for p in good["params"])


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (None, "got None, expected a function"),
        ("mse", "got 'mse', expected a function"),
        (nn.CrossEntropyLoss, "returned a CrossEntropyLoss, expected a tensor of real losses"),
        (lambda out: None, "returned None, expected a tensor"),
        (lambda out: 1.0, "returned 1.0, expected a tensor"),
        (lambda out: [1.0], r"returned \[1.0\], expected a tensor"),
        (lambda out: out.sum(-1).to(torch.complex64), "returned a tensor of .*complex64"),
        (lambda out: out.sum(-1).to_sparse(), "returned a tensor of .*sparse"),
    ],
)
def test_criterion(criterion, message):
    head = alrao.ClassifierClones(3, 4, 2)
    with pytest.raises(TypeError, match=f"^criterion: {message}"):
        head.clone_loss(X, criterion)
    assert int(head.switch.t) == 1


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("value", "got"),
    [
        ((), r"\(\)"),
        (None, "None"),
        (X.numpy(), "a numpy.ndarray of shape"),
        (3.0, "3.0"),
        ("x", "'x'"),
        ([None], r"a list of None, \.\.\."),
        (
            {"logits": X, "hidden": X},
            r"a dict of logits: a tensor .*, hidden: a tensor",
        ),
        ((None, X), "a tuple of None, ..."),
    ],
)
def test_what_a_backbone_returns(value, got, training):
    net = alrao.AlraoModel(Returns(value), alrao.ClassifierClones(3, 4, 2)).train(training)
    for targets in (CLASSES, None):
        with pytest.raises(
            TypeError, match=rf"^backbone: the Returns returned {got}.*expected fea"
        ):
            net(X, targets=targets)


@pytest.mark.parametrize("backbone", [None, "resnet", nn.Linear, len])
def test_backbone(backbone):
    with pytest.raises(TypeError, match=r"^backbone: got .*, expected a torch.nn.Module"):
        alrao.AlraoModel(backbone, alrao.ClassifierClones(3, 4, 2))


def test_params_and_samplers():
    net = nn.Linear(3, 2)
    with pytest.raises(
        TypeError, match=r"^sampler: got <class .*LogUniform'>, expected LogUniform\("
    ):
        alrao.AlraoSGD(net, sampler=alrao.LogUniform)
    for returned in (torch.ones(2).to_sparse(), torch.ones(2, device="meta")):
        with pytest.raises(ValueError, match=r"^sampler .* returned a tensor of shape"):
            alrao.AlraoSGD([net.bias], sampler=lambda n, g, r=returned: r)
    with pytest.raises(TypeError, match=r"^name of params\[1\]: got 3, expected a string"):
        alrao.AlraoAdam([("weight", net.weight), (3, net.bias)])
    for without in (nn.ReLU(), [nn.ReLU()]):
        with pytest.raises(ValueError, match=r"^params: got .*ReLU.*, expected at least one"):
            alrao.AlraoSGD(without)
    sparse = nn.Module()
    sparse.weight = nn.Parameter(torch.eye(2).to_sparse())
    for params in (sparse, [sparse.weight]):
        with pytest.raises(
            ValueError, match=r"^parameter '.*' .*has layout torch.sparse_coo, expec"
        ):
            alrao.AlraoSGD(params)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (dict, "the rule <class 'dict'> cannot be called with the module, expected a function"),
        (lambda: None, "the rule .* cannot be called with the module, expected a function"),
        (lambda m: {3: alrao.Feature()}, r"returned \{3: .*, expected a dict"),
        (lambda m: len(3), "has no len"),
    ],
)
def test_layout_rules(rule, message):
    alrao.register_feature_layout(Dense, rule)
    try:
        with pytest.raises(TypeError, match=message):
            alrao.AlraoSGD(Dense())
    finally:
        alrao.register_feature_layout(Dense, None)
    with pytest.raises(
        ValueError, match=r"^feature_of: got a tensor .* on meta, expected an int64"
    ):
        alrao.Feature(feature_of=torch.zeros(3, dtype=torch.int64, device="meta"))


def test_numbers_and_words():
    for wrong in ({}, np.array(["a", "b"]), None, 3):
        with pytest.raises(TypeError, match=r"^op: got .*, expected one of"):
            backends.status(wrong, "cpu")
        with pytest.raises(TypeError, match=r"^backend: got .*, expected one of"):
            backends.status("switch_update", wrong)
        with pytest.raises(
            (TypeError, ValueError), match=r"^mode: got .*, expected 'min' or 'max'"
        ):
            compat.EarlyStopping(mode=wrong)
    for make in (compat.L2LossLog, compat.L2LossAdditional):
        for wrong in (b"1", {1.0}, None, torch.ones((), device="meta"), torch.ones(1).to_sparse()):
            with pytest.raises(TypeError, match=r"^sigma2: got .*, expected a finite variance > 0"):
                make(sigma2=wrong)


def test_rank():
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    models = {"a": lambda: nn.Linear(3, 2)}
    meta = [tuple(part.to("meta") for part in batches[0])]
    for name, wrong in (("train", meta), ("valid", meta)):
        given = {"train": batches, "valid": batches, name: wrong}
        with pytest.raises(ValueError, match=f"^{name}: a batch holds a tensor on meta, expected"):
            alrao.rank(models, num_classes=2, epochs=1, **given)
    with pytest.raises(
        TypeError, match=r"^clip_grad_norm: got a tensor of shape .* on meta, expec"
    ):
        norm = torch.ones((), device="meta")
        alrao.rank(models, batches, batches, num_classes=2, epochs=1, clip_grad_norm=norm)
