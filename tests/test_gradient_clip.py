"""Protects the op that clips gradients by the norms of their segments, on every backend that is available.

- One case by hand; every order of norm and every dtype against the float64 reference, within its error budget; torch's
  clip_grad_norm_, segment by segment.
- Gradients of any strides and dtypes together, empty ones, tails, odd addresses, several pieces; gaps stay.
- Norms that are not finite stay within their segment; inf writes nothing; norms that are given; numbers whose squares
  overflow; the same bits on any number of threads.
- opcheck, messages; nothing is written when a check fails.
"""

import math

import pytest
import torch

from alrao_fast import testing
from alrao_fast.functional import gradient_clip_
from alrao_fast.ops import dispatch
from alrao_fast.reference.gradient_clip import gradient_clip_by_, gradient_norms

OP = "gradient_clip"
pytestmark = [pytest.mark.emulated, pytest.mark.interpreted]
INF, NAN = math.inf, math.nan
ORDERS = [2.0, 1.0, INF, 3.0, 0.5]
SEGMENTS = testing.clip_problem().segments


def problem(*where, **options):
    """Gradients, and the segments of each."""
    _, grads, firsts, counts, _ = testing.clip_problem(*where, **options)
    return grads, firsts, counts


def segments_of(grads, firsts, counts, segments=SEGMENTS):
    """The parts of the gradients that are in each segment."""
    found = [[] for _ in range(segments)]
    for grad, first, count in zip(grads, firsts, counts):
        for n in range(count):
            found[first + n].append(grad if count == 1 else grad[n])
    return found


def copies(grads):
    return [grad.to("cpu", torch.float64, copy=True) for grad in grads]


@pytest.mark.sanitized
def test_hand_computed(backend, device):
    # Norms 5, then 13 and 1 of two clones.
    grads = [
        torch.tensor([[3.0], [4.0]], device=device),
        torch.tensor([[[5.0, 0.0]], [[0.0, 0.6]]], device=device),
        torch.tensor([[12.0], [-0.8]], device=device),
    ]
    norms = gradient_clip_(grads, [0, 1, 1], [1, 2, 2], 3, max_norm=2.0, impl=backend)
    torch.testing.assert_close(norms.tolist(), [5.0, 13.0, 1.0])
    expected = [[[1.2], [1.6]], [[[10 / 13, 0.0]], [[0.0, 0.6]]], [[24 / 13], [-0.8]]]
    for grad, values in zip(grads, expected):
        torch.testing.assert_close(grad.tolist(), values, rtol=1e-6, atol=1e-7)


@pytest.mark.sanitized(dtype=[torch.float32, torch.bfloat16], order=[2.0, INF])
@pytest.mark.interpreted(order=[2.0, INF, 3.0])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_follows_the_reference(compiled, device, dtype, order):
    ours, *spans = problem(dtype, device)
    reference, truth = problem(dtype)[0], copies(problem(dtype)[0])
    max_norm = 1.5 if order >= 1 else 200.0
    norms = gradient_clip_(
        ours, *spans, SEGMENTS, max_norm=max_norm, norm_type=order, impl=compiled
    )
    own = gradient_clip_(
        reference, *spans, SEGMENTS, max_norm=max_norm, norm_type=order, impl="reference"
    )
    exact = gradient_norms(truth, *spans, SEGMENTS, order)
    gradient_clip_by_(truth, *spans, exact, max_norm)
    assert norms.dtype == torch.float64 and norms.device == ours[0].device
    assert norms[-1] == 0
    testing.assert_within_budget(norms, own, exact, "norms", slack=1e-6)
    for name, *tensors in zip(testing.CLIP_CASES, ours, reference, truth):
        if tensors[0].numel():
            # In float64 the order of the sums is all that differs.
            slack = max(testing.FEATURE_SLACK[dtype], testing.SLACK[torch.float64])
            testing.assert_within_budget(*tensors, name, slack=slack)


