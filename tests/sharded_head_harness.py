"""What the tests of heads over ranks share: heads, their calls, and what becomes of a training."""

import torch
from sharded_harness import assert_close, batch, states, weights
from torch.distributed.tensor.parallel import parallelize_module

import alrao_fast as alrao
from alrao_fast.distributed import ClassesParallel, ClonesParallel

STYLES = {"clones": ClonesParallel, "classes": ClassesParallel}


def parallel(net, mesh, style="clones"):
    parallelize_module(net, mesh, {"head": STYLES[style]()})
    return net


def result(net, opt):
    x, _ = batch(50)
    found = {
        "weights": weights(net),
        "states": states(net, opt),
        "logw": net.head.switch.logw.clone(),
        **{key: value for key, value in net.clone_metrics().items() if key != "count"},
        "clone_lr": net.head.clone_lr.clone(),
    }
    with torch.no_grad():
        found["prediction"] = net.eval()(x)
    net.train()
    return found


def clipped(net):
    return lambda: alrao.clip_grad_norm_(net, 1.0)


def classifier(
    x=(6, 7, 8),
    targets=None,
    options=None,
    dead=(),
    dtype=torch.float32,
    classes=10,
    flat=False,
    large=False,
    **call,
):
    """A head, its features and the arguments of one call; `dead` clones have an infinite weight."""
    torch.manual_seed(3)
    weights = (
        torch.rand(classes) + 0.5 if options is not None and options.pop("weighted", 0) else None
    )
    head = alrao.ClassifierClones(
        8, classes, 5, class_weight=weights, dtype=dtype, **(options or {})
    )
    with torch.no_grad():
        head.weight[list(dead), 3, 2] = float("inf")
        if large:
            head.weight[2, 3, 2] = 100.0
        if flat:
            head.weight.zero_()
            head.bias.zero_()
        head.switch.update(torch.tensor([0.3, -0.2, 0.8, 0.1, 0.0]))
    x = torch.randn(x, dtype=dtype, requires_grad=True)
    if large:
        # On which that clone overflows, and no other.
        x.data[1, 2, 2] = 1e37
    y = torch.randint(classes, x.shape[:-1])
    if targets == "probabilities":
        y = torch.rand(*y.shape, classes)
        y[0, 1] = 0
    elif targets == "ignored":
        y[1:4, 2] = -100
    elif targets == "none":
        y[:] = -100
    if call.get("sample_weight"):
        call["sample_weight"] = torch.rand(y.shape).where(torch.rand(y.shape) < 0.8, 0)
    return head, x, y, call


def close(found, expected, metrics=("logw", "loss", "accuracy", "clone_lr", "prediction")):
    for name in ("weights", "states"):
        assert_close(found[name], expected[name])
    for name in metrics:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
