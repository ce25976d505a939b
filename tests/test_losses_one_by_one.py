"""Protects the backward of losses that are not summed, of what a CPU's forward kept and of the op run again.

Their error budgets: test_loss_options.py, among the other options.
"""

import pytest
import torch
from mixture_harness import INF, NAN, case, gaussian_inputs
from torch.autograd import forward_ad

from alrao_fast import nn, testing
from alrao_fast.functional import switch_mixture_gaussian_stats, switch_mixture_stats
from alrao_fast.ops.mixture import per_sample

OP = "switch_mixture"
pytestmark = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
# B, D, C, N, memory budget: in one chunk and in many, of both ways through the clones.
SHAPES = {
    "joint": (33, 20, 7, 5, None),
    "joint, many chunks": (200, 12, 9, 4, 1 << 13),
    # The last task of the backward's product has fewer rows than the others.
    "joint, several tasks": (130, 130, 61, 7, None),
    "streamed": (19, 6, 2500, 2, None),
    "streamed, many chunks": (50, 5, 2100, 3, 1 << 19),
}
OPTIONS = ["none", "losses one by one", "all, one by one", "all of probabilities, one by one"]


def leaves_of(inputs, frozen=()):
    leaves = enumerate(inputs[:3])
    return [t.detach().clone().requires_grad_(i not in frozen) for i, t in leaves]


def run(inputs, factors, function=switch_mixture_stats, impl="cpu", frozen=(), **options):
    """Losses, statistics and the gradients of the losses' sum times `factors`."""
    leaves = leaves_of(inputs, frozen)
    losses, stats = function(*leaves, *inputs[3:], impl=impl, **options)
    losses.backward(factors.to(losses))
    return losses.detach(), stats, *(t.grad for t in leaves)


@pytest.fixture
def calls(monkeypatch):
    """The losses whose backward took what was kept."""
    seen = []
    backward = per_sample._backward

    def counted(*tensors):
        seen.append(tensors)
        return backward(*tensors)

    monkeypatch.setattr(per_sample, "_backward", counted)
    return seen


def again(monkeypatch):
    monkeypatch.setattr(per_sample, "_KEPT", 0)


def with_trouble(inputs):
    """Samples of infinite features, a clone with weights that are none, and one that dies of a sample alone."""
    x, weight = inputs.x.clone(), inputs.weight.clone()
    x[2], x[5, 0] = NAN, INF
    weight[0, 0, 0] = NAN
    return inputs._replace(x=x, weight=weight)


