"""The networks that the benchmarks train. Protects:

- the paper's parameter counts, with one last layer and with Alrao's clones (appendix, table 2), as integers;
- features [B, out_features] for 32x32 images and [T, B, out_features] for tokens, at any width;
- gradients are finite, a step of Alrao moves the parameters;
- one convolution with batch normalisation counted by hand.
"""

from __future__ import annotations

import benchmarks_package
import pytest
import torch
from torch import nn

import alrao_fast as alrao

benchmarks_package.load()


def count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def make(name: str, width: float = 1.0) -> nn.Module:
    from benchmarks import networks

    if name in networks.IMAGE_NETWORKS:
        return networks.IMAGE_NETWORKS[name](width)
    return networks.LSTMBackbone({"chars": 50, "words": 10_000}[name], width=width)


@pytest.mark.parametrize(
    "name, classes, clones, plain, with_alrao",
    [
        ("googlenet", 10, 10, 6_166_250, 6_258_500),
        ("vgg19", 10, 10, 20_040_522, 20_086_692),
        ("mobilenet", 10, 10, 2_296_922, 2_412_212),
        ("chars", 50, 6, 171_650, 196_900),
        ("words", 10_000, 6, 2_171_600, 7_221_600),
    ],
)
def test_counts_of_the_paper(name, classes, clones, plain, with_alrao):
    backbone = make(name)
    assert count(backbone) + count(nn.Linear(backbone.out_features, classes)) == plain
    head = alrao.ClassifierClones(backbone.out_features, classes, clones)
    assert count(alrao.AlraoModel(backbone, head)) == with_alrao


def test_one_layer_by_hand():
    from benchmarks.networks.layers import conv_bn

    # 4 filters of 3x3x2 with 4 biases, and 4 scales and shifts.
    assert count(nn.Sequential(*conv_bn(2, 4, 3, bias=True))) == 4 * 18 + 4 + 8


@pytest.mark.parametrize("name", ["googlenet", "vgg19", "mobilenet"])
@pytest.mark.parametrize("width, batch", [(0.1, 2), (0.25, 3)])
def test_features_of_images(name, width, batch):
    backbone = make(name, width)
    features = backbone(torch.randn(batch, 3, 32, 32))
    assert features.shape == (batch, backbone.out_features)
    (features * torch.randn_like(features)).sum().backward()
    assert all(param.grad.isfinite().all() for param in backbone.parameters())


@pytest.mark.parametrize("name, features", [("googlenet", 3072), ("vgg19", 1536)])
def test_three_times_the_width(name, features):
    with torch.device("meta"):
        assert make(name, 3).out_features == features


def test_features_of_tokens_and_state():
    from benchmarks.networks import LSTMBackbone

    backbone = LSTMBackbone(50, width=0.2).eval()
    tokens = torch.randint(50, (7, 3))
    features, _ = backbone(tokens)
    assert features.shape == (7, 3, 20) and backbone.out_features == 20
    first, state = backbone(tokens[:4])
    rest, _ = backbone(tokens[4:], state)
    torch.testing.assert_close(torch.cat([first, rest]), features)


def test_dropout_only_in_training():
    from benchmarks.networks import LSTMBackbone

    backbone = LSTMBackbone(50, hidden=8, dropout=0.5)
    tokens = torch.randint(50, (5, 2))
    assert not backbone(tokens)[0].equal(backbone(tokens)[0])
    backbone.eval()
    assert backbone(tokens)[0].equal(backbone(tokens)[0])


@pytest.mark.parametrize("name", ["googlenet", "vgg19", "mobilenet", "chars"])
def test_one_step_of_alrao(name):
    backbone = make(name, 0.1)
    net = alrao.AlraoModel(backbone, alrao.ClassifierClones(backbone.out_features, 10, 3))
    opt = alrao.AlraoSGD(net, lr_range=(1e-5, 1e-2))
    before = [param.detach().clone() for param in net.parameters()]
    x = torch.randint(10, (4, 2)) if name == "chars" else torch.randn(4, 3, 32, 32)
    out = net(x, targets=torch.randint(10, x.shape if name == "chars" else (4,)))
    (out[0] if isinstance(out, tuple) else out).backward()
    opt.step()
    moved = [not a.equal(b) for a, b in zip(before, net.parameters())]
    # A bias in front of a batch normalisation has a gradient of rounding errors only.
    assert sum(moved) > 0.6 * len(moved)
