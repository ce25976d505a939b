"""Protects the heads with options of the loss: their constructor and forward, and whatever else computes with them.

- The loss is the op's, without weights that of clone_loss with torch's criterion, and with one clone torch's own.
- The switch's observation, statistics and predictions know of no option but the softcap, and that one everywhere:
  predictions, clones' outputs, clone_loss, collapsed models (log-likelihoods: test_log_likelihood.py).
- MixtureLoss, autocast, torch.compile, checkpoints, copies and checkpoints of state, warnings.
"""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from clones_harness import C, D, N, batch, classifier, concentrate, regressor, soft
from mixture_harness import NAN
from torch import nn
from torch.utils.checkpoint import checkpoint

from alrao_fast.functional import switch_mixture_nll
from alrao_fast.nn import AlraoModel, ClassifierClones, MixtureLoss

OP = "switch_mixture"
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25])
OPTIONS = {
    "label_smoothing": {"label_smoothing": 0.1},
    "class_weight": {"class_weight": WEIGHT},
    "z_loss": {"z_loss": 0.02},
    "logit_softcap": {"logit_softcap": 1.5},
    "all": {
        "label_smoothing": 0.1,
        "class_weight": WEIGHT,
        "z_loss": 0.02,
        "logit_softcap": 1.5,
    },
}
by_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def grads(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@by_option
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_the_loss_is_the_ops(options, reduction, probabilities):
    head = classifier(reduction=reduction, **options)
    concentrate(head, -1.0, -2.0, -1.5)
    posterior = head.switch.log_posterior.clone()
    x, y = batch(2, 5)
    y = soft(2, 5) if probabilities else y
    v = torch.rand(2, 5)
    loss = head(x, y, sample_weight=v)
    assert loss.shape == ((2, 5) if reduction == "none" else ())
    tensors = x, head.weight, head.bias
    expected, own = switch_mixture_nll(
        *tensors, posterior, y, sample_weight=v, reduction=reduction, **options
    )
    assert torch.equal(loss, expected)
    for got, want in zip(grads(loss.sum(), *tensors), grads(expected.sum(), *tensors)):
        assert torch.equal(got, want)
    torch.testing.assert_close(head.clone_metrics()["loss"], own)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_clone_loss_with_the_same_criterion(reduction):
    options = {"label_smoothing": 0.1, "z_loss": 0.02, "logit_softcap": 1.5}
    head = classifier(reduction=reduction, dtype=torch.float64, **options).eval()
    concentrate(head, -1.0, -2.0, -1.5)
    x, y = batch(7, dtype=torch.float64)

    def criterion(outputs):
        losses = F.cross_entropy(
            outputs.flatten(0, 1), y.repeat(N), label_smoothing=0.1, reduction="none"
        )
        return losses.view(N, 7) + 0.02 * outputs.logsumexp(-1).square()

    tensors = x, head.weight, head.bias
    loss, expected = head(x, y), head.clone_loss(x, criterion)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads(loss.sum(), *tensors), grads(expected.sum(), *tensors))


@by_option
def test_one_clone_is_torchs_cross_entropy(options):
    head = ClassifierClones(D, C, 1, dtype=torch.float64, **{**options, "z_loss": 0.0})
    x, y = batch(7, dtype=torch.float64)
    loss = head(x, y)
    k = head.logit_softcap
    logits = F.linear(x, head.weight[0], head.bias[0])
    logits = k * (logits / k).tanh() if k else logits
    weight = None if head.class_weight is None else head.class_weight
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, y, weight=weight, label_smoothing=head.label_smoothing)
    )


def test_weights_are_those_of_nll_loss():
    """They are factors around the mixture, not within it."""
    head = classifier(class_weight=WEIGHT, dtype=torch.float64).eval()
    concentrate(head, -1.0, -2.0, -1.5)
    x, y = batch(7, dtype=torch.float64)
    y[0] = -100
    weight = WEIGHT.double()
    for reduction in ("mean", "sum", "none"):
        expected = F.nll_loss(head(x), y, weight=weight, reduction=reduction)
        torch.testing.assert_close(head(x, y, reduction=reduction), expected)
    each = F.nll_loss(head(x), y, weight=weight, reduction="none")
    torch.testing.assert_close(head(x, y, num_items_in_batch=3), each.sum() / 3)
    v = torch.rand(7)
    torch.testing.assert_close(
        head(x, y, sample_weight=v, reduction="sum"), (each * v.double()).sum()
    )


