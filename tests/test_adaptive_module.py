"""Protects the head of an adaptive softmax as a part of networks: with optimizers, criteria, wrappers and checkpoints.

- Rates: clone n's, for all of its parts; clipping by clone; metrics, averages, collapsed networks, `rank`.
- MixtureLoss, log_likelihood, clone_outputs and clone_loss say the same as the loss and the log-probabilities.
- Autocast, parameters in bfloat16, torch.compile, activation checkpoints, copies, state_dict, two processes.
- Messages for cutoffs, options and targets that there are not; ranks over which it cannot lie.
"""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from clones_harness import assert_same, state
from torch import nn
from torch.utils.checkpoint import checkpoint

import alrao_fast as alrao
from alrao_fast.distributed import ClassesParallel, ClonesParallel
from alrao_fast.nn import AdaptiveClassifierClones, AlraoModel, MixtureLoss

D, C, N, CUTOFFS = 12, 30, 3, [5, 6, 17]


def make(**arguments):
    torch.manual_seed(0)
    return AdaptiveClassifierClones(D, C, CUTOFFS, N, 1.7, **arguments)


def make_model(**arguments):
    head = make(**arguments)
    return AlraoModel(nn.Sequential(nn.Linear(4, D), nn.Tanh()), head)


def batch(*shape, width=D):
    torch.manual_seed(1)
    return torch.randn(*shape, width), torch.randint(C, shape)


def step(net, opt, x, y):
    opt.zero_grad()
    loss = net(x, targets=y)
    loss.backward()
    opt.step()
    return loss


def test_rates_are_the_clones(capsys):
    net = make_model(head_bias=True)
    opt = alrao.AlraoSGD(net, lr_range=(1e-3, 10.0))
    before = [p.detach().clone() for p in net.head.parameters()]
    step(net, opt, *batch(9, width=4))
    rates = torch.tensor([1e-3, 0.1, 10.0])
    for old, p in zip(before, net.head.parameters(), strict=True):
        expected = old - rates.view(-1, *[1] * (p.dim() - 1)) * p.grad
        torch.testing.assert_close(p.detach(), expected)
    torch.testing.assert_close(net.head.clone_lr, rates)
    rows = [row for row in alrao.describe_rates(net, file=None) if row.parameter.startswith("head")]
    assert len(rows) == 8 and {row.kind for row in rows} == {"clone"}


def test_a_training():
    net = make_model()
    opt = alrao.AlraoAdam(net, total_steps=40)
    x, y = batch(60, width=4)
    first = step(net, opt, x, y)
    for _ in range(39):
        last = step(net, opt, x, y)
    assert last < 0.7 * first
    assert net.head.switch.t == 41
    with opt.averaged():
        assert net.eval()(x, targets=y) < 0.7 * first
    found = alrao.metrics(net, opt)
    assert {"alrao/best_greedy_accuracy", "alrao/loss/2"} <= set(found)
    assert net.suggested_lr() > 0
    again = copy.deepcopy(net)
    for which in ("best", "mixture"):
        plain = net.collapse(which)
        assert not any(type(m).__module__.startswith("alrao") for m in plain.modules())
        if which == "mixture":
            torch.testing.assert_close(plain(x), net(x))
            continue
        assert isinstance(plain.head, nn.AdaptiveLogSoftmaxWithLoss)
        best = net.posterior().argmax()
        torch.testing.assert_close(plain(x), net.head.clone_outputs(net.backbone(x))[best])
        torch.testing.assert_close(
            plain.head(plain.backbone(x), y).output, plain(x).gather(1, y.unsqueeze(1)).squeeze(1)
        )
    assert_same(state(again.head), state(net.head))


def test_collapse_leaves_out_the_dead():
    net = make_model(head_bias=True).bfloat16()
    x, y = batch(2, 7, width=4)
    x = x.bfloat16()
    net(x, targets=y)
    net.head.switch.update(torch.tensor([0.0, 9.0, 1.0], dtype=torch.float64))
    with torch.no_grad():
        net.head.tail[1].weight[1, 0, 0] = math.nan
        net.head.tail[2].weight[2] = 3e38
        net.head.tail[2].projection[2] = 3e38
    net.eval()
    assert len(list(net.collapse("mixture").head.children())) == 2
    torch.testing.assert_close(net.collapse("mixture")(x), net(x))
    torch.testing.assert_close(net.collapse("best").head.head.bias, net.head.bias[0].float())


def test_clipping_is_by_clone():
    net = make_model()
    x, y = batch(20, width=4)
    net(x, targets=y).backward()
    own = [
        math.sqrt(sum(p.grad[n].double().square().sum() for p in net.head.parameters()))
        for n in range(N)
    ]
    backbone, (clones,) = alrao.grad_norms(net)
    torch.testing.assert_close(clones, torch.tensor(own, dtype=torch.float64))
    alrao.clip_grad_norm_(net, 0.01)
    clipped = alrao.grad_norms(net)
    limit = torch.full((N,), 0.01, dtype=torch.float64)
    torch.testing.assert_close(clipped.clones[0], limit.minimum(clones), rtol=1e-3, atol=1e-5)
    assert backbone > 0.01 >= clipped.backbone


