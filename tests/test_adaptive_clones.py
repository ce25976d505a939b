"""Protects the clones of an adaptive softmax: their losses and gradients.

- Against torch.nn.AdaptiveLogSoftmaxWithLoss, one module for each clone, in float64: the mixture's loss and its
  gradient to the features, each clone's own; with weights, reductions, ignored samples, in blocks of any size.
- One clone is torch's module: initial values, loss, log-probabilities, predictions.
- Clusters without samples, batches without samples or with ignored ones alone, clusters of one class, logits of 1e4.
- Clones that are dead in the head or in one tail: the others as if they were alone.
- What the switch observes, and the guesses that are counted.
- One derivative of the loss, torch.func, further derivatives refused; every derivative of the log-probabilities.
"""

import copy
import math

import pytest
import torch
from clones_harness import assert_same, state
from torch import nn

from alrao_fast.nn import AdaptiveClassifierClones, adaptive_softmax
from alrao_fast.reference import adaptive_mixture as reference

OP = "switch_mixture"
D, C, N, CUTOFFS = 12, 30, 3, [5, 6, 17]

pytestmark = pytest.mark.usefixtures("used_backend", "used_device")


def make(num_clones=N, **arguments):
    torch.manual_seed(0)
    head = AdaptiveClassifierClones(D, C, CUTOFFS, num_clones, 1.7, **arguments)
    head.switch.update(-torch.arange(num_clones, dtype=torch.float64))
    return head


def batch(*shape, scale=1.0):
    torch.manual_seed(1)
    return (scale * torch.randn(*shape, D)).requires_grad_(), torch.randint(C, shape)


def modules(head):
    """Each clone as torch's module, in float64, with its own parameters."""
    found = []
    for n in range(head.num_clones):
        bias = head.bias is not None
        module = nn.AdaptiveLogSoftmaxWithLoss(
            D, C, CUTOFFS, head.div_value, bias, dtype=torch.float64
        )
        clone = [p.detach()[n] for p in head.parameters()]
        with torch.no_grad():
            for own, value in zip(module.parameters(), clone, strict=True):
                own.copy_(value)
        found.append(module)
    return found


def truth(head, x, y, weight=None, divisor=None):
    """The loss, and the gradients to the features and the clones' parameters, by torch's modules."""
    x, y = x.detach().double().flatten(0, -2), y.flatten()
    counted = y != head.ignore_index
    weight = counted.double() if weight is None else weight.double().flatten()
    weight = torch.where(counted, weight, 0)
    weight = weight / (weight.sum() if divisor is None else divisor)
    y = torch.where(counted, y, 0)
    posterior = head.switch.log_posterior.clone()
    clones = modules(head)
    own = [module(x, y).output for module in clones]
    sum(-(weight * logp).sum() for logp in own).backward()
    x.requires_grad_()
    joint = posterior + torch.stack([module(x, y).output for module in clones], 1)
    loss = -(weight * joint.logsumexp(1)).sum()
    (dx,) = torch.autograd.grad(loss, x)
    for module in clones:
        for p in module.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    params = zip(*(module.parameters() for module in clones), strict=True)
    return loss, [
        dx,
        *(torch.stack([p.grad for p in same]) for same in params),
    ]


def gradients(head, x):
    return [x.grad.flatten(0, -2), *(p.grad for p in head.parameters())]


def assert_right(loss, head, x, expected):
    close(loss, expected[0])
    for found, right in zip(gradients(head, x), expected[1], strict=True):
        close(found, right)


