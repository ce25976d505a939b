"""Protects what torch can ask of the mixture beyond one backward, on every backend that is available.

- One table of functions (losses, log-probabilities, means, heads, clone_loss) and modes of differentiation: the value
  of plain PyTorch in float64, or for a derivative that a loss does not have the error that says so.
- Graphs that are kept, changes in place between forward and backward, memory, the switch under torch.func.
"""

import copy
import math
import weakref

import pytest
import torch
from derivatives_harness import (
    FUNCTIONS,
    LOSSES,
    MODES,
    PREDICTIONS,
    B,
    C,
    CloneLoss,
    D,
    N,
    case,
    leaves_of,
    weighted,
)
from mixture_harness import NAN, gaussian_inputs
from torch import nn
from torch.autograd import functional
from torch.func import functional_call, grad, jvp, vmap

from alrao_fast import testing
from alrao_fast.functional import (
    switch_mixture_log_prob,
    switch_mixture_mean,
    switch_mixture_nll,
)
from alrao_fast.nn import AlraoModel, ClassifierClones, RegressorClones

OP = "switch_mixture"
# torch says so of the ops that it calls for each of a batch of gradients, and of what linearize folds.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Attempted to")
NO_DERIVATIVE = "has one backward and no other derivative, neither a second nor a forward-mode one"
KERNELS = ["nll", "gaussian nll", "log_prob"]


@pytest.mark.emulated(name=KERNELS)
@pytest.mark.interpreted(name=["nll", "log_prob"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_or_error(backend, device, used_backend, name, mode):
    function, plain, inputs, target = case(name, backend, device)
    owners, run = MODES[mode]
    if owners == "predictions" and name not in PREDICTIONS:
        with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
            run(function, inputs, target)
        return
    torch.testing.assert_close(run(function, inputs, target), run(plain, inputs, target))


def test_value_by_hand():
    """One clone, one feature, two classes, weight 0: half of x by the first logit, and a Hessian of a quarter."""
    x, weight = torch.tensor([[2.0]]).double(), torch.zeros(1, 2, 1).double()

    def f(weight):
        return switch_mixture_log_prob(x, weight, None, x.new_zeros(1))[0, 0]

    tangent = jvp(f, (weight,), (torch.tensor([[[1.0], [0.0]]]).double(),))[1]
    torch.testing.assert_close(tangent, torch.tensor(1.0).double())
    second = functional.hessian(f, weight).view(2, 2)
    torch.testing.assert_close(second, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).double())


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["log_prob", "mean"])
def test_second_derivatives_with_dead_clones_and_samples(backend, device, name):
    inputs = testing.mixture_inputs(3, 2, 3, 4, dtype=torch.float64, device=device)
    x, weight, bias = inputs.x.clone(), inputs.weight.clone(), inputs.bias.clone()
    weight[1, 0, 0], bias[2, 1] = math.inf, NAN
    function = {"log_prob": switch_mixture_log_prob, "mean": switch_mixture_mean}[name]
    alive = [0, 3]

    def f(x, living_weight, living_bias):
        index = torch.tensor(alive, device=device)
        w, b = weight.index_copy(0, index, living_weight), bias.index_copy(0, index, living_bias)
        return function(x, w, b, inputs.log_posterior, impl=backend)

    leaves = leaves_of([x, weight[alive], bias[alive]])
    assert torch.autograd.gradgradcheck(f, leaves)
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
    # A sample that is dead has no derivative of any order.
    x[1, 0] = NAN
    for values in (x, weight, bias):
        values.requires_grad_()
    found = function(x, weight, bias, inputs.log_posterior, impl=backend)[[0, 2]].square().sum()
    first = torch.autograd.grad(found, (x, weight, bias), create_graph=True)
    second = torch.autograd.grad(sum(g.cos().sum() for g in first), (x, weight, bias))
    for g in (*first, *second):
        assert g.isfinite().all()
    assert not first[0][1].any() and not second[0][1].any()
    assert not second[1][[1, 2]].any()


