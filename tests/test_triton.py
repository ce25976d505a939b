"""Protects what only the Triton kernels have; the tests of the ops cover them like the other backends.

Runs on a GPU, or under TRITON_INTERPRET=1 (tests/test_triton_interpreter.py).

- The mixture's regimes, each forced on every kind of input: our own products, the library's with repair, streamed,
  fused with the products; and which of them runs where.
- More than one program per tensor, wide and narrow chunks, gradients that move, plans that are not confused.
- opcheck of the twins; torch.compile(fullgraph=True) of a model; a whole training step in a CUDA graph.
"""

import math

import pytest
import torch
from mixture_harness import (
    dead_sample,
    ignored_sample_not_finite,
    nothing_counted,
    posterior_with_zeros,
)
from torch import nn

from alrao_fast import AlraoModel, AlraoSGD, ClassifierClones, backends, testing
from alrao_fast.ops.feature_sgd import feature_sgd_
from alrao_fast.ops.mixture import (
    switch_mixture_gaussian_stats,
    switch_mixture_log_prob,
    switch_mixture_stats,
)

REASON = testing.require("switch_mixture", "triton")
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}"),
]
DEVICE = backends.device_of("triton")
NAN, INF = math.nan, math.inf

# What of alrao_fast.kernels.mixture.problem is changed, and the memory budget.
REGIMES = {
    "direct": ({}, None),
    "library": ({"DIRECT": 0}, None),
    "library, chunks": ({"DIRECT": 0}, 2000),
    "streamed": ({"TILE": 0}, None),
    "streamed, chunks": ({"TILE": 0}, 100),
    "fused": ({"TILE": 0, "is_fused": lambda dtype, features: dtype != torch.float64}, None),
}
WHOLE = [name for name in REGIMES if "chunks" not in name]


@pytest.fixture(params=REGIMES)
def budget(request, monkeypatch):
    """The memory budget, with the regime forced."""
    from alrao_fast.kernels.mixture import problem as switch_mixture

    changes, memory_budget = REGIMES[request.param]
    for name, value in changes.items():
        monkeypatch.setattr(switch_mixture, name, value)
    return memory_budget


def dead_clones(inputs):
    inputs.weight[0, 1, 0] = NAN
    inputs.bias[1, 2] = INF


def nearly_overflowing(inputs):
    inputs.weight[2] *= 1e36