@by_option
@pytest.mark.parametrize(
    "given",
    [{}, {"sample_weight": torch.arange(1, 8)}, {"num_items_in_batch": 3}, {"reduction": "none"}],
    ids=str,
)
def test_the_switch_observes_the_likelihood_alone(options, given):
    """To the last bit, but for the softcap, which is part of the model."""
    head = classifier(**options)
    plain = classifier(logit_softcap=options.get("logit_softcap"))
    x, y = batch(7)
    y[2] = -100
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(plain, name).copy_(getattr(head, name))
    for _ in range(3):
        head(x, y, **given)
        plain(x, y)
    for name in ("logw", "log_posterior", "t"):
        assert torch.equal(getattr(head.switch, name), getattr(plain.switch, name))
    assert torch.equal(head.running, plain.running)
    assert torch.equal(head(x), plain(x))


def test_micro_batches_make_one_step():
    head = classifier(dtype=torch.float64, label_smoothing=0.1, class_weight=WEIGHT).eval()
    x, y = batch(12, dtype=torch.float64)
    whole = grads(head(x, y, num_items_in_batch=12), head.weight, head.bias)
    for part in torch.arange(12).split([5, 1, 6]):
        head(x[part], y[part], num_items_in_batch=torch.tensor(12)).backward()
    torch.testing.assert_close((head.weight.grad, head.bias.grad), whole)


def test_softcap_is_the_models():
    k, head = 1.5, classifier(logit_softcap=1.5, dtype=torch.float64)
    concentrate(head, -1.0, -2.0, -1.5)
    x, _ = batch(2, 3, dtype=torch.float64)
    linear = torch.stack([F.linear(x, w, b) for w, b in zip(head.weight, head.bias)])
    outputs = k * (linear / k).tanh()
    torch.testing.assert_close(head.clone_outputs(x), outputs)
    posterior = head.switch.log_posterior.view(N, 1, 1, 1)
    expected = (posterior + outputs.log_softmax(-1)).logsumexp(0)
    torch.testing.assert_close(head(x), expected)
    upstream = torch.randn_like(expected)
    tensors = x, head.weight, head.bias
    torch.testing.assert_close(
        grads((head(x) * upstream).sum(), *tensors), grads((expected * upstream).sum(), *tensors)
    )


def test_a_dead_clone_shows_under_a_softcap():
    """The cap makes a number of an infinite output; it stays one."""
    head, x = classifier(logit_softcap=1.5), torch.randn(4, D)
    with torch.no_grad():
        head.weight[1, 0] = math.inf
    assert head.clone_outputs(x)[[0, 2]].isfinite().all()
    assert not head.clone_outputs(x)[1, :, 0].isfinite().any()
    y = torch.zeros(4, dtype=torch.int64)

    def criterion(outputs):
        losses = F.cross_entropy(outputs.flatten(0, 1), y.repeat(N), reduction="none")
        return losses.view(N, 4)

    for loss in (head(x, y), head.clone_loss(x, criterion)):
        head.weight.grad = None
        loss.backward()
        assert loss.isfinite() and head.weight.grad.isfinite().all()
        assert not head.weight.grad[1].any() and head.weight.grad[2].any()


@pytest.mark.parametrize("which", ["best", "mixture"])
def test_collapse_with_a_softcap(which):
    net = AlraoModel(nn.Linear(5, D), classifier(logit_softcap=1.5))
    x, y = torch.randn(6, 5), torch.randint(C, (6,))
    net(x, targets=y)
    made = net.eval().collapse(which, num_extras=0)
    if which == "mixture":
        torch.testing.assert_close(made(x), net(x))
        with torch.no_grad():
            net.head.weight[1, 0] = 1e38
        made = net.collapse(which)
        torch.testing.assert_close(made(1e3 * x), net(1e3 * x))
    else:
        best = net.posterior().argmax()
        outputs = net.head.clone_outputs(net.backbone(x))[best]
        torch.testing.assert_close(made(x), outputs.log_softmax(-1))


