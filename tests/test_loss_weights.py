"""Protects what the losses of samples are weighed by, `switch_mixture_weights`, and what their sum is divided by.

- The op against the same in operations of PyTorch; when it copies probabilities. The op of the loss makes the same
  factors, to the bit, and refuses to make them of nothing; a compiled step refuses what is not finite, too.
- A number of items, wherever it is, needs no weights; weights below 0 turn the gradients round.
"""

import pytest
import torch
from mixture_harness import NAMES, NAN, SHAPES, TILED_SHAPES, device_of, gradients

from alrao_fast import testing
from alrao_fast.functional import switch_mixture_nll, switch_mixture_stats
from alrao_fast.ops import dispatch
from alrao_fast.ops.mixture import weighting

OP = "switch_mixture"
pytestmark = pytest.mark.emulated

# Targets of which few samples and many are weighed by other kernels.
WEIGHED = {
    "classes": {"sample_weight": True, "class_weight": True},
    "samples of classes": {"sample_weight": True},
    "divided": {"class_weight": True, "mean": False, "divisor": 7.0},
    "probabilities": {"soft": True},
    "weighted probabilities": {"soft": True, "sample_weight": True, "class_weight": True},
    "divided probabilities": {"soft": True, "class_weight": True, "mean": False, "items": 3},
}