@pytest.mark.parametrize("factors", ["of all", "0 for some"])
@pytest.mark.parametrize("trouble", [False, True], ids=["", "trouble"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_what_was_kept_says_what_the_op_says(
    backend, monkeypatch, calls, name, shape, trouble, factors
):
    *sizes, memory_budget = SHAPES[shape]
    inputs, options = case(name, *sizes, dtype=torch.float64)
    options |= {"reduction": "none", "memory_budget": memory_budget}
    if trouble:
        inputs = with_trouble(inputs)
    weights = torch.linspace(-1, 2, sizes[0])
    if factors == "0 for some":
        weights[[2, 5, -1]] = 0
    kept = run(inputs, weights, **options)
    ((dlogits, *_),) = calls
    assert (dlogits.size(0) > 1) == ("many chunks" in shape)
    again(monkeypatch)
    expected = run(inputs, weights, **options)
    assert len(calls) == 1
    torch.testing.assert_close(kept, expected, equal_nan=True, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_values(backend, calls, monkeypatch, dtype):
    inputs = gaussian_inputs(40, 6, 3, 4, dtype=dtype)
    options = {"function": switch_mixture_gaussian_stats, "sigma2": 0.5, "reduction": "none"}
    weights = torch.linspace(-1, 2, 40)
    kept = run(inputs, weights, **options)
    again(monkeypatch)
    expected = run(inputs, weights, **options)
    assert len(calls) == 1
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("samples", [0, 9])
def test_nothing_counted(backend, calls, samples):
    inputs = testing.mixture_inputs(samples, 4, 5, 3)
    inputs.target.fill_(-100)
    losses, _, *gradients = run(
        inputs, torch.ones(samples), reduction="none", memory_budget=1 << 20
    )
    assert len(calls) == 1 and losses.shape == (samples,) and not losses.any()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", ["not counted", "factor 0", "weights too small"])
def test_a_chunk_without_gradients(backend, calls, kind):
    """In the last chunk no sample counts, or all clones are dead, or what a weight leaves of a gradient is 0."""
    *sizes, memory_budget = SHAPES["streamed, many chunks"]
    inputs = testing.mixture_inputs(*sizes)
    factors, last = torch.linspace(1, 2, sizes[0]), slice(32, None)
    options = {"reduction": "none", "memory_budget": memory_budget}
    zeros = factors.clone()
    zeros[last] = 0
    expected = run(inputs, zeros, **options)[2:]
    ((dlogits, *_),) = calls
    assert dlogits.shape[::2] == (2, 32)
    if kind == "weights too small":
        options["sample_weight"] = torch.ones(sizes[0])
        options["sample_weight"][last] = 1e-45
    else:
        inputs.x[last] = NAN
    if kind == "not counted":
        inputs.target[last] = -100
    found = run(inputs, zeros if kind == "factor 0" else factors, **options)[2:]
    torch.testing.assert_close(found, expected)


def test_a_clone_learns_nothing_only_if_the_sample_counts(backend):
    """Clone 0 is dead for sample 1, and learns from the others where that one's loss has the factor 0."""
    inputs = testing.mixture_inputs(4, 3, 5, 2, dtype=torch.float64)
    inputs.weight[0, 0, 0] = 1e200
    inputs.x[:, 0] = 0
    inputs.x[1, 0] = 1e200
    factors = torch.tensor([1.0, 0, 1, 1])
    *_, dweight, dbias = run(inputs, factors, reduction="none")
    without = inputs._replace(x=inputs.x[[0, 2, 3]], target=inputs.target[[0, 2, 3]])
    *_, expected, expected_bias = run(without, torch.ones(3), reduction="none")
    torch.testing.assert_close((dweight, dbias), (expected, expected_bias))
    assert dweight[0].any()
    *_, dweight, dbias = run(inputs, torch.ones(4), reduction="none")
    assert not dweight[0].any() and not dbias[0].any() and dweight[1].any()


@pytest.mark.parametrize("frozen", [set(), {1, 2}], ids=["", "weights frozen"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_sample_that_does_not_count_has_no_gradient(backend, monkeypatch, bad, kept, frozen):
    """Whatever its loss, which is 0, was multiplied by: as of torch's cross_entropy."""
    if not kept:
        again(monkeypatch)
    inputs = testing.mixture_inputs(9, 4, 5, 3)
    inputs.target[2] = -100
    for options in ({}, {"sample_weight": torch.ones(9).index_fill(0, torch.tensor(7), 0)}):
        factors = torch.linspace(-1, 2, 9)
        expected = run(inputs, factors, reduction="none", frozen=frozen, **options)
        factors[[2, 7] if options else [2]] = bad
        found = run(inputs, factors, reduction="none", frozen=frozen, **options)
        assert expected[2].isfinite().all() and not found[2][2].any()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # Another's factor is seen.
    factors[4] = bad
    for gradient in run(inputs, factors, reduction="none", frozen=frozen)[2:]:
        assert gradient is None or gradient.isfinite().logical_not().any()


def test_a_graph_that_is_kept_can_be_used_again(backend, calls):
    inputs = testing.mixture_inputs(9, 4, 5, 3)
    leaves = leaves_of(inputs)
    losses, _ = switch_mixture_stats(*leaves, *inputs[3:], reduction="none", impl="cpu")
    first = torch.autograd.grad(losses.sum(), leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    for g in first:
        g.fill_(NAN)
    for factor in (1, -2):
        found = torch.autograd.grad(losses.sum() * factor, leaves, retain_graph=True)
        torch.testing.assert_close(found, [factor * g for g in copies])
    assert len(calls) == 3


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("frozen", [{0}, {1, 2}, {1}, {2}, {0, 1}], ids=str)
def test_what_is_frozen_gets_no_gradient(backend, calls, monkeypatch, frozen, kept):
    if not kept:
        again(monkeypatch)
    inputs = testing.mixture_inputs(9, 4, 5, 3)
    leaves = leaves_of(inputs, frozen)
    losses, _ = switch_mixture_stats(*leaves, *inputs[3:], reduction="none", impl="cpu")
    losses.sum().backward()
    assert len(calls) == kept
    expected = run(inputs, torch.ones(9), reduction="none")[2:]
    for i, (leaf, gradient) in enumerate(zip(leaves, expected)):
        assert (leaf.grad is None) == (i in frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_little_memory_takes_the_op_again(backend, calls, dtype):
    """Up to eight times the memory budget is kept, of 4 bytes for each of 16 samples, 5 classes and 3 clones, 8 in
    float64."""
    inputs = testing.mixture_inputs(9, 4, 5, 3, dtype=dtype)
    fits = -(-16 * 5 * 3 * (8 if dtype == torch.float64 else 4) // 8)
    results = []
    for memory_budget, kept in ((fits - 1, 0), (fits, 1)):
        results.append(run(inputs, torch.ones(9), reduction="none", memory_budget=memory_budget))
        assert len(calls) == kept
    torch.testing.assert_close(*results)


def test_differentiable_gradients_are_of_the_posterior_that_was_there(backend):
    """The forward observes its batch; a gradient with a graph, which is computed later, has the posterior before."""
    torch.manual_seed(0)
    head = nn.ClassifierClones(4, 5, 3, reduction="none", dtype=torch.float64)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(5, (9,))
    for _ in range(3):
        losses = head(3 * x, y)
    plain = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    with_graph = torch.autograd.grad(losses.sum(), x, create_graph=True)
    torch.testing.assert_close(with_graph, plain)


def test_batched_and_dual_factors(backend, calls):
    """Of the reference, with the posterior that was there; what was kept says the same of each."""
    torch.manual_seed(0)
    head = nn.ClassifierClones(4, 5, 3, reduction="none", dtype=torch.float64)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    losses = head(x, torch.randint(5, (9,)))
    leaves = [x, head.weight, head.bias]

    def of(factors, **options):
        return torch.autograd.grad(losses, leaves, factors, retain_graph=True, **options)

    every = torch.eye(9, dtype=torch.float64)
    batch = of(every, is_grads_batched=True)
    for i in range(9):
        torch.testing.assert_close(of(every[i]), tuple(g[i] for g in batch))
    assert len(calls) == 9
    with forward_ad.dual_level():
        duals = of(forward_ad.make_dual(every[0], every[1]))
        tangents = [forward_ad.unpack_dual(g).tangent for g in duals]
    torch.testing.assert_close(tangents, [g[1] for g in batch])


def test_no_factors(backend):
    """A function behind the losses may say that it has no gradient."""

    class Constant(torch.autograd.Function):
        forward = staticmethod(lambda ctx, losses: losses.clone())
        backward = staticmethod(lambda ctx, grad: None)

    inputs = testing.mixture_inputs(9, 4, 5, 3)
    leaves = leaves_of(inputs)
    losses, _ = switch_mixture_stats(*leaves, *inputs[3:], reduction="none", impl="cpu")
    Constant.apply(losses).sum().backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves)


def test_a_written_input_is_noticed(backend):
    inputs = testing.mixture_inputs(9, 4, 5, 3)
    leaves = leaves_of(inputs)
    x = leaves[0] * 1
    losses, _ = switch_mixture_stats(x, *leaves[1:], *inputs[3:], reduction="none", impl="cpu")
    x.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_tensors_without_values_train(backend, calls):
    head = nn.ClassifierClones(4, 5, 3, reduction="none")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(9, 4, requires_grad=True)
        head(x, torch.zeros(9, dtype=torch.int64)).sum().backward()
    assert x.grad.shape == x.shape and not calls


def test_no_graph_has_it(backend):
    inputs = testing.mixture_inputs(9, 4, 5, 3)
    arguments = (-100, False, True, True, 1 << 20, None, None, 0.0, 0.0, 0.0, True)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(NotImplementedError, match=r"per_sample: got True with gradients"),
    ):
        torch.ops.alrao_fast.switch_mixture_nll(*inputs, *arguments)