@by_option
def test_mixture_loss(options):
    net = AlraoModel(nn.Linear(5, D), classifier(**options))
    other = copy.deepcopy(net)
    criterion, x, v = MixtureLoss(net), torch.randn(6, 5), torch.rand(6)
    for y in (torch.randint(C, (6,)), soft(6)):
        for given in ({}, {"num_items_in_batch": 4}, {"reduction": "none", "sample_weight": v}):
            loss, expected = (
                criterion(net(x), y, **given),
                other.head(other.backbone(x), y, **given),
            )
            assert torch.equal(loss, expected)
            assert torch.equal(net.head.switch.logw, other.head.switch.logw)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_mixture_loss_in_eval_mode_is_torchs(reduction, probabilities):
    """Of the log-probabilities themselves."""
    net = AlraoModel(nn.Linear(5, D), classifier(label_smoothing=0.1, class_weight=WEIGHT)).eval()
    net.head.reduction = reduction
    criterion, x = MixtureLoss(net), torch.randn(6, 5)
    y = soft(6) if probabilities else torch.tensor([0, 1, -100, 3, 2, 2])
    out = net(x)
    loss = criterion(out, y)
    expected = F.cross_entropy(out, y, weight=WEIGHT, label_smoothing=0.1, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    v = torch.rand(6)
    each = F.cross_entropy(out, y, weight=WEIGHT, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(criterion(out, y, sample_weight=v, reduction="none"), v * each)


def test_regressor():
    head = regressor(reduction="none", dtype=torch.float64)
    x, y = batch(2, 5, dtype=torch.float64)[0], torch.randn(2, 5, C)
    v = torch.rand(2, 5)
    each = head(x, y)
    assert each.shape == (2, 5)
    torch.testing.assert_close(head(x, y, reduction="mean"), each.mean(), rtol=0, atol=0.5)
    head.eval()
    each = head(x, y)
    torch.testing.assert_close(head(x, y, reduction="mean"), each.mean())
    torch.testing.assert_close(head(x, y, sample_weight=v), v.double() * each)
    weighted = head(x, y, sample_weight=v, reduction="mean")
    torch.testing.assert_close(weighted, (v.double() * each).sum() / v.double().sum())
    net = AlraoModel(nn.Identity(), head)
    criterion = MixtureLoss(net)
    assert criterion(net(x), y).shape == (2, 5)
    torch.testing.assert_close(
        criterion(net(x), y, sample_weight=v).sum(), (v * criterion(net(x), y)).sum()
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_losses_one_by_one_in_a_checkpoint(reentrant):
    net = AlraoModel(nn.Linear(5, D), classifier(reduction="none", label_smoothing=0.1))
    other = copy.deepcopy(net)
    x, y = torch.randn(6, 5, requires_grad=True), torch.randint(C, (6,))
    for _ in range(2):
        net.zero_grad(), other.zero_grad()
        checkpoint(
            lambda x: net(x, targets=y).square().sum(), x, use_reentrant=reentrant
        ).backward()
        other(x, targets=y).square().sum().backward()
        for (name, p), q in zip(net.named_parameters(), other.parameters()):
            assert torch.equal(p.grad, q.grad), name
        assert torch.equal(net.head.switch.logw, other.head.switch.logw)
    assert net.head.switch.t == 3


def test_losses_one_by_one_wait_for_their_backward():
    """What the switch observes in between is no part of it."""
    head = classifier(reduction="none", dtype=torch.float64)
    other = copy.deepcopy(head)
    concentrate(head, -1.0, -2.0, -1.5), concentrate(other, -1.0, -2.0, -1.5)
    x, y = batch(6, dtype=torch.float64)
    losses = head(x, y)
    head(x, y), head(x, y.flip(0))
    found = grads(losses.sum(), x, head.weight)
    torch.testing.assert_close(found, grads(other(x, y, reduction="sum"), x, other.weight))


@pytest.mark.parametrize("given", [{}, {"reduction": "none"}, {"num_items_in_batch": 5}], ids=str)
def test_autocast(given):
    """The kernels compute in float32, from features of bfloat16."""
    head, v = classifier(**OPTIONS["all"]), torch.rand(6)
    x, y = batch(6)
    with torch.autocast("cpu", torch.bfloat16):
        features = F.linear(x, torch.eye(D))
        assert features.dtype == torch.bfloat16
        loss = head(features, y, sample_weight=v, **given)
    assert loss.dtype == torch.float32
    wide = features.detach().float().requires_grad_()
    other = copy.deepcopy(head).eval()
    other.switch.reset_parameters()
    expected = other(wide, y, sample_weight=v, **given)
    torch.testing.assert_close(loss, expected)
    found = grads(loss.sum(), features, head.weight)
    want = grads(expected.sum(), wide, other.weight)
    torch.testing.assert_close(found[0], want[0].bfloat16())
    torch.testing.assert_close(found[1], want[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_training_step(reduction):
    net = AlraoModel(nn.Linear(5, D), classifier(reduction=reduction, **OPTIONS["all"]))
    other = copy.deepcopy(net)
    x, y = torch.randn(6, 5), torch.randint(C, (6,))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(x, targets=y).sum().backward(), other(x, targets=y).sum().backward()
    for (name, p), q in zip(net.named_parameters(), other.named_parameters()):
        torch.testing.assert_close(p.grad, q[1].grad, msg=name)
    torch.testing.assert_close(net.head.switch.logw, other.head.switch.logw)


def test_state():
    head, plain = classifier(class_weight=WEIGHT), classifier()
    assert "class_weight" in head.state_dict() and "class_weight" not in plain.state_dict()
    assert head.class_weight is not WEIGHT and head.class_weight.dtype == torch.float32
    head.half()
    assert head.class_weight.dtype == torch.float32
    other = classifier(class_weight=torch.ones(C))
    other.load_state_dict(head.float().state_dict())
    assert torch.equal(other.class_weight, WEIGHT)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).class_weight, WEIGHT)
    assert torch.equal(copy.deepcopy(head).class_weight, WEIGHT)
    assert classifier(class_weight=WEIGHT, dtype=torch.float64).class_weight.dtype == torch.float64


def test_repr():
    head = classifier(**OPTIONS["all"])
    shown = "label_smoothing=0.1, z_loss=0.02, logit_softcap=1.5, class_weight=[4]"
    assert shown in repr(head)
    assert "softcap" not in repr(classifier())


WRONG = {
    "label_smoothing": [("a", TypeError), (1.5, ValueError), (None, TypeError)],
    "z_loss": [(-1, ValueError), (math.inf, ValueError), ("a", TypeError)],
    "logit_softcap": [(0, ValueError), (-1.0, ValueError), ("a", TypeError)],
    "class_weight": [
        ([1.0] * C, TypeError),
        (torch.ones(C + 1), ValueError),
        (-WEIGHT, ValueError),
        (torch.zeros(C), ValueError),
    ],
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, i) for name, values in WRONG.items() for i in range(len(values))]
)
def test_wrong_options(name, wrong):
    value, error = WRONG[name][wrong]
    with pytest.raises(error, match=rf"^{name}: got .*expected"):
        classifier(**{name: value})


def test_nothing_to_weigh():
    head, x = classifier(), torch.randn(3, D)
    for given in (
        {"sample_weight": torch.ones(3)},
        {"num_items_in_batch": 2},
        {"reduction": "sum"},
    ):
        (name,) = given
        with pytest.raises(ValueError, match=f"{name}: got .* without targets, expected None"):
            head(x, **given)
    before = head.switch.t.clone()
    y = torch.zeros(3, dtype=torch.int64)
    for given in (
        {"sample_weight": torch.ones(2)},
        {"num_items_in_batch": 0},
        {"reduction": "average"},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(given))}: got"):
            head(x, y, **given)
    assert torch.equal(head.switch.t, before)


def test_warnings_look_at_what_counts():
    head, x = classifier(reduction="none"), torch.randn(4, D)
    x[1] = NAN
    y, v = torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 0, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(x, y, sample_weight=v)
    with torch.no_grad():
        head.weight.fill_(NAN)
    with pytest.warns(RuntimeWarning, match="every clone is dead for a sample"):
        head(x, y, sample_weight=v)
    soft = torch.eye(4, C) * v.unsqueeze(1)
    fresh = classifier()
    with pytest.warns(RuntimeWarning, match="1 of 4 samples have features that"):
        fresh(x, torch.eye(4, C))
    with torch.no_grad():
        fresh.weight.fill_(NAN)
    with pytest.warns(RuntimeWarning, match="every clone is dead for a sample"):
        fresh(x, soft)