def test_mixture_loss():
    net = make_model(ignore_index=3)
    criterion = MixtureLoss(net)
    x, y = batch(12, width=4)
    same = copy.deepcopy(net)
    loss, right = criterion(net(x), y), same(x, targets=y)
    loss.backward()
    right.backward()
    assert_same([loss, *state(net.head)], [right, *state(same.head)])
    assert_same([p.grad for p in net.parameters()], [p.grad for p in same.parameters()])
    net.eval(), same.eval()
    torch.testing.assert_close(criterion(net(x), y), same(x, targets=y))


def test_log_likelihood_and_outputs():
    head = make(ignore_index=3, memory_budget=2000).eval()
    head.switch.update(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    x, y = batch(4, 6)
    y[0] = 3
    x.requires_grad_()
    log_prob, entropy = head.log_likelihood(x, y)
    losses = head(x, y, reduction="none")
    torch.testing.assert_close(-log_prob, losses)
    every = head(x)
    right = torch.where(y == 3, 0, -(every.exp() * every).sum(-1))
    torch.testing.assert_close(entropy, right)
    torch.testing.assert_close(
        *(torch.autograd.grad(e.sum(), x, retain_graph=True)[0] for e in (entropy, right))
    )
    outputs = head.clone_outputs(x)
    assert outputs.shape == (N, 4, 6, C)
    a = head.switch.log_posterior.view(-1, 1, 1, 1)
    torch.testing.assert_close((a + outputs).logsumexp(0).float(), every)


@pytest.mark.parametrize("dead", [False, True])
def test_clone_loss_of_the_same_criterion(dead):
    heads = make(head_bias=True), make(head_bias=True)
    x, y = batch(14)
    # What a criterion gets is of all tails.
    y = y.clamp(min=CUTOFFS[2]) if dead else y
    index = y.expand(N, -1).unsqueeze(2)
    results = []
    for head, run in zip(
        heads,
        (
            lambda head, x: head.clone_loss(x, lambda out: -out.gather(2, index).squeeze(2)),
            lambda head, x: head(x, y),
        ),
    ):
        if dead:
            with torch.no_grad():
                head.tail[2].weight[1] = math.nan
        features = x.clone().requires_grad_()
        loss = run(head, features)
        loss.backward()
        results.append([loss, features.grad, *(p.grad for p in head.parameters())])
        assert all(g.isfinite().all() for g in results[-1])
    for found, right in zip(*results):
        torch.testing.assert_close(found, right)
    torch.testing.assert_close(heads[0].switch.log_posterior, heads[1].switch.log_posterior)


def test_autocast_computes_in_the_parameters_dtype():
    net, x, y = make_model(), *batch(12, width=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = net.backbone(x)
        assert features.dtype == torch.bfloat16
        loss = net.head(features, y)
        loss.backward()
    net.eval()
    right = net.head(features.detach().float(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net.head(features).detach(), net.head(features.float()).detach())
    fresh = make_model()
    assert torch.equal(loss, fresh.head(features.detach().float(), y))
    assert right.dtype == loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    head = make(head_bias=True).to(dtype)
    wide = copy.deepcopy(head).double()
    x, y = batch(12)
    x = x.to(dtype).requires_grad_()
    loss = head(x, y)
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    y64 = x.detach().double().requires_grad_()
    right = wide(y64, y)
    right.backward()
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=0)
    for p, q in zip((x, *head.parameters()), (y64, *wide.parameters()), strict=True):
        assert p.grad.dtype == dtype
        torch.testing.assert_close(p.grad, q.grad.to(dtype), rtol=2e-2, atol=1e-5)
    assert head.eval()(x).dtype == loss.dtype


def test_compiled_with_a_break_at_the_loss():
    net, same = make_model(), make_model()
    x, y = batch(12, width=4)
    compiled = torch.compile(net, backend="eager")
    for _ in range(2):
        loss, right = compiled(x, targets=y), same(x, targets=y)
        loss.backward()
        right.backward()
        torch.testing.assert_close(loss, right)
    assert_same([p.grad for p in net.parameters()], [p.grad for p in same.parameters()])
    assert_same(state(net.head), state(same.head))
    net.eval(), same.eval()
    torch.testing.assert_close(torch.compile(net, backend="eager")(x), same(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoint(use_reentrant):
    net, same = make_model(), make_model()
    x, y = batch(12, width=4)
    x.requires_grad_()
    for _ in range(2):
        loss = checkpoint(lambda x: net(x, targets=y), x, use_reentrant=use_reentrant)
        right = same(x, targets=y)
        loss.backward()
        right.backward()
    assert_same([p.grad for p in net.parameters()], [p.grad for p in same.parameters()])
    assert_same(state(net.head), state(same.head))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_state_dict(duplicate):
    head, x, y = make(head_bias=True), *batch(6)
    head(x, y)
    other = duplicate(head)
    fresh = AdaptiveClassifierClones(D, C, CUTOFFS, N, 1.7, True)
    fresh.load_state_dict(head.state_dict())
    assert set(head.state_dict()) - set(nn.Module.state_dict(head.switch, prefix="switch.")) == {
        "weight",
        "bias",
        "clone_lr",
        *(f"tail.{k}.{name}" for k in range(3) for name in ("projection", "weight")),
    }
    for same in (other, fresh):
        same.eval()
        assert torch.equal(same(x), head.eval()(x))
    with torch.device("meta"):
        empty = AdaptiveClassifierClones(D, C, CUTOFFS, N, 1.7, True)
    torch.manual_seed(0)
    empty.to_empty(device="cpu").reset_parameters()
    assert_same(empty.parameters(), make(head_bias=True).parameters())


def test_rank_counts_as_a_classifier():
    x, y = batch(40, width=4)
    loader = [(x, y)]
    ranking = alrao.rank(
        {"a": lambda: nn.Linear(4, D)},
        loader,
        loader,
        head=lambda width: AdaptiveClassifierClones(width, C, CUTOFFS, N),
        epochs=2,
    )
    assert 0 <= ranking[0].accuracy <= 100


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cutoffs": []}, ValueError, r"cutoffs: got \[\], expected one or more integers"),
        ({"cutoffs": [5, 5]}, ValueError, r"cutoffs: got \[5, 5\]"),
        ({"cutoffs": [0, 5]}, ValueError, "from 1 to 29"),
        ({"cutoffs": [5, 30]}, ValueError, r"cutoffs: got \[5, 30\]"),
        ({"cutoffs": [2.5]}, TypeError, r"cutoffs\[0\]: got 2.5, expected an integer"),
        ({"cutoffs": 5}, TypeError, "cutoffs: got 5"),
        ({"div_value": 0.0}, ValueError, "div_value: got 0.0"),
        ({"num_clones": 0}, ValueError, "num_clones: got 0"),
        ({"label_smoothing": 0.1}, TypeError, "label_smoothing"),
    ],
)
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AdaptiveClassifierClones(
            **{"in_features": D, "num_classes": C, "cutoffs": CUTOFFS, **arguments}
        )


def test_refused_calls():
    head, x, y = make(), *batch(4)
    before = state(head)
    cases = [
        (x, torch.rand(4, C), {}, ValueError, "target: got .*expected classes of shape"),
        (x, torch.full((4,), C), {}, RuntimeError, "target: got 30 at position 0"),
        (x, torch.full((4,), -1), {}, RuntimeError, "target: got -1 at position 0"),
        (x, y[:2], {}, ValueError, "target: got shape"),
        (x[:, :3], y, {}, RuntimeError, "x: got shape"),
        (x, y, {"sample_weight": torch.ones(3)}, ValueError, "sample_weight: got shape"),
        (x, None, {"reduction": "sum"}, ValueError, "reduction: got 'sum' without targets"),
    ]
    for features, targets, options, error, message in cases:
        with pytest.raises(error, match=message):
            head(features, targets, **options)
    head.label_smoothing = 0.1
    with pytest.raises(ValueError, match="an adaptive softmax has no such"):
        head(x, y)
    assert_same(before, state(head))
    for style in (ClonesParallel(), ClassesParallel()):
        with pytest.raises(TypeError, match="got a AdaptiveClassifierClones"):
            style._apply(head, None)


def test_what_the_losses_are_made_of():
    """The library's nll_loss of the log-probabilities is the loss."""
    head, x, y = make().eval(), *batch(5)
    torch.testing.assert_close(F.nll_loss(head(x), y), head(x, y))


@pytest.mark.parametrize("width", [1, 6])
def test_the_guess_of_equal_classes_is_that_of_a_prediction(width):
    # Of width 1 the tail projects to nothing, and its classes are equal for good.
    head = alrao.AdaptiveClassifierClones(width, 5, [2], 2)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:, 2] = 1
        head.tail[0].weight.zero_()
    x, targets = torch.ones(5, width), torch.arange(5)
    head(x, targets=targets)
    # Of the cluster, the likeliest place of the head, the first class.
    assert head.clone_metrics()["greedy_accuracy"].tolist() == [0.2, 0.2]
    assert head.clone_outputs(x)[:, :, 2:].argmax(-1).eq(0).all()
    head.clone_metrics(reset=True)
    with torch.no_grad():
        head.weight.zero_()
    head(x, targets=torch.zeros_like(targets))
    assert head.clone_metrics()["greedy_accuracy"].tolist() == [1, 1]
    assert head.predict(x).eq(0).all()