@pytest.mark.emulated
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_a_loss_are_constants_of_the_forward(backend, device, used_backend, name):
    """What is written into its inputs or its gradients changes no later backward."""
    function, plain, inputs, target = case(name, backend, device)
    leaves = leaves_of(inputs)
    expected = torch.autograd.grad(plain(*leaves, target), leaves)
    loss = function(*leaves, target)
    with torch.no_grad():
        for tensor in leaves:
            tensor.mul_(3).add_(1)
        target.zero_()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(first, expected)
    for gradient in first:
        gradient.fill_(NAN)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), expected)
    loss.backward()
    torch.testing.assert_close(tuple(t.grad for t in leaves), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.emulated
@pytest.mark.parametrize("changed", range(4))
def test_log_prob_of_inputs_that_changed(backend, device, changed):
    """Its gradient needs them: either it was computed from copies, or torch's own check refuses."""
    inputs = testing.mixture_inputs(B, D, C, N, dtype=torch.float64, device=device)
    leaves, a = leaves_of(inputs[:3]), inputs.log_posterior.clone()
    result = switch_mixture_log_prob(*leaves, a, impl=backend)
    expected = torch.autograd.grad(result.sin().sum(), leaves, retain_graph=True)
    with torch.no_grad():
        (*leaves, a)[changed].mul_(2)
    if backend != "reference":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sin().sum().backward()
        return
    torch.testing.assert_close(torch.autograd.grad(result.sin().sum(), leaves), expected)


@pytest.mark.emulated
@pytest.mark.parametrize("function", [switch_mixture_nll, switch_mixture_log_prob])
def test_the_posterior_is_a_constant(backend, device, function):
    inputs = testing.mixture_inputs(B, D, C, N, dtype=torch.float64, device=device)
    weight, a = leaves_of([inputs.weight, inputs.log_posterior])
    target = [inputs.target] if function is switch_mixture_nll else []

    def run(a):
        result = function(inputs.x, weight, inputs.bias, a, *target, impl=backend)
        return result[0] if target else result.sum()

    assert torch.autograd.grad(run(a), [weight, a], allow_unused=True)[1] is None
    assert not grad(run)(a).any()
    assert not jvp(run, (a,), (a.cos(),))[1].any()


def test_a_loss_holds_no_features_after_its_backward(backend, device):
    inputs = testing.mixture_inputs(B, D, C, N, device=device)
    features = (leaf := inputs.x.clone().requires_grad_()) * 2
    loss, _ = switch_mixture_nll(features, *inputs[1:], impl=backend)
    alive = weakref.ref(features)
    del features
    loss.backward()
    assert loss.grad_fn is not None and leaf.grad is not None
    assert alive() is None


def test_inference_mode_then_training(backend, device, used_backend):
    """Features made there train the clones; nothing that was made there stays."""
    inputs = testing.mixture_inputs(B, D, C, N, device=device)
    head = ClassifierClones(D, C, N, device=device)
    twin = copy.deepcopy(head)
    with torch.inference_mode():
        features = inputs.x * 2
        head(features), head(features, inputs.target)
    for one, x in ((head, features), (twin, inputs.x * 2)):
        one(x, inputs.target).backward()
    torch.testing.assert_close(head.weight.grad, twin.weight.grad)
    torch.testing.assert_close(head.bias.grad, twin.bias.grad)


def net_of(kind, device):
    backbone = nn.Sequential(nn.Linear(D, 5), nn.Tanh()).to(device)
    return AlraoModel(backbone, kind(5, C, N, device=device)).double().to(device)


def state_of(net):
    buffers = dict(net.named_buffers())
    return [buffers[f"head.{name}"] for name in ("switch.logw", "switch.t", "running")]


@pytest.mark.parametrize("kind", [ClassifierClones, RegressorClones])
def test_training_by_torch_func(backend, device, used_backend, kind):
    """Gradients and one observation as by backward; with parameters and buffers that are passed in, too."""
    make = testing.mixture_inputs if kind is ClassifierClones else gaussian_inputs
    inputs = make(B, D, C, N, dtype=torch.float64, device=device)
    x, target = inputs.x, inputs.target
    net = net_of(kind, device)
    twin, passed = copy.deepcopy(net), copy.deepcopy(net)
    net(x, targets=target).backward()
    expected = {name: p.grad for name, p in net.named_parameters()}

    def loss(params, buffers=None):
        return functional_call(twin, (params, buffers or {}), (x,), {"targets": target})

    params = {name: p.detach() for name, p in twin.named_parameters()}
    torch.testing.assert_close(grad(loss)(params), expected)
    torch.testing.assert_close(state_of(twin), state_of(net))
    buffers = dict(passed.named_buffers())
    torch.testing.assert_close(grad(loss)(params, buffers), expected)
    torch.testing.assert_close(state_of(passed), state_of(net))
    # The second derivative's forward sees one batch more; itself it is refused.
    with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
        grad(lambda p: sum(map(weighted, grad(loss)(p).values())))(params)


@pytest.mark.parametrize("criterion", [False, True])
def test_no_observation_in_vmap(backend, device, used_backend, criterion):
    inputs = gaussian_inputs(B, D, C, N, dtype=torch.float64, device=device)
    head = RegressorClones(D, C, N, device=device, dtype=torch.float64)
    module = CloneLoss(head) if criterion else head
    before = copy.deepcopy([head.switch.logw, head.switch.t, head.running])

    def per_sample():
        return vmap(lambda x, y: module(x[None], y[None]))(inputs.x, inputs.target)

    with pytest.raises(RuntimeError, match=r"inside torch.func.vmap.*Call eval\(\) before"):
        per_sample()
    torch.testing.assert_close([head.switch.logw, head.switch.t, head.running], before)
    head.eval()
    expected = [module(x[None], y[None]) for x, y in zip(inputs.x, inputs.target)]
    torch.testing.assert_close(per_sample(), torch.stack(expected))


def test_second_derivative_of_a_traced_loss(compiled, device):
    """Dispatched, the op refuses too. (A backend that differentiates ahead gives 0 for any function of torch's own.)"""
    inputs = testing.mixture_inputs(B, D, C, N, dtype=torch.float64, device=device)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def loss(x):
        return switch_mixture_nll(x, *inputs[1:], impl=compiled)[0]

    with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
        functional.hessian(loss, inputs.x)


def test_torch_func_of_compiled_functions(backend, device, used_backend):
    """Compiled around the transform, the numbers are those of the eager one, and of its observation."""
    inputs = testing.mixture_inputs(B, D, C, N, dtype=torch.float64, device=device)
    net = net_of(ClassifierClones, device)
    params = {name: p.detach() for name, p in net.named_parameters()}
    if (
        backend == "reference"
    ):  # its observation writes in a way that torch.compile does not trace there
        net.eval()
    twin = copy.deepcopy(net)
    torch._dynamo.reset()

    def everything(net, params, x):
        def loss(params):
            return functional_call(net, params, (x,), {"targets": inputs.target})

        return grad(loss)(params)

    def log_prob(x):
        return jvp(
            lambda x: switch_mixture_log_prob(x, *inputs[1:4], impl=backend), (x,), (x.cos(),)
        )

    whole = torch.compile(everything, fullgraph=True, backend="aot_eager")
    features = inputs.x
    torch.testing.assert_close(whole(net, params, features), everything(twin, params, features))
    torch.testing.assert_close(state_of(net), state_of(twin))
    compiled = torch.compile(log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), log_prob(features))


def test_compiled_autograd(backend, device, used_backend):
    """A backward that is traced itself, of the loss and of the log-probabilities."""
    inputs = testing.mixture_inputs(B, D, C, N, dtype=torch.float64, device=device)
    net = net_of(ClassifierClones, device)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    (twin(inputs.x, targets=inputs.target) + weighted(twin(inputs.x))).backward()
    value = net(inputs.x, targets=inputs.target) + weighted(net(inputs.x))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        value.backward()
    for p, expected in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, expected.grad)