def close(found, right, tolerance=2e-5):
    right = right.double()
    scale = right.abs().max().clamp(min=1e-3) if right.numel() else 1
    torch.testing.assert_close(found.double() / scale, right / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("head_bias", [False, True])
@pytest.mark.parametrize("shape", [(40,), (3, 7), (1,)])
def test_gradients_are_those_of_torch(backend, shape, head_bias):
    head = make(head_bias=head_bias)
    x, y = batch(*shape)
    y.flatten()[::6] = -100
    y.flatten()[0] = 3
    expected = truth(head, x, y)
    loss = head(x, y)
    loss.backward()
    assert_right(loss, head, x, expected)


@pytest.mark.parametrize("keep", [False, True])
def test_weights_and_reductions(backend, keep):
    x, y = batch(4, 9)
    y[2, :3] = -100
    weight = torch.rand(4, 9)
    weight[3] = 0
    cases = [
        ({"reduction": "sum"}, None, 1),
        ({"sample_weight": weight}, weight, None),
        ({"num_items_in_batch": 11.0}, None, 11),
        ({"sample_weight": weight, "num_items_in_batch": torch.tensor(7)}, weight, 7),
        ({"sample_weight": weight, "reduction": "none"}, weight, 1),
    ]
    for options, factors, divisor in cases:
        head = make(head_bias=True)
        expected = truth(head, x, y, factors, divisor)
        x.grad = None
        loss = head(x, y, **options)
        if options.get("reduction") == "none":
            assert loss.shape == y.shape and not loss[3].any() and not loss[2, :3].any()
            loss = loss.sum()
        (0.5 * loss).backward(retain_graph=keep)
        if keep:
            for p in (x, *head.parameters()):
                p.grad = None
            (0.5 * loss).backward()
        for p in (x, *head.parameters()):
            p.grad *= 2
        assert_right(loss, head, x, expected)


@pytest.mark.parametrize("size", [1, 500, 2000])
def test_blocks(monkeypatch, size):
    monkeypatch.setattr(adaptive_softmax, "_CPU_PART", size // 2)
    head = make(memory_budget=size, head_bias=True)
    x, y = batch(40)
    expected = truth(head, x, y)
    loss = head(x, y)
    loss.backward()
    assert_right(loss, head, x, expected)
    whole = make(head_bias=True).eval()
    head.eval().switch.load_state_dict(whole.switch.state_dict())
    prediction = head(x)
    torch.testing.assert_close(prediction, whole(x))
    assert torch.equal(head.predict(x), prediction.argmax(1))
    (grad,) = torch.autograd.grad(prediction[:, 7].sum(), x)
    (right,) = torch.autograd.grad(whole(x)[:, 7].sum(), x)
    torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("head_bias", [False, True])
def test_one_clone_is_torchs_module(backend, head_bias):
    torch.manual_seed(4)
    module = nn.AdaptiveLogSoftmaxWithLoss(D, C, CUTOFFS, 2.0, head_bias)
    torch.manual_seed(4)
    head = AdaptiveClassifierClones(D, C, CUTOFFS, 1, 2.0, head_bias)
    for own, right in zip(head.parameters(), module.parameters(), strict=True):
        assert torch.equal(own[0], right)
    x, y = batch(50, scale=3.0)
    right = module(x, y)
    torch.testing.assert_close(head(x, y), right.loss)
    torch.testing.assert_close(-head(x, y, reduction="none"), right.output)
    head.eval()
    torch.testing.assert_close(head(x), module.log_prob(x))
    assert torch.equal(head.predict(x), module.predict(x))


def test_initial_values_are_those_of_torch_clone_by_clone():
    torch.manual_seed(2)
    head = AdaptiveClassifierClones(D, C, CUTOFFS, N, head_bias=True)
    torch.manual_seed(2)
    clones = [nn.AdaptiveLogSoftmaxWithLoss(D, C, CUTOFFS, head_bias=True) for _ in range(N)]
    for own, *same in zip(head.parameters(), *(m.parameters() for m in clones), strict=True):
        assert torch.equal(own, torch.stack(same))


def test_uniform_by_hand(backend):
    """Zero weights: every place of the head has 1 / 8, of the cluster of 11 classes 1 / 11, of one class 1."""
    head = AdaptiveClassifierClones(D, C, CUTOFFS, 2)
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
    x, _ = batch(3)
    losses = head(x, torch.tensor([4, 5, 6]), reduction="none")
    expected = torch.tensor([math.log(8), math.log(8), math.log(88)])
    torch.testing.assert_close(losses, expected)
    # The only class of its cluster, but no cluster is likelier than another.
    assert head.clone_metrics()["greedy_accuracy"].tolist() == [0, 0]


def test_a_cluster_that_does_not_occur(backend):
    head = make()
    x, _ = batch(9)
    y = torch.tensor([0, 1, 2, 5, 5, 29, 28, 27, 4])
    expected = truth(head, x, y)
    loss = head(x, y)
    loss.backward()
    assert_right(loss, head, x, expected)
    assert not head.tail[1].weight.grad.any() and not head.tail[1].projection.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_counts(backend, reduction):
    head = make()
    before = copy.deepcopy(head.switch.state_dict())
    for x, y in (batch(0), (batch(4)[0], torch.full((4,), -100))):
        with torch.no_grad():
            x.fill_(math.nan)
        head.zero_grad()
        loss = head(x, y, reduction=reduction)
        loss.sum().backward()
        assert not loss.any() and not any(g.any() for g in gradients(head, x))
        assert head.eval()(x).shape == (len(y), C) and head.predict(x).shape == y.shape
        head.train()
    for name, value in head.switch.state_dict().items():
        assert name == "t" or torch.equal(value, before[name])


def test_projections_to_nothing(backend):
    """As in torch, a tail of no hidden features is uniform."""
    head = AdaptiveClassifierClones(4, 9, [3], 2, div_value=8.0)
    assert head.tail[0].projection.shape == (2, 0, 4)
    x, y = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 4, 5, 8, 2])
    head(x, y).backward()
    assert head.eval()(x).exp().sum(1).allclose(torch.ones(()))


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_large_and_small_logits(backend, scale):
    head = make(head_bias=True)
    with torch.no_grad():
        for p in head.parameters():
            p *= scale ** (1 if p.dim() == 2 or p.size(2) == D else 0)
    x, y = batch(40)
    expected = truth(head, x, y)
    loss = head(x, y)
    loss.backward()
    close(loss, expected[0], 1e-3)
    for found, right in zip(gradients(head, x), expected[1], strict=True):
        close(found, right, 5e-3)