@pytest.mark.parametrize("order", [2.0, 1.0, INF, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_each_segment_is_torchs(backend, device, dtype, order):
    # torch sums in the gradients' dtype: float64 copies show what it would have with exact sums.
    ours, *spans = problem(dtype, device)
    theirs = copies(ours)
    norms = gradient_clip_(ours, *spans, SEGMENTS, max_norm=1.5, norm_type=order, impl=backend)
    for segment, parts in enumerate(segments_of(theirs, *spans)):
        params = [torch.nn.Parameter(torch.zeros_like(part)) for part in parts]
        for param, part in zip(params, parts):
            param.grad = part
        params = [param for param in params if param.numel()]
        total = torch.nn.utils.clip_grad_norm_(params, 1.5, order, foreach=False)
        torch.testing.assert_close(norms[segment].item(), float(total), rtol=1e-6, atol=0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for grad, other in zip(ours, theirs):
        torch.testing.assert_close(grad.double().cpu(), other, rtol=tolerance, atol=1e-12)


@pytest.mark.sanitized
def test_dtypes_in_one_call(backend, device):
    ours, *spans = problem(None, device)
    exact = gradient_norms(copies(ours), *spans, SEGMENTS, 2.0)
    norms = gradient_clip_(ours, *spans, SEGMENTS, max_norm=1.0, impl=backend)
    torch.testing.assert_close(norms.cpu(), exact, rtol=1e-6, atol=0)
    after = gradient_norms(copies(ours), *spans, SEGMENTS, 2.0)
    # The dtypes' roundings average out.
    torch.testing.assert_close(after, exact.clamp(max=1.0), rtol=3e-3, atol=0)


def test_gaps_stay_as_they_are(backend, device):
    (grad,), first, count = problem(torch.float32, device, names=["with gaps"])
    room = grad._base
    gradient_clip_([grad], first, count, 1, max_norm=0.5, impl=backend)
    assert room[:, 1::2].eq(777.0).all()
    torch.testing.assert_close(grad.norm().item(), 0.5, rtol=1e-5, atol=0)


def test_only_what_is_too_long_is_written(backend, device):
    grads, *spans = problem(torch.bfloat16, device)
    before = [grad.clone() for grad in grads]
    norms = gradient_clip_(grads, *spans, SEGMENTS, max_norm=3.5, impl=backend)
    for segment, (old, new) in enumerate(
        zip(segments_of(before, *spans), segments_of(grads, *spans))
    ):
        same = all(torch.equal(a, b) for a, b in zip(old, new))
        assert same == bool(norms[segment] < 3.5)
    assert norms[1] > 3.5 > norms[8] > 0


@pytest.mark.sanitized
@pytest.mark.parametrize("order", [2.0, 1.0, INF, 3.0])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_norm_that_is_not_finite_stays_in_its_segment(backend, device, value, order):
    names = ["a weight", "clones", "bias of clones"]
    grads, *spans = problem(torch.float32, device, names=names)
    grads[1][2, 1, 3] = value
    clean, *_ = problem(torch.float32, device, names=names)
    norms = gradient_clip_(grads, *spans, 5, max_norm=1.0, norm_type=order, impl=backend)
    gradient_clip_(clean, *spans, 5, max_norm=1.0, norm_type=order, impl=backend)
    assert norms.isfinite().tolist() == [True, True, True, False, True]
    own, others = [0, 1, 3], torch.tensor([0, 1, 3], device=device)
    assert torch.equal(grads[0], clean[0])
    for grad, other in zip(grads[1:], clean[1:]):
        assert torch.equal(grad[others], other[others]), own
    # As torch: NaN, or zeros and NaN where the infinity was.
    if math.isnan(value):
        assert grads[1][2].isnan().all() and grads[2][2].isnan().all()
    else:
        assert grads[1][2].isnan().sum() == 1 and grads[2][2].eq(0).all()
        assert grads[1][2].nan_to_num(nan=0.0).eq(0).all()


@pytest.mark.parametrize("value", [1.0, NAN, INF])
def test_an_infinite_max_norm_writes_nothing(backend, device, value):
    grads, *spans = problem(torch.float32, device)
    grads[0][0, 0] = value
    before = [grad.clone() for grad in grads]
    versions = [grad._version for grad in grads]
    norms = gradient_clip_(grads, *spans, SEGMENTS, max_norm=INF, impl=backend)
    exact = gradient_norms(copies(grads), *spans, SEGMENTS, 2.0)
    torch.testing.assert_close(norms.cpu(), exact, rtol=1e-6, atol=0, equal_nan=True)
    for grad, old in zip(grads, before):
        assert torch.equal(grad.nan_to_num(nan=7.0), old.nan_to_num(nan=7.0))
    assert versions == [grad._version for grad in grads]


def test_given_norms(backend, device):
    grads, *spans = problem(torch.float64, device)
    before = [grad.clone() for grad in grads]
    norms = torch.arange(SEGMENTS, dtype=torch.float64, device=device)
    found = gradient_clip_(grads, *spans, SEGMENTS, max_norm=2.0, norms=norms, impl=backend)
    assert torch.equal(found, norms)
    for segment, (old, new) in enumerate(
        zip(segments_of(before, *spans), segments_of(grads, *spans))
    ):
        factor = min(1.0, 2.0 / (segment + 1e-6))
        for a, b in zip(old, new):
            torch.testing.assert_close(b, a * factor, rtol=1e-15, atol=0)


@pytest.mark.sanitized
@pytest.mark.parametrize("scale", [1e25, 1e-30])
def test_squares_that_float32_cannot_hold(backend, device, scale):
    grads, *spans = problem(torch.float32, device, scale=scale)
    exact = gradient_norms(copies(grads), *spans, SEGMENTS, 2.0)
    norms = gradient_clip_(grads, *spans, SEGMENTS, max_norm=1.0, impl=backend)
    torch.testing.assert_close(norms.cpu(), exact, rtol=1e-6, atol=0)
    assert all(grad.isfinite().all() for grad in grads)


def test_zero_max_norm(backend, device):
    grads, *spans = problem(torch.float32, device)
    gradient_clip_(grads, *spans, SEGMENTS, max_norm=0.0, impl=backend)
    assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.many_launches
def test_more_tensors_than_a_launch_takes(compiled, device):
    grads = [torch.full((1 + n % 5,), 1.0, device=device) for n in range(1500)]
    grads.append(torch.full((2, 700), 2.0, device=device))
    firsts, counts = [0] * 1500 + [1], [1] * 1500 + [2]
    total = sum(1 + n % 5 for n in range(1500))
    norms = gradient_clip_(grads, firsts, counts, 3, max_norm=1.0, impl=compiled)
    own = math.sqrt(2800)
    torch.testing.assert_close(norms.tolist(), [math.sqrt(total), own, own])
    assert all(grad.sub(1 / math.sqrt(total)).abs().max() < 1e-6 for grad in grads[:-1])


@pytest.mark.many_launches
def test_more_entries_than_the_least_chunks_hold(compiled, device):
    grads = [torch.ones(4096 * 1200 + 3, device=device), torch.ones(2, 5000, device=device)]
    norms = gradient_clip_(grads, [0, 1], [1, 2], 3, max_norm=1.0, impl=compiled)
    exact = [math.sqrt(grads[0].numel()), math.sqrt(5000), math.sqrt(5000)]
    torch.testing.assert_close(norms.tolist(), exact, rtol=1e-9, atol=0)
    for grad, norm in zip(grads, exact):
        torch.testing.assert_close(grad, torch.full_like(grad, 1 / norm), rtol=1e-6, atol=0)


def test_the_same_bits_on_any_number_of_threads():
    if testing.require(OP, "cpu"):
        pytest.skip("no kernels for the CPU")
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 70001, generator=generator)
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            grads = [first.clone(), first.clone()]
            norms = gradient_clip_(grads, [0, 1], [1, 3], 4, max_norm=1.0, impl="cpu")
            found.append((norms, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_versions_tell_autograd(backend, device):
    grad = torch.ones(5, device=device)
    gradient_clip_([grad], [0], [1], 1, max_norm=1.0, impl=backend)
    assert grad._version > 0


def test_opcheck(dispatched, device):
    grads, *spans = problem(torch.float32, device, names=["a weight", "channels_last", "clones"])
    op = dispatch.overload("gradient_clip_", dispatched)
    torch.library.opcheck(op, (grads, *spans, 5, 2.0, 1.0))
    norms = torch.ones(5, dtype=torch.float64, device=device)
    by = dispatch.overload("gradient_clip_by_", dispatched)
    torch.library.opcheck(by, (grads, *spans, norms, 1.0))


def wrong(**changed):
    arguments = {"grads": [torch.ones(2, 3), torch.ones(2)], "firsts": [0, 1], "counts": [1, 2]}
    return {**arguments, "segments": 3, "max_norm": 1.0, **changed}


def moved(grad, device):
    """A copy on the device, which shares memory where the original does."""
    if grad.is_meta:
        return grad
    if not grad.is_sparse and 0 in grad.stride():
        return grad[:1].to(device).expand_as(grad)
    return grad.detach().clone().to(device)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (
            wrong(max_norm=-1.0),
            ValueError,
            "max_norm: got -1.0, expected a number >= 0, inf for none",
        ),
        (wrong(max_norm=NAN), ValueError, "max_norm: got nan"),
        (wrong(max_norm="1"), TypeError, "max_norm: got '1'"),
        (
            wrong(norm_type=0),
            ValueError,
            "norm_type: got 0, expected the order of a norm, > 0 or inf",
        ),
        (wrong(norm_type=-INF), ValueError, "norm_type: got -inf"),
        (wrong(segments=0), ValueError, "segments: got 0"),
        (
            wrong(firsts=[0]),
            RuntimeError,
            "firsts: got 1 entries, expected 2, one for each of grads",
        ),
        (
            wrong(firsts=[0, 2]),
            RuntimeError,
            r"grads\[1\]: got the segments 2 to 3, expected some of 0",
        ),
        (wrong(firsts=[0, -1]), RuntimeError, r"grads\[1\]: got the segments -1 to 0"),
        (
            wrong(counts=[1, 3], segments=5),
            RuntimeError,
            r"grads\[1\]: got shape \[2\] for 3 segments",
        ),
        (wrong(firsts=[0, 0]), RuntimeError, r"grads\[1\]: shares only some of its segments"),
        (
            wrong(grads=[torch.ones(2, 3), torch.ones(2, dtype=torch.int64)]),
            RuntimeError,
            r"grads\[1\]: got dtype Long, expected one of Float, Double, BFloat16, Half",
        ),
        (
            wrong(grads=[torch.ones(2, 3), torch.ones(2).to_sparse()]),
            RuntimeError,
            r"grads\[1\] is sparse, expected an ordinary \(dense\) gradient",
        ),
        (wrong(grads=[torch.ones(2, 3), torch.ones(2, device="meta")]), RuntimeError, "on meta"),
        (wrong(grads=[torch.ones(2, 3), torch.ones(1).expand(2)]), RuntimeError, "share memory"),
        (wrong(norms=torch.ones(3)), RuntimeError, "norms: got dtype Float, expected Double"),
        (wrong(norms=[1.0]), TypeError, r"norms: got \[1.0\], expected a tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages(backend, device, arguments, error, words):
    arguments = dict(arguments)
    arguments["grads"] = [moved(g, device) for g in arguments["grads"]]
    if isinstance(arguments.get("norms"), torch.Tensor):
        arguments["norms"] = arguments["norms"].to(device)
    with pytest.raises(error, match=words):
        gradient_clip_(**arguments, impl=backend)
    assert arguments["grads"][0].eq(1).all()
