"""Protects training under activation checkpointing: the gradients, the switch and the statistics of the plain run.

- Both modes of torch.utils.checkpoint, around the loss alone or the whole model, nested, with hooks on saved tensors
  inside and outside, with the results of some ops kept; another library's checkpoint; any head and criterion.
- Several forwards before their backwards, with the same targets; graphs that are walked twice; targets made inside.
- Compiled models in a checkpoint, and checkpoints in what is compiled.
- A backward in another thread, as autograd has them on a GPU: the second run is on the backend of the first.
- A forward in a backward that is no second run is an ordinary one; nothing is looked for without a checkpoint.
"""

import contextlib
import copy
import functools
import gc
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest
import torch
from clones_harness import C, D, assert_same, classifier, concentrate, regressor, state
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from alrao_fast import backends
from alrao_fast.compiler import assume_constant_result
from alrao_fast.nn import AlraoModel
from alrao_fast.nn.recomputation import _Calls, checkpoints

OP = "switch_mixture"
pytestmark = pytest.mark.usefixtures("used_backend", "used_device")

non_reentrant = functools.partial(torch_checkpoint.checkpoint, use_reentrant=False)
reentrant = functools.partial(torch_checkpoint.checkpoint, use_reentrant=True)


class OtherLibrary(torch.autograd.Function):
    """A checkpoint as other libraries have their own."""

    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.run = run
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return run(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.run(*inputs)
        torch.autograd.backward(out, grad)
        return None, *(t.grad for t in inputs)


def without_early_stop(function, *args):
    with torch_checkpoint.set_checkpoint_early_stop(False):
        return non_reentrant(function, *args)


def keeping_copies(function, *args):
    """As a policy that keeps every small result: forward and second run must call the same ops."""

    def policy(context, op, *args, **kwargs):
        kept = op in (torch.ops.aten.clone.default, torch.ops.aten._log_softmax.default)
        choice = torch_checkpoint.CheckpointPolicy
        return choice.MUST_SAVE if kept else choice.PREFER_RECOMPUTE

    context = functools.partial(
        torch_checkpoint.create_selective_checkpoint_contexts,
        policy,
        allow_cache_entry_mutation=True,
    )
    return non_reentrant(function, *args, context_fn=context)


def with_hooks_inside(checkpoint, function, *args):
    def inner(*args):
        with torch.autograd.graph.save_on_cpu():
            return function(*args)

    return checkpoint(inner, *args)


def with_hooks_outside(checkpoint, function, *args):
    with torch.autograd.graph.save_on_cpu():
        return checkpoint(function, *args)


def nested(outer, inner, function, *args):
    return outer(lambda *args: inner(function, *args), *args)


CHECKPOINTS = {
    "non-reentrant": non_reentrant,
    "reentrant": reentrant,
    "other-library": OtherLibrary.apply,
    "no-early-stop": without_early_stop,
    "non-reentrant-rng": functools.partial(non_reentrant, preserve_rng_state=False),
    "reentrant-rng": functools.partial(reentrant, preserve_rng_state=False),
    "keeping-copies": keeping_copies,
    "hooks-inside": functools.partial(with_hooks_inside, non_reentrant),
    "hooks-outside": functools.partial(with_hooks_outside, non_reentrant),
    "hooks-inside-reentrant": functools.partial(with_hooks_inside, reentrant),
    "nested": functools.partial(nested, non_reentrant, non_reentrant),
    "nested-reentrant": functools.partial(nested, reentrant, reentrant),
    "non-reentrant-in-reentrant": functools.partial(nested, reentrant, non_reentrant),
    "reentrant-in-non-reentrant": functools.partial(nested, non_reentrant, reentrant),
    "three-deep": functools.partial(
        nested, non_reentrant, functools.partial(nested, reentrant, non_reentrant)
    ),
}
every_checkpoint = pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)


def plain(function, *args):
    return function(*args)


def model(make=classifier):
    torch.manual_seed(1)
    net = AlraoModel(nn.Sequential(nn.Linear(5, D), nn.Tanh()), make())
    concentrate(net.head, -1, -4, -2)
    return net


def data(make=classifier, steps=3):
    x = torch.randn(steps, 8, 5)
    y = torch.randint(C, (steps, 8)) if make is classifier else torch.randn(steps, 8, C)
    return x, y


def whole(net, x, y, checkpoint):
    return checkpoint(lambda x, y: net(x, targets=y), x.clone().requires_grad_(), y)


def head_alone(net, x, y, checkpoint):
    return checkpoint(net.head, net.backbone(x), y)


def criterion(net, x, y, checkpoint):
    def loss(features):
        return net.head.clone_loss(features, lambda out: (out - 1).square().sum(-1))

    return checkpoint(loss, net.backbone(x))