def everything(function, inputs, target, impl, **options):
    """Loss, statistics and gradients; then log-probabilities and theirs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    loss, stats = function(*leaves, inputs.log_posterior, target, impl=impl, **options)
    results = [loss.detach(), stats[0], stats[2], *torch.autograd.grad(loss, leaves)]
    log_prob = switch_mixture_log_prob(*leaves, inputs.log_posterior, impl=impl)
    upstream = torch.linspace(-1, 1, log_prob.numel(), device=DEVICE).view_as(log_prob)
    # Where nothing is possible there is no gradient to compare.
    upstream = torch.where(log_prob > -INF, upstream, 0).to(log_prob.dtype)
    return [*results, log_prob.detach(), *torch.autograd.grad(log_prob, leaves, upstream)]


NAMES = "loss nll count dx dweight dbias log_prob dx_log_prob dweight_log_prob dbias_log_prob"


def compare(inputs, budget, function=switch_mixture_stats, target=None, slack=None):
    """`slack` stands for what the budgets allow."""
    target = inputs.target if target is None else target
    wide = inputs._replace(**{k: getattr(inputs, k).double() for k in ("x", "weight", "bias")})
    wide_target = target.double() if target.is_floating_point() else target
    actual = everything(function, inputs, target, "triton", memory_budget=budget)
    reference = everything(function, inputs, target, "reference")
    truth = everything(function, wide, wide_target, "reference")
    dtype = inputs.x.dtype
    for name, got, own, exact in zip(NAMES.split(), actual, reference, truth, strict=True):
        assert got.dtype == own.dtype, name
        usual = 4e-6 if got.dtype == torch.float64 and dtype != torch.float64 else None
        testing.assert_within_budget(got, own, exact, name, slack=slack or usual)


@pytest.mark.interpreted(budget=WHOLE)
@pytest.mark.parametrize(
    "change",
    [
        dead_clones,
        dead_sample,
        ignored_sample_not_finite,
        nothing_counted,
        posterior_with_zeros,
        nearly_overflowing,
    ],
    ids=lambda change: change.__name__,
)
def test_every_regime_on_special_values(budget, change):
    inputs = testing.mixture_inputs(9, 6, 5, 4, device=DEVICE)
    change(inputs)
    compare(inputs, budget)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_regime_in_every_dtype(budget, dtype):
    compare(testing.mixture_inputs(20, 16, 9, 3, dtype=dtype, device=DEVICE), budget)


@pytest.mark.interpreted(budget=WHOLE)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (5, 3, 1, 3), (5, 3, 70, 1), (33, 70, 40, 2)])
def test_every_regime_in_every_size(budget, sizes):
    inputs = testing.mixture_inputs(*sizes, device=DEVICE, scale=30.0)
    if sizes[2] == 1:
        # The log-probability of the only class is 0, and nothing relative to it is small.
        inputs = inputs._replace(log_posterior=inputs.log_posterior - 1)
    # Float32 knows logits of up to 150 to an ulp of 1.5e-5, and a shift of one moves a probability by a quarter of it.
    # Which way the sum of 70 products falls differs with its order: bias first, as Triton's chain of FMAs has it on a
    # GPU, dx is off by 6e-6, the bias last by 2e-6.
    logits = torch.einsum("bd,ncd->bnc", inputs.x, inputs.weight) + inputs.bias
    ulp = torch.finfo(torch.float32).eps * logits.abs().max().item()
    compare(inputs, budget, slack=max(4e-6, ulp))


@pytest.mark.interpreted(budget=WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_regime_of_regression(budget, dtype):
    inputs = testing.mixture_inputs(9, 6, 3, 4, dtype=dtype, device=DEVICE)
    target = torch.randn(9, 3, device=DEVICE).to(dtype)
    inputs.weight[1, 0, 0] = NAN
    target[4, 1] = INF
    compare(inputs, budget, switch_mixture_gaussian_stats, target)


# Samples and classes within one block, in several; parts of the classes, and of all clones' classes.
@pytest.mark.interpreted(sizes=[(1, 1, 3, 1), (65, 17, 70, 2)])
@pytest.mark.interpreted(programs=[8])
@pytest.mark.parametrize("programs", [1, 8, 512])
@pytest.mark.parametrize("sizes", [(1, 1, 3, 1), (65, 17, 70, 2), (70, 128, 200, 3)], ids=str)
def test_fused_in_parts(monkeypatch, sizes, programs):
    from alrao_fast.kernels.mixture import fused as switch_mixture_fused
    from alrao_fast.kernels.mixture import problem as switch_mixture

    monkeypatch.setattr(switch_mixture, "TILE", 0)
    monkeypatch.setattr(switch_mixture, "is_fused", lambda dtype, features: True)
    monkeypatch.setattr(switch_mixture_fused, "PROGRAMS", programs)
    inputs = testing.mixture_inputs(*sizes, device=DEVICE, scale=10.0)
    if sizes[0] > 3:
        inputs.target[3] = -100
        inputs.weight[-1, 69, 0] = INF
    compare(inputs, None)


@pytest.mark.interpreted
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_fused_makes_what_is_needed(monkeypatch, needs):
    from alrao_fast.kernels.mixture import problem as switch_mixture

    monkeypatch.setattr(switch_mixture, "TILE", 0)
    monkeypatch.setattr(switch_mixture, "is_fused", lambda dtype, features: True)
    x, weight, bias, log_posterior, target = testing.mixture_inputs(9, 6, 20, 3, device=DEVICE)
    op = torch.ops.alrao_fast.switch_mixture_nll__triton
    arguments = (x, weight, bias, log_posterior, target, -100, True)
    every = op(*arguments, True, True, 1 << 20)
    some = op(*arguments, *needs, 1 << 20)
    for got, full, made in zip(some, every, (True, True, needs[0], needs[1], needs[1])):
        assert torch.equal(got, full) if made else not got.numel()


@pytest.mark.interpreted
def test_which_regime_runs():
    from alrao_fast.kernels.mixture import problem

    def regime(dtype, features, classes, gaussian=False):
        inputs = problem.Inputs(
            torch.empty(2, features, dtype=dtype), torch.empty(6, classes, features), None, None
        )
        return problem.regime(inputs, gaussian)

    low, single = torch.bfloat16, torch.float32
    assert regime(low, 100, 512) == "tile"
    assert regime(low, 100, 10000) == "fused"
    assert regime(low, 100, 10000, gaussian=True) == "stream"
    assert regime(low, 129, 10000) == "stream"
    assert regime(single, 64, 10000) == "stream"
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert regime(single, 64, 10000) == "fused"
        assert regime(torch.float64, 64, 10000) == "stream"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.interpreted
def test_rows_longer_than_a_block(monkeypatch):
    from alrao_fast.kernels.mixture import problem as switch_mixture

    monkeypatch.setattr(switch_mixture, "TILE", 0)
    compare(testing.mixture_inputs(3, 4, 4500, 2, device=DEVICE), None)


# ---- the walk over many tensors ----


def tensors(generator, sizes, offset):
    """float32 tensors that begin `offset` elements behind a 16-byte address."""
    made = []
    for size in sizes:
        room = torch.empty(size + offset + 4, device=DEVICE)
        skip = (-room.data_ptr() // 4) % 4 + offset
        made.append(room[skip : skip + size].copy_(torch.randn(size, generator=generator)))
    return made


@pytest.mark.interpreted
@pytest.mark.parametrize("offset", [0, 1], ids=["wide", "narrow"])
def test_many_programs_per_tensor(offset):
    # (inner, period) of: rows within and across chunks, a rate per entry longer than a chunk, and short rows.
    layouts = [(2500, 3), (1, 3000), (7, 600), (1024, 4), (4096, 1), (3, 1366)]
    sizes = [inner * period for inner, period in layouts]
    generator = torch.Generator().manual_seed(0)
    grads = tensors(generator, sizes, offset)
    params = tensors(generator, sizes, offset)
    rates = [torch.rand(period, generator=generator).to(DEVICE) for _, period in layouts]
    results = []
    for impl in ("triton", "reference"):
        copies = [torch.empty_like(p).copy_(p) for p in params] if impl != "triton" else None
        mine = params if copies is None else copies
        before = [p.clone() for p in mine]
        feature_sgd_(mine, grads, rates, inners=[i for i, _ in layouts], lr=0.3, impl=impl)
        results.append([p.clone() for p in mine])
        for p, old in zip(mine, before):
            p.copy_(old)
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.interpreted
def test_gradients_may_move_and_plans_are_told_apart():
    from alrao_fast.kernels.feature import plan

    param, rate = torch.zeros(6, 4, device=DEVICE), torch.ones(6, device=DEVICE)
    for step in range(3):
        grad = torch.full((6, 4), float(step), device=DEVICE)
        feature_sgd_([param], [grad], [rate], impl="triton")
        del grad
    assert (param == -3).all()
    known = len(plan._plans)
    # The same memory as columns: another layout, so another plan.
    columns = torch.arange(4.0, device=DEVICE)
    feature_sgd_([param], [torch.ones_like(param)], [columns], inners=[1], impl="triton")
    assert (param == -3 - torch.arange(4.0, device=DEVICE)).all()
    assert len(plan._plans) == min(known + 1, plan._MAX_PLANS)


@pytest.mark.interpreted
def test_reciprocals_divide_exactly():
    from alrao_fast.kernels.feature.plan import reciprocal

    for divisor in [*range(1, 70), 1000, 4095, 4096, 65537, 2**31 - 1]:
        magic, shift = reciprocal(divisor)
        for n in {0, 1, divisor - 1, divisor, 2 * divisor - 1, 2**31 - 1, 123456789}:
            if 0 <= n < 2**31:
                assert ((n * magic >> 32) + n) >> shift == n // divisor
                assert (n * magic >> 32) + n < 2**32


# ---- the dispatcher and the compiler ----


@pytest.mark.interpreted
def test_opcheck():
    x, weight, bias, log_posterior, target = testing.mixture_inputs(5, 3, 4, 2, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    ops = torch.ops.alrao_fast
    nll = (*leaves, log_posterior, target, -100, True, True, True, 1 << 20)
    torch.library.opcheck(ops.switch_mixture_nll__triton.default, nll)
    arguments = (*leaves, log_posterior, 1 << 20)
    torch.library.opcheck(ops.switch_mixture_log_prob__triton.default, arguments)
    state = (
        torch.zeros(2, 3, dtype=torch.float64, device=DEVICE),
        torch.zeros(3, dtype=torch.float64, device=DEVICE),
        torch.tensor(1, device=DEVICE),
    )
    evidence = torch.zeros(3, device=DEVICE)
    torch.library.opcheck(ops.switch_update___triton.default, (*state, evidence, 0.999))
    running, stats = torch.rand(2, 3, 3, dtype=torch.float64).to(DEVICE)
    torch.library.opcheck(
        ops.switch_observe___triton.default, (*state, running, stats, True, 0.999)
    )


def classifier(seed=0):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    net = AlraoModel(backbone, ClassifierClones(8, 5, 3)).to(DEVICE)
    return net, AlraoSGD(net, (1e-3, 1.0), momentum=0.9, generator=torch.Generator().manual_seed(1))


def batches(count):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = torch.randn(7, 6, generator=generator).to(DEVICE)
        yield x, torch.randint(5, (7,), generator=generator).to(DEVICE)


def train(net, optimizer, forward, steps=3):
    for x, y in batches(steps):
        optimizer.zero_grad()
        forward(x, targets=y).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()] + [net.head.switch.logw.clone()]


@pytest.mark.interpreted
def test_training_follows_the_reference():
    results = []
    for name in ("triton", "reference"):
        with backends.use_backend(name):
            net, optimizer = classifier()
            results.append(train(net, optimizer, net))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreted
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    results = []
    with backends.use_backend("triton"):
        for compiled in (False, True):
            net, optimizer = classifier()
            forward = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
            results.append(train(net, optimizer, forward))
    torch._dynamo.reset()
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_training_step_in_a_cuda_graph(set_to_none):
    with backends.use_backend("triton"):
        net, optimizer = classifier()
        expected = train(net, optimizer, net, steps=6)
        net, optimizer = classifier()
        feed = list(batches(6))
        x, y = (t.clone() for t in feed[0])

        def step():
            optimizer.zero_grad(set_to_none=set_to_none)
            net(x, targets=y).backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for new_x, new_y in feed[:3]:
                x.copy_(new_x)
                y.copy_(new_y)
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if set_to_none:
            optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            step()
        for new_x, new_y in feed[3:]:
            x.copy_(new_x)
            y.copy_(new_y)
            graph.replay()
        actual = [p.detach().clone() for p in net.parameters()] + [net.head.switch.logw.clone()]
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