BREAK = {
    "head": lambda head: head.weight[1, 2].fill_(math.nan),
    "bias": lambda head: head.bias[1, 2].fill_(-math.inf),
    "projection": lambda head: head.tail[2].projection[1, 0].fill_(math.inf),
    "tail": lambda head: head.tail[2].weight[1, 3].fill_(-math.inf),
    "overflow": lambda head: head.tail[2].weight[1, 3].fill_(3e38),
}


@pytest.mark.parametrize("part", BREAK)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_dead_clone(backend, part, reduction):
    """It has no gradient, and the features, the others and their loss are those of the reference."""
    head = make(head_bias=True)
    with torch.no_grad():
        BREAK[part](head)
    x, y = batch(40, scale=9.0)
    assert (y >= CUTOFFS[2]).any()
    other = copy.deepcopy(head)
    if part != "overflow":
        other.double()
    loss = head(x, y, reduction=reduction)
    loss.sum().backward()
    assert loss.isfinite().all()
    for p in head.parameters():
        assert not p.grad[1].any() and p.grad.isfinite().all()
    assert head.running[0, 1] == math.inf and head.running[0, 0].isfinite()
    wide = x.detach().to(other.weight.dtype).requires_grad_()
    tails = [(tail.projection, tail.weight) for tail in other.tail]
    inputs = wide, other.weight, other.bias, tails, other.switch.log_posterior, y
    how = {"reduction": "sum" if reduction == "none" else reduction, "ignore_index": -100}
    right, _ = reference.adaptive_mixture_nll(*inputs, **how)
    right.backward()
    close(loss.sum(), right)
    for found, g in zip(gradients(head, x), gradients(other, wide), strict=True):
        close(found, g, 1e-4)
    prediction = head.eval()(x)
    torch.testing.assert_close(prediction.exp().sum(1), torch.ones(40))
    assert head.predict(x).shape == y.shape
    if part != "overflow":
        assert head.finite_clones().tolist() == [True, False, True]
        assert torch.equal(head.predict(x), prediction.argmax(1))


def test_samples_whose_tail_is_alive_have_all_clones():
    head = make()
    with torch.no_grad():
        head.tail[2].weight[1] = math.nan
    x, _ = batch(6)
    y = torch.tensor([0, 5, 7, 16, 1, 3])
    expected = truth(head, x, y)
    loss = head(x, y)
    loss.backward()
    close(loss, expected[0])
    assert head.weight.grad[1].any()


def test_all_clones_dead(backend):
    head = make()
    with torch.no_grad():
        head.tail[0].weight.fill_(math.nan)
    x, y = batch(7)
    y[:] = torch.tensor([0, 1, 2, 3, 4, 7, 5])
    before = head.switch.log_posterior.clone()
    with pytest.warns(
        RuntimeWarning, match=r"clones \[0, 1, 2\] have parameters that are not finite"
    ):
        loss = head(x, y)
    loss.backward()
    assert loss == math.inf and torch.equal(head.switch.log_posterior, before)
    assert not x.grad[6].any() and x.grad[:6].any() and x.grad.isfinite().all()
    assert all(not p.grad.any() for p in head.parameters())
    assert (head.eval()(x) == -math.inf).all()


