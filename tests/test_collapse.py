"""Protects the way back from Alrao to an ordinary network.

- Equal to the model in eval mode (mixture) or to its best clone, classification and regression, all dtypes.
- Ordinary: pickles and state_dicts, exports, runs where this package cannot be imported; backbones with extras.
- The original is untouched; diverged clones are left out; messages.
"""

import copy
import io
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alrao_fast import backends
from alrao_fast.nn import (
    AdaptiveClassifierClones,
    AlraoModel,
    ClassifierClones,
    RegressorClones,
)


class Recurrent(nn.Module):
    """[T, B, 3] -> (features [T, B, 8], state, a constant)."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 8)

    def forward(self, sequence, state=None, *, scale: float = 1.0, **unused):
        features, state = self.rnn(sequence, state)
        return features * scale, state, 7


def feed_forward():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))


def trained(head, backbone=None, dtype=torch.float32):
    """A model whose posterior is not uniform; its best clone is the second."""
    net = AlraoModel(backbone or feed_forward(), head).to(dtype)
    targets = torch.randint(4, (6,)) if isinstance(head, ClassifierClones) else torch.randn(6, 4)
    net(
        torch.randn(6, 3, dtype=dtype),
        targets=targets.to(dtype) if targets.is_floating_point() else targets,
    )
    net.head.switch.reset_parameters()
    net.head.switch.update(torch.tensor([-1.0, -0.5, -2.0]))
    return net


def classifier(**arguments):
    return ClassifierClones(8, 4, 3, **arguments)


def regressor(**arguments):
    return RegressorClones(8, 4, 3, **arguments)


def adaptive(**arguments):
    return AdaptiveClassifierClones(8, 4, [1, 2], 3, **arguments)


def snapshot(net):
    return {name: t.clone() for name, t in (*net.named_parameters(), *net.named_buffers())}


@pytest.mark.parametrize("which", ["best", "mixture"])
@pytest.mark.parametrize("make", [classifier, regressor, adaptive])
def test_a_backbone_of_another_dtype(make, which):
    net = trained(make())
    net.backbone.to(torch.bfloat16)
    x = torch.randn(5, 3, dtype=torch.bfloat16)
    result, expected = net.collapse(which)(x), net.eval()(x)
    assert result.dtype == expected.dtype == torch.float32
    if which == "best":
        expected = net.head.clone_outputs(net.backbone(x).float())[1]
        if make is classifier:
            expected = expected.log_softmax(-1)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("which", ["best", "mixture"])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [classifier, regressor, adaptive])
def test_the_result_in_another_dtype(make, own, which):
    net = trained(make())
    net.to(own)
    x = torch.randn(5, 3, dtype=own)
    plain = net.collapse(which)
    expected = plain(x)
    assert ("dtype_of_head" in plain.state_dict()) == (own == torch.bfloat16)
    if make is not adaptive:
        assert torch.jit.script(plain)(x).dtype == torch.float32
    for dtype, tolerance in ((torch.float64, 0.05), (torch.bfloat16, 0.1)):
        result = copy.deepcopy(plain).to(dtype)(x.to(dtype))
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_hooks_that_stay_behind_are_told_of():
    net = trained(classifier())
    net.backbone[0].register_forward_hook(lambda module, inputs, output: output * 2)
    x = torch.randn(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(net.collapse("mixture")(x), net.eval()(x))
    for module, register in (
        (net, net.register_forward_hook),
        (net.head, net.head.register_forward_pre_hook),
    ):
        hook = register(lambda *args: None)
        with pytest.warns(UserWarning, match=f"hooks on the {type(module).__name__}, which the"):
            net.collapse("best")
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [classifier, regressor])
def test_mixture_is_the_model_in_eval_mode(make, bias, dtype):
    net = trained(make(bias=bias), dtype=dtype)
    x = torch.randn(5, 3, dtype=dtype)
    plain = net.collapse("mixture")
    expected = net.eval()(x)
    result = plain(x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("make", [classifier, regressor])
def test_best_is_the_clone_with_the_largest_posterior(make):
    net = trained(make())
    x = torch.randn(5, 3)
    plain = net.collapse()
    net.eval()
    expected = F.linear(net.backbone(x), net.head.weight[1], net.head.bias[1])
    if make is classifier:
        expected = expected.log_softmax(-1)
    torch.testing.assert_close(plain(x), expected)


def test_by_hand():
    # Posterior 3/4, 1/4; probabilities of class 0: 1/2 and 1/4.
    net = AlraoModel(nn.Identity(), ClassifierClones(1, 2, 2))
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]))
    net.head.switch.log_posterior.copy_(torch.tensor([0.75, 0.25]).log())
    net.head.switch.t.fill_(2)
    x = torch.zeros(1, 1)
    assert net.collapse("best", num_extras=0)(x).exp()[0, 0].item() == pytest.approx(0.5)
    assert net.collapse("mixture", num_extras=0)(x).exp()[0, 0].item() == pytest.approx(0.4375)


@pytest.mark.parametrize("which", ["best", "mixture"])
@pytest.mark.parametrize("make", [classifier, regressor])
def test_original_is_untouched_and_shares_nothing(make, which):
    net = trained(make())
    before, training = snapshot(net), [m.training for m in net.modules()]
    plain = net.collapse(which)
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            tensor.zero_()
    assert [m.training for m in net.modules()] == training
    for name, tensor in snapshot(net).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert not plain.training and not plain.backbone[3].training


@pytest.mark.parametrize("which", ["best", "mixture"])
def test_backbone_with_extras(which):
    net = AlraoModel(Recurrent(), classifier())
    x = torch.randn(7, 2, 3)
    _, state, _ = net(x, targets=torch.randint(4, (7, 2)))
    state = tuple(s.detach() for s in state)
    plain = net.collapse(which)
    net.eval()
    result, (h, c), constant = plain(x, state, scale=0.5)
    expected, (h_net, c_net), _ = net(x, state, scale=0.5)
    assert result.shape == (7, 2, 4)
    if which == "mixture":
        torch.testing.assert_close(result, expected)
    assert torch.equal(h, h_net) and torch.equal(c, c_net)
    assert constant == 7
    plain(x)
    plain(sequence=x)


def test_diverged_clones_are_left_out():
    net = trained(classifier())
    with torch.no_grad():
        net.head.weight[1, 0, 0] = math.nan
        net.head.bias[2, 1] = math.inf
    x = torch.randn(5, 3)
    # As probabilities that sum to 1.
    expected = net.eval()(x).log_softmax(-1)
    torch.testing.assert_close(net.collapse("mixture")(x), expected)
    best = F.linear(net.backbone(x), net.head.weight[0], net.head.bias[0]).log_softmax(-1)
    torch.testing.assert_close(net.collapse("best")(x), best)
    with torch.no_grad():
        net.head.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="every clone has non-finite weights"):
        net.collapse()


def test_diverged_regressors_are_left_out():
    net = trained(regressor())
    with torch.no_grad():
        net.head.weight[1] = math.inf
    x = torch.randn(5, 3)
    torch.testing.assert_close(net.collapse("mixture")(x), net.eval()(x))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [classifier, regressor])
def test_clones_that_overflow(make, dtype, backend):
    """Finite weights, outputs that are not: each clone on other samples, none and all on some."""
    net = trained(make(), nn.Linear(3, 8), dtype=dtype)
    net.backbone = nn.Identity()
    x = torch.randn(5, 8, dtype=dtype)
    with torch.no_grad():
        x[:, :3] = torch.tensor([[0, 0, 0], [2, 0, 0], [0, 2, 2], [2, 2, 2], [math.nan, 0, 0]])
        for n in range(3):
            net.head.weight[n, n, n] = torch.finfo(dtype).max
    dead = ~net.head.clone_outputs(x).isfinite().all(2).T
    assert dead.sum(1).tolist() == [0, 1, 2, 3, 3]
    with backends.use_backend(backend):
        expected = net.eval()(x)
    if make is classifier:
        expected[:3] = expected[:3].log_softmax(-1)
    result = net.collapse("mixture")(x)
    torch.testing.assert_close(result, expected, equal_nan=True)
    assert result[:3].isfinite().all()
    nothing = -math.inf if make is classifier else math.nan
    torch.testing.assert_close(
        result[3:], torch.full_like(result[3:], nothing), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("make", [classifier, regressor])
def test_best_is_not_a_clone_that_overflows(make):
    net = trained(make())
    with torch.no_grad():
        net.head.weight[1] = 3e38
    plain, x = net.collapse("best"), torch.randn(5, 3)
    torch.testing.assert_close(plain.head.weight, net.head.weight[0])
    assert plain(x).isfinite().all()
    with torch.no_grad():
        net.head.weight.fill_(3e38)
    torch.testing.assert_close(net.collapse("best").head.bias, net.head.bias[1])


@pytest.mark.parametrize("make", [classifier, regressor])
def test_gradient_of_the_mixture(make):
    """That of the living clones."""
    net = trained(make())
    with torch.no_grad():
        net.backbone[0].bias.fill_(5)
        net.head.weight[0] = 3e38
    plain = net.collapse("mixture")
    plain(torch.randn(5, 3)).square().sum().backward()
    grads = plain.head.weight.grad.unflatten(0, (3, 4))
    assert not grads[0].any()
    assert grads[1].any() and grads.isfinite().all()


@pytest.mark.parametrize("which", ["best", "mixture"])
def test_is_an_ordinary_module(which):
    net = trained(classifier())
    plain = net.collapse(which)
    x = torch.randn(5, 3)
    expected = plain(x)

    assert torch.equal(pickle.loads(pickle.dumps(plain))(x), expected)
    assert torch.equal(copy.deepcopy(plain)(x), expected)
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    other = trained(classifier()).collapse(which)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)
    torch.testing.assert_close(torch.export.export(plain, (x,)).module()(x), expected)
    torch.testing.assert_close(
        torch.compile(plain, fullgraph=True, backend="aot_eager")(x), expected
    )
    plain(x).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    last_layer = sum(p.numel() for p in plain.head.parameters())
    assert last_layer == (1 if which == "best" else 3) * (8 * 4 + 4)


WITHOUT_US = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("alrao_fast", "tests", "test_collapse"):
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Refuse())
import torch
for name in ("best", "mixture"):
    saved = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False)
    torch.testing.assert_close(saved["plain"](saved["x"]), saved["expected"])
    program = torch.export.load(f"{sys.argv[1]}/{name}.pt2")
    torch.testing.assert_close(program.module()(saved["x"]), saved["expected"])
assert not [name for name in sys.modules if name.startswith("alrao")]
print("served")
"""


