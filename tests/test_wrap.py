"""wrap: the output layer of a whole model becomes clones of it.

Protects against the wrong layer, weights that are lost, and shapes of models that are refused or guessed at.
"""

import warnings

import pytest
import torch
from torch import nn

import alrao_fast as alrao

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


class Named(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 5)
        setattr(self, name, nn.Linear(5, 4))
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(self.second(self.first(x).relu()).relu())


class HiddenFc(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.out(self.fc(x).relu())


def sequential():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


@pytest.mark.parametrize(
    ("model", "output"),
    [
        (sequential, None),
        (lambda: Named("fc"), None),
        (lambda: Named("classifier"), None),
        (lambda: Named("last"), "last"),
        (lambda: nn.Linear(6, 4), None),
        (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4), nn.Identity()), None),
    ],
)
def test_untrained_clones_predict_what_the_layer_did(model, output):
    model = model()
    expected = model.train()(X).log_softmax(-1)
    net = alrao.wrap(model, num_clones=3, output=output)
    assert type(net).__name__ == "AlraoModel" and net.head.num_clones == 3
    torch.testing.assert_close(net(X), expected)


def test_it_trains_and_collapses():
    net = alrao.wrap(sequential(), num_clones=5)
    opt = alrao.AlraoSGD(net)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        loss = net(X, targets=Y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert net.collapse("best")(X).shape == (8, 4)


def test_fresh_clones_differ():
    net = alrao.wrap(sequential(), num_clones=3, start="fresh")
    assert not torch.equal(net.head.weight[0], net.head.weight[1])


def test_options_go_to_the_head():
    net = alrao.wrap(sequential().double(), 2, theta=0.9, bias=False, start="fresh")
    assert net.head.switch.theta == 0.9 and net.head.bias is None
    assert net.head.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "^model: got 3, expected a torch.nn.Module"),
        ((Named("last"),), ValueError, "^output: found no output layer in the Named; name it"),
        (
            (HiddenFc(),),
            ValueError,
            "^output: found no output layer in the HiddenFc; name it.* fc, out$",
        ),
        ((nn.Sequential(nn.ReLU()),), ValueError, "it has no linear layer at all"),
        (
            (Named("fc"), 3, "gone"),
            ValueError,
            "^output: got 'gone', expected the name of a module",
        ),
        (
            (nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), 3, "0"),
            TypeError,
            "^output: '0' of the Sequential is a ReLU",
        ),
        ((Named("fc"), 0), ValueError, "^num_clones: got 0"),
        ((alrao.wrap(sequential(), 2),), TypeError, "that has clones already"),
        ((torch.compile(sequential()),), TypeError, "a Sequential compiled .* torch.compile.wrap"),
    ],
    ids=[
        "kind",
        "ambiguous",
        "hidden",
        "none",
        "missing",
        "no linear",
        "clones",
        "twice",
        "compiled",
    ],
)
def test_refusals(arguments, error, message):
    model, num_clones, output = (
        (*arguments, 10, None, None)[:3] if len(arguments) == 1 else (*arguments, None)[:3]
    )
    with pytest.raises(error, match=message):
        alrao.wrap(model, num_clones, output=output)


def test_sizes_are_those_of_the_layer():
    model = sequential()
    with pytest.raises(
        TypeError, match=r"^num_classes: got 7, expected none: .* they replace, 5 and 4"
    ):
        alrao.wrap(model, num_classes=7)
    assert isinstance(model[-1], nn.Linear)


def test_start_of_another_kind():
    with pytest.raises(ValueError, match=r"^start: got 'head', expected 'layer' or 'fresh'"):
        alrao.wrap(sequential(), start="head")


@pytest.mark.parametrize(
    "name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"]
)
def test_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
        layer = model.get_classifier()
        net = alrao.wrap(model, num_clones=2)
    assert net.head.weight.shape == (2, *layer.weight.shape)
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11", "densenet121", "mobilenet_v2", "swin_t", "vit_b_16"]
)
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = alrao.wrap(getattr(models, name)(num_classes=7), num_clones=2)
    assert net.head.num_classes == 7


def test_two_output_layers():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=10, embed_dim=48, depth=1
    )
    with pytest.raises(ValueError, match="has head, head_dist as output layers, expected one"):
        alrao.wrap(model)
    assert isinstance(model.head, torch.nn.Linear)


class Auxiliary(torch.nn.Module):
    """As torchvision's GoogLeNet: more is returned in training mode."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        out = self.fc(self.body(x))
        return (out, x) if self.training else out


def test_a_model_that_returns_more_in_training_collapses_to_what_it_returns_in_eval():
    net = alrao.wrap(Auxiliary(), num_clones=2)
    opt = alrao.AlraoSGD(net)
    x = torch.randn(5, 4)
    loss, _ = net.train()(x, targets=torch.tensor([0, 1, 2, 0, 1]))
    loss.backward()
    opt.step()
    expected = net.eval()(x)
    net.train()(x)
    torch.testing.assert_close(net.collapse("mixture")(x), expected)


class EndsInSoftmax(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.body(x)).log_softmax(-1)


class EndsInModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
        self.act = torch.nn.Softmax(-1)

    def forward(self, x):
        return self.act(self.net(x))


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.softmax = torch.nn.Softmax(-1)

    def forward(self, x):
        return self.softmax(x @ x.T) @ x


def test_a_softmax_in_the_forward_warns():
    for model, output in (
        (EndsInSoftmax(), None),
        (EndsInModule(), "net.1"),
        (nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(-1)), "0"),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(-1))), "0.0"),
    ):
        with pytest.warns(UserWarning, match=f"the {type(model).__name__} has a softmax"):
            alrao.wrap(model, output=output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alrao.wrap(nn.Sequential(Attention(), nn.Linear(4, 3)))
        alrao.wrap(Auxiliary())