def assert_same_training(net, twin):
    assert_same(state(net), state(twin))
    for (name, p), q in zip(net.named_parameters(), twin.named_parameters()):
        assert torch.equal(p.grad, q[1].grad), name


def training(net, loss, batches, checkpoint, lr=0.1):
    for x, y in zip(*batches):
        loss(net, x, y, checkpoint).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= lr * p.grad


@every_checkpoint
@pytest.mark.parametrize("loss", [whole, head_alone, criterion])
def test_as_the_plain_run(loss, checkpoint):
    net, batches = model(), data()
    twin = copy.deepcopy(net)
    training(net, loss, batches, checkpoint)
    training(twin, loss, batches, plain)
    assert_same_training(net, twin)
    assert net.head.switch.t.item() == 5
    assert net.head.clone_metrics()["count"].item() == 24


@pytest.mark.emulated
@pytest.mark.parametrize("checkpoint", [non_reentrant, reentrant])
@pytest.mark.parametrize("make", [classifier, regressor])
def test_on_every_backend(backend, make, checkpoint):
    net, batches = model(make), data(make)
    twin = copy.deepcopy(net)
    training(net, whole, batches, checkpoint)
    training(twin, whole, batches, plain)
    assert_same_training(net, twin)


def backward_in_a_thread(loss):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()


@pytest.fixture
def chosen(monkeypatch):
    """The implementations of the mixture that were chosen, each at its first call or in a trace."""
    names, choose = [], backends._choose

    @assume_constant_result
    def noted(op, *others):
        name = choose(op, *others)
        if op == OP:
            names.append(name)
        return name

    monkeypatch.setattr(backends, "_choose", noted)
    monkeypatch.setattr(backends, "_chosen", {})
    return names


@every_checkpoint
@pytest.mark.parametrize("make", [classifier, regressor])
@pytest.mark.parametrize("targets", [True, False], ids=["loss", "prediction"])
def test_backward_in_another_thread(chosen, make, targets, checkpoint):
    net, (x, y) = model(make), data(make)
    with backends.use_backend("reference"):
        if targets:
            loss = whole(net, x[0], y[0], checkpoint)
        else:
            loss = checkpoint(net, x[0].clone().requires_grad_()).sum()
        backward_in_a_thread(loss)
    assert set(chosen) == {"reference"}
    assert all(p.grad is not None for p in net.parameters())


def test_backward_of_a_compiled_model_in_another_thread(chosen):
    torch._dynamo.reset()
    net, (x, y) = model(), data()
    compiled = torch.compile(net, backend="aot_eager")
    with backends.use_backend("reference"):
        loss = non_reentrant(lambda x: compiled(x, targets=y[0]), x[0].clone().requires_grad_())
        backward_in_a_thread(loss)
    assert set(chosen) == {"reference"}


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_another_default_of_the_process(monkeypatch, chosen, name):
    """What ALRAO_BACKEND says is what the other thread has in use."""
    monkeypatch.setattr(backends, "_in_use", ContextVar("in use", default="reference"))
    net, (x, y) = model(), data()
    with backends.use_backend(name):
        backward_in_a_thread(whole(net, x[0], y[0], non_reentrant))
    expected = backends.available(OP, torch.device("cpu"))[0] if name == "auto" else name
    assert set(chosen) == {expected}


def test_log_likelihoods_backward_in_another_thread(chosen):
    """It has checkpoints of its own, around its chunks."""
    head = classifier(memory_budget=1)
    with backends.use_backend("reference"):
        log_prob, _ = head.log_likelihood(torch.randn(8, D), torch.randint(C, (8,)))
        backward_in_a_thread(log_prob.sum())
    assert set(chosen) == {"reference"}


@every_checkpoint
@pytest.mark.parametrize("order", ["sum", "forward", "backward"])
def test_several_forwards_before_their_backwards(checkpoint, order):
    """With one tensor of targets for all."""
    net, (x, y) = model(), data()
    twin = copy.deepcopy(net)
    for m, wrap in ((net, checkpoint), (twin, plain)):
        losses = [whole(m, part, y[0], wrap) for part in x]
        if order == "sum":
            sum(losses).backward()
        else:
            for loss in losses if order == "forward" else losses[::-1]:
                loss.backward()
    assert_same_training(net, twin)


@every_checkpoint
def test_two_forwards_in_one_checkpoint(checkpoint):
    net, (x, y) = model(), data()
    twin = copy.deepcopy(net)

    def both(m):
        # The targets are made anew in each run.
        return lambda x: m(x, targets=y[0] + 0) + m(2 * x, targets=y[1] + 0).square()

    for m, wrap in ((net, checkpoint), (twin, plain)):
        wrap(both(m), x[0].clone().requires_grad_()).backward()
    assert_same_training(net, twin)