def test_serves_where_the_package_is_missing(tmp_path):
    net = trained(classifier())
    x = torch.randn(5, 3)
    for which in ("best", "mixture"):
        plain = net.collapse(which)
        with torch.no_grad():
            torch.save({"plain": plain, "x": x, "expected": plain(x)}, tmp_path / f"{which}.pt")
        torch.export.save(torch.export.export(plain, (x,)), tmp_path / f"{which}.pt2")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "served", done.stderr


class Strange(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def test_required_keyword_after_a_default():
    backbone = Strange(lambda x, shift=0.0, *, scale: (x + shift) * scale)
    plain = AlraoModel(backbone, classifier()).collapse("mixture", num_extras=0)
    x = torch.randn(2, 8)
    torch.testing.assert_close(plain(x, scale=2.0), plain(x, shift=x, scale=1.0))


def test_default_that_source_cannot_spell_stays_the_backbones():
    backbone = Strange(lambda x, activation=torch.tanh, shift=1.0: activation(x) + shift)
    net = AlraoModel(backbone, classifier())
    plain = net.collapse("mixture", num_extras=0)
    x = torch.randn(2, 8)
    torch.testing.assert_close(plain(x), net.eval()(x))
    torch.testing.assert_close(plain(x, shift=0.5), net(x, shift=0.5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: trained(classifier()).collapse("worst"),
            ValueError,
            "which: got 'worst', expected 'best' or 'mixture'",
        ),
        (
            lambda: AlraoModel(nn.Identity(), classifier()).collapse(),
            RuntimeError,
            "run one batch through the model first, or pass num_extras",
        ),
        (
            lambda: trained(classifier()).collapse(num_extras=-1),
            ValueError,
            "num_extras: got -1, expected how many values the backbone returns",
        ),
        (
            lambda: trained(classifier()).collapse(num_extras=2.5),
            TypeError,
            "num_extras: got 2.5, expected how many",
        ),
        (
            lambda: trained(classifier()).collapse(num_extras=True),
            TypeError,
            "num_extras: got True",
        ),
        (
            lambda: AlraoModel(Strange(lambda *args: args[0]), classifier()).collapse(
                "mixture", num_extras=0
            ),
            ValueError,
            "Strange.forward names no argument",
        ),
        (
            lambda: AlraoModel(nn.Identity(), classifier()).collapse(num_extras=0),
            RuntimeError,
            r"collapse\('best'\): the switch has made no observation",
        ),
    ],
)
def test_invalid(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_regressor_that_is_far_off_is_left_out():
    """Its posterior never falls to 0: an output of 1e16 would be all that is seen of the mean."""
    net = trained(regressor())
    x, y = torch.randn(5, 3), torch.randn(5, net.head.out_features)
    with torch.no_grad():
        net.head.weight[-1] = 1e16
    net.train()(x, targets=y)
    posterior = net.eval().posterior()
    assert posterior[-1] > 0
    rest = posterior[:-1] / posterior[:-1].sum()
    outputs = net.head.clone_outputs(net.backbone(x))[:-1]
    expected = torch.einsum("n,nbk->bk", rest.float(), outputs)
    for predict in (net, net.collapse("mixture")):
        torch.testing.assert_close(predict(x), expected)