@pytest.mark.parametrize("evidence", ["mean", "sum"])
def test_what_the_switch_observes(backend, evidence):
    head = make(evidence=evidence)
    other = make(evidence=evidence).switch
    x, y = batch(40)
    y[:7] = -100
    head(x, y, sample_weight=torch.rand(40), reduction="none")
    own = torch.stack([m(x.double()[7:], y[7:]).output for m in modules(head)])
    observed = own.mean(1) if evidence == "mean" else own.sum(1)
    other.update(observed.detach())
    torch.testing.assert_close(head.switch.log_posterior, other.log_posterior, rtol=1e-4, atol=1e-4)
    metrics = head.clone_metrics()
    close(metrics["loss"], -own.mean(1).detach())
    assert metrics["count"] == 33
    # The likeliest class of the likeliest place in the head.
    correct = []
    for module in modules(head):
        place = module.head(x.double()).argmax(1)
        for k, tail in enumerate(module.tail):
            within = tail(x.double()).argmax(1) + CUTOFFS[k]
            place = torch.where(place == CUTOFFS[0] + k, -1 - within, place)
        guess = torch.where(place < 0, -1 - place, place)
        correct.append((guess == y)[7:].double().mean())
    assert torch.stack(correct).any()
    close(metrics["greedy_accuracy"], torch.stack(correct))
    before = state(head)
    head.eval()(x, y)
    assert_same(before, state(head))


def test_one_derivative(backend):
    head = make().double()
    x, y = batch(8)
    x = x.detach().double().requires_grad_()
    (plain,) = torch.autograd.grad(head(x, y), x)
    head.switch.load_state_dict(make().switch.state_dict())
    for options in ({}, {"reduction": "none"}):
        c = torch.ones((), dtype=torch.float64, requires_grad=True)
        loss = head.eval()(x, y, **options).sum()
        loss = loss if options else 8 * loss
        (dx,) = torch.autograd.grad(c * loss, x, create_graph=True)
        torch.testing.assert_close(dx, 8 * plain)
        (by_factor,) = torch.autograd.grad(dx.sum(), c, retain_graph=True)
        torch.testing.assert_close(by_factor, 8 * plain.sum())
        with pytest.raises(RuntimeError, match="has one backward and no other derivative"):
            torch.autograd.grad(dx.sum(), x, retain_graph=True)
        factors = torch.arange(3.0, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="has one backward and no other derivative"):
            torch.autograd.grad(dx.sum(), head.weight)
        loss = head(x, y, **options).sum()
        loss = 8 * loss if not options else loss
        (each,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True)
        torch.testing.assert_close(each[2], 16 * plain)


def test_torch_func(backend):
    head = make().eval()
    x, y = batch(6)
    params = {name: p.detach() for name, p in head.named_parameters()}

    def loss(params, x, y):
        return torch.func.functional_call(head, params, (x, y))

    found = torch.func.grad(loss)(params, x.detach(), y)
    head(x, y).backward()
    for name, p in head.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    of_x = torch.func.grad(lambda x: head(x, y))(x.detach())
    torch.testing.assert_close(of_x, x.grad)
    each = torch.func.vmap(lambda x, y: head(x.unsqueeze(0), y.unsqueeze(0)))(x.detach(), y)
    torch.testing.assert_close(each, head(x, y, reduction="none").detach())
    with pytest.raises(RuntimeError, match="no other derivative"):
        torch.func.jvp(lambda x: head(x, y), (x.detach(),), (torch.ones_like(x),))


def test_log_probabilities_have_every_derivative():
    head = make(2).double().eval()
    x, _ = batch(1)
    x = x.detach().double().requires_grad_()
    torch.autograd.gradcheck(lambda x: head(x)[:, ::7], x)
    torch.autograd.gradgradcheck(lambda x: head(x)[:, 7::20], x)
    other = torch.func.jacrev(head)(x.detach())
    torch.testing.assert_close(torch.func.jacfwd(head)(x.detach()), other)