@every_checkpoint
def test_prediction_in_a_checkpoint(checkpoint):
    """Its gradient is of the posterior at the time of the call."""
    net, (x, y) = model(), data()
    twin = copy.deepcopy(net)
    for m, wrap in ((net, checkpoint), (twin, plain)):
        prediction = wrap(m, x[0].clone().requires_grad_())
        m(x[1], targets=y[1])
        prediction.square().sum().backward()
    assert_same_training(net, twin)


@pytest.mark.parametrize("checkpoint", [non_reentrant, reentrant])
def test_graph_that_is_walked_twice(checkpoint):
    net, (x, y) = model(), data()
    twin = copy.deepcopy(net)
    for m, wrap in ((net, checkpoint), (twin, plain)):
        loss = wrap(lambda x, m=m: m(x, targets=y[0]).square(), x[0].clone().requires_grad_())
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_training(net, twin)


@pytest.mark.parametrize("checkpoint", [non_reentrant, reentrant])
def test_two_heads(checkpoint):
    net, other, (x, y) = model(), model(), data()
    concentrate(other.head, -3, -1, -1)
    twins = copy.deepcopy([net, other])
    for (a, b), wrap in (((net, other), checkpoint), (twins, plain)):

        def both(x, a=a, b=b):
            return a(x, targets=y[0]) + b(x, targets=y[1])

        wrap(both, x[0].clone().requires_grad_()).backward()
    assert_same_training(net, twins[0])
    assert_same_training(other, twins[1])


@pytest.mark.parametrize("checkpoint", [non_reentrant, reentrant])
def test_in_eval_mode(checkpoint):
    """The mode may change before the backward, and training may go on."""
    net, (x, y) = model(), data()
    twin = copy.deepcopy(net)
    for m, wrap in ((net, checkpoint), (twin, plain)):
        loss = whole(m.eval(), x[0], y[0], wrap)
        m.train()(x[1], targets=y[1]).backward()
        loss.backward()
        loss = whole(m, x[2], y[2], wrap)
        m.eval()
        loss.backward()
    assert_same_training(net, twin)
    assert net.head.switch.t.item() == 4


@pytest.mark.parametrize("hooks", ["none", "save_on_cpu"])
def test_training_forward_in_a_backward_is_an_ordinary_one(hooks):
    net, (x, y) = model(), data()
    entered = torch.zeros(2, requires_grad=True)
    around = contextlib.nullcontext() if hooks == "none" else torch.autograd.graph.save_on_cpu()

    def train(grad):
        with torch.enable_grad(), around:
            net(x[0], targets=y[0]).backward()

    out = entered.clone()
    out.register_hook(train)
    out.sum().backward()
    assert net.head.switch.t.item() == 3


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("checkpoint", [non_reentrant, reentrant])
def test_compiled(checkpoint, where):
    """A compiled model in a checkpoint, and a checkpoint in what is compiled."""
    torch._dynamo.reset()
    net, batches = model(), data()
    twin = copy.deepcopy(net)
    compile = functools.partial(torch.compile, backend="aot_eager")

    def run(net, x, y, wrap):
        if where == "outside":
            return compile(lambda x, y: wrap(lambda x: net(x, targets=y), x))(x.requires_grad_(), y)
        compiled = compile(net)
        return wrap(lambda x: compiled(x, targets=y), x.requires_grad_())

    training(net, run, batches, checkpoint)
    training(twin, whole, batches, plain)
    assert_same_training(net, twin)


def test_without_gradients_it_observes():
    net, (x, y) = model(), data()
    with torch.no_grad():
        net(x[0], targets=y[0])
        # No second run will come.
        non_reentrant(net.head, net.backbone(x[1]), y[1])
        reentrant(net.head, net.backbone(x[1]), y[1])
    assert net.head.switch.t.item() == 5


def test_hooks_stay_as_they_are():
    seen = []

    def hooks(name):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append(name) or t, lambda t: t
        )

    top = torch._C._autograd._top_saved_tensors_default_hooks
    with hooks("outer"):
        before = top(False)
        with hooks("inner"):
            assert checkpoints() is None
            torch.ones(2, requires_grad=True).square()
        assert top(False) == before
    assert top(False) is None
    assert seen == ["inner"]


@pytest.mark.parametrize("checkpoint", [non_reentrant, reentrant])
def test_nothing_is_kept_longer_than_the_graph(checkpoint):
    def kept():
        gc.collect()
        return sum(type(thing) is _Calls for thing in gc.get_objects())

    net, (x, y) = model(), data()
    loss = whole(net, x[0], y[0], checkpoint)
    assert kept() == 1
    del loss
    assert kept() == 0
    assert checkpoints() is None