@pytest.mark.interpreted(size=[(5, 3)])
@pytest.mark.sanitized
@pytest.mark.parametrize("size", [(5, 3), (1100, 6), (3, 2500)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", WEIGHED)
def test_weights(compiled, device, name, smoothing, size):
    """The op against the same in operations of PyTorch."""
    given = {"soft": False, "mean": True, "divisor": 1.0, "items": None, **WEIGHED[name]}
    batch, classes = size
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(classes, (batch,), generator=generator)
    target[1] = -100
    if given["soft"]:
        target = torch.rand(batch, classes, generator=generator)
        target[-1] = 0
    v = torch.rand(batch, generator=generator)
    v[1] = 0 if given["soft"] else NAN
    arguments = (
        target,
        v if given.get("sample_weight") else None,
        torch.rand(classes, generator=generator) if given.get("class_weight") else None,
        -100,
        smoothing,
        given["mean"],
        given["divisor"],
        None if given["items"] is None else torch.tensor(given["items"]),
    )
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments]
    expected = weighting.weights(*wide)
    arguments = [t.to(device) if torch.is_tensor(t) else t for t in arguments]
    op = dispatch.overload("switch_mixture_weights", compiled)
    found, factors, scaled, likeliest = (t.cpu() for t in op(*arguments))
    torch.testing.assert_close(factors.double(), expected.row_weight, rtol=1e-5, atol=1e-12)
    if expected.class_weight is None:
        assert scaled.numel() == 0
    else:
        torch.testing.assert_close(scaled.double(), expected.class_weight, rtol=1e-5, atol=0)
    if given["soft"]:
        torch.testing.assert_close(found.double(), expected.target, rtol=1e-5, atol=1e-12)
        assert torch.equal(likeliest, expected.target.argmax(1))
    else:
        assert found.numel() == likeliest.numel() == 0


def test_probabilities_are_copied_for_a_reason_alone():
    """On the CPU, where somebody looks at the sums."""
    if reason := testing.require(OP, "cpu"):
        pytest.skip(reason)
    op = dispatch.overload("switch_mixture_weights")
    q = torch.rand(4, 300).softmax(1)
    bad = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert op(q, None, None, -100, 0.0, True, 1.0, None, False)[0].numel() == 0
    for target, weight in (
        (q * 1.001, None),
        (q * torch.ones(4, 1).index_fill(0, torch.tensor(2), 0), None),
        (q, bad),
    ):
        found = op(target, weight, None, -100, 0.0, True, 1.0, None, False)[0]
        assert found.shape == q.shape
        torch.testing.assert_close(found[:2], q[:2])


@pytest.mark.interpreted(shape=["ragged lanes, joint"])
@pytest.mark.sanitized
@pytest.mark.parametrize("shape", ["ragged lanes, joint", "streamed, ragged last block"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", WEIGHED)
def test_the_loss_makes_its_factors(compiled, name, smoothing, shape):
    """To the bit those of the other op."""
    given = {"soft": False, "mean": True, "divisor": 1.0, "items": None, **WEIGHED[name]}
    *sizes, _ = SHAPES[shape]
    device = device_of(compiled)
    inputs = testing.mixture_inputs(*sizes, device=device)
    batch, classes = sizes[0], sizes[2]
    target = inputs.target
    if given["soft"]:
        target = torch.rand(batch, classes, device=device)
        target[-1] = 0
    weights = (
        torch.rand(batch, device=device) if given.get("sample_weight") else None,
        torch.rand(classes, device=device) if given.get("class_weight") else None,
    )
    items = None if given["items"] is None else torch.tensor(given["items"], device=device)
    divisors = given["divisor"], items
    weigh = dispatch.overload("switch_mixture_weights", compiled)
    found, rows, scaled, likeliest = weigh(
        target, *weights, -100, smoothing, given["mean"], *divisors
    )
    op = dispatch.overload("switch_mixture_nll", compiled)
    needs, regularisers = (True, True, 1 << 30), (smoothing, 0.01, 0.0, False)
    made = rows, scaled if scaled.numel() else None, *regularisers, 1.0, None
    made += (likeliest,) if given["soft"] else ()
    expected = op(*inputs[:4], found if given["soft"] else target, -100, False, *needs, *made)
    options = *weights, *regularisers, *divisors, None, True
    results = op(*inputs[:4], target, -100, given["mean"], *needs, *options)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_denormal_weights_count(reduction, soft):
    """The CPU's kernels flush denormal numbers within their tasks; a weight is one all the same."""
    if reason := testing.require(OP, "cpu"):
        pytest.skip(reason)
    inputs = testing.mixture_inputs(5, 4, 10, 3)
    target = torch.rand(5, 10) if soft else inputs.target
    weight = torch.tensor([1e-39, -3e-40, 0, 2e-39, 1e-38])
    options = {"sample_weight": weight, "reduction": reduction}
    expected, all_stats = switch_mixture_stats(*inputs[:4], target, **options, impl="reference")
    loss, stats = switch_mixture_stats(*inputs[:4], target, **options, impl="cpu")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(stats, all_stats, rtol=1e-4, atol=0)
    assert (stats[2] == 4).all()


@pytest.mark.interpreted
def test_factors_of_nothing(compiled):
    device = device_of(compiled)
    inputs = testing.mixture_inputs(5, 3, 4, 2, device=device)
    op = dispatch.overload("switch_mixture_nll", compiled)
    v, soft = torch.ones(5, device=device), torch.ones(5, 4, device=device)
    likeliest = torch.zeros(5, dtype=torch.int64, device=device)
    for target, weight, per_sample, classes in (
        (inputs.target, None, False, None),
        (inputs.target, v, True, None),
        (soft, v, False, likeliest),
    ):
        options = weight, None, 0.0, 0.0, 0.0, per_sample, 1.0, None, classes, True
        with pytest.raises(RuntimeError, match="make_factors: got True, expected False without"):
            op(*inputs[:4], target, -100, False, False, False, 1 << 20, *options)


def test_a_compiled_step_refuses_weights_that_are_not_finite():
    if reason := testing.require(OP, "cpu"):
        pytest.skip(reason)
    inputs = testing.mixture_inputs(5, 3, 4, 2)
    step = torch.compile(switch_mixture_nll, fullgraph=True, backend="aot_eager")
    v = torch.ones(5)
    step(*inputs, impl="cpu", sample_weight=v)
    v[3] = NAN
    with pytest.raises(RuntimeError, match="sample_weight: got nan at position 3"):
        step(*inputs, impl="cpu", sample_weight=v)


@pytest.mark.interpreted(shape=["ragged lanes, joint"], kind=["int", "float32"])
@pytest.mark.sanitized(dtype=[torch.float32], kind=["int", "float32"])
@pytest.mark.parametrize("shape", ["ragged lanes, joint", "streamed, ragged last block"])
@pytest.mark.parametrize("kind", ["float", "int", "float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_divisor_needs_no_weights(backend, device, dtype, kind, shape):
    """A number of items, on the device or not, is the mean's divisor: the kernels without options take it."""
    *sizes, _ = SHAPES[shape]
    inputs = testing.mixture_inputs(*sizes, dtype=dtype, device=device)
    count = len(inputs.x)
    items = count if kind == "float" else torch.tensor(count, device=device)
    if kind.startswith("float") and kind != "float":
        items = items.to(getattr(torch, kind))
    mean = gradients(inputs, backend)
    divided = gradients(inputs, backend, num_items_in_batch=items)
    for name, got, expected in zip(NAMES, divided, mean):
        torch.testing.assert_close(
            got, expected, rtol=4e-3 if dtype == torch.float16 else 2e-5, atol=1e-7, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
@pytest.mark.parametrize("shape", ["ragged lanes, joint", "streamed, ragged last block"])
def test_a_divisor_on_the_device(compiled, shape, kind, dtype):
    """As the ops take it where nobody may look."""
    *sizes, _ = SHAPES[shape]
    device = device_of(compiled)
    inputs = testing.mixture_inputs(*sizes, dtype=dtype, device=device)
    op = dispatch.overload("switch_mixture_nll", compiled)
    needs = False, True, True, 1 << 30
    items = torch.tensor(4, device=device, dtype=kind)
    for divisor, smoothing in ((2.0, 0.0), (2.0, 0.1)):
        rest = None, None, smoothing, 0.0, 0.0, False
        by_number = op(*inputs, -100, *needs, *rest, 8.0, None)
        found = op(*inputs, -100, *needs, *rest, divisor, items)
        torch.testing.assert_close(found, by_number)


@pytest.mark.interpreted(shape=["ragged lanes, joint"])
@pytest.mark.sanitized
@pytest.mark.parametrize("shape", ["ragged lanes, joint", *TILED_SHAPES])
def test_weights_below_0_turn_everything_round(backend, device, shape):
    """Also where logits are so far apart that what most classes have of a factor underflows."""
    *sizes, _ = SHAPES[shape]
    inputs = testing.mixture_inputs(*sizes, device=device, scale=60.0)
    v = torch.rand(sizes[0], device=device)
    loss, stats, *found = gradients(inputs, backend, sample_weight=v, reduction="sum")
    other, seen, *turned = gradients(inputs, backend, sample_weight=-v, reduction="sum")
    assert torch.equal(seen, stats)
    for name, got, expected in zip(("loss", *NAMES[2:]), (other, *turned), (loss, *found)):
        torch.testing.assert_close(got, -expected, rtol=1e-5, atol=1e-6, msg=name)
