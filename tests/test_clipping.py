"""clip_grad_norm_: the backbone and each clone by a norm of its own.

Protects against a clone whose gradient takes the step of others, and against numbers that are not torch's.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_ as torch_clip

import alrao_fast as alrao

D, C, N = 6, 5, 4


def trained(*, head=alrao.ClassifierClones, dtype=torch.float32, bias=True):
    """A network with gradients of quite different sizes."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(3, D), nn.ReLU(), nn.Linear(D, D))
    net = alrao.AlraoModel(backbone, head(D, C, N, bias)).to(dtype)
    for k, p in enumerate(net.parameters()):
        p.grad = torch.randn_like(p) * (k + 1)
    scale = torch.tensor([1e-3, 1.0, 10.0, 1e4]).to(dtype)
    for p in net.head.parameters():
        p.grad *= scale.view(-1, *[1] * (p.dim() - 1))
    return net


def by_torch(net, max_norm, **options):
    """The same by torch's function: the backbone, and every clone as parameters of its own."""
    norm = torch_clip(list(net.backbone.parameters()), max_norm, **options)
    for n in range(N):
        parts = []
        for p in net.head.parameters():
            part = nn.Parameter(p.detach()[n].clone())
            part.grad = p.grad[n].clone()
            parts.append(part)
        torch_clip(parts, max_norm, **options)
        for p, part in zip(net.head.parameters(), parts):
            p.grad[n] = part.grad
    return norm


def grads(net):
    return [p.grad for p in net.parameters()]


@pytest.mark.parametrize("norm_type", [2, 1, 3.0, math.inf, "inf"], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 20.0, math.inf, 0.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head", [alrao.ClassifierClones, alrao.RegressorClones])
def test_it_is_torchs_on_each_part(norm_type, max_norm, dtype, head):
    net, expected = trained(head=head, dtype=dtype), trained(head=head, dtype=dtype)
    norm = alrao.clip_grad_norm_(net, max_norm, norm_type)
    torch.testing.assert_close(norm, by_torch(expected, max_norm, norm_type=norm_type))
    torch.testing.assert_close(grads(net), grads(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    net, wide = trained(dtype=dtype), trained()
    net.head.weight.grad[3] = net.head.weight.grad[2]
    net.head.bias.grad[3] = 1
    for p, q in zip(net.parameters(), wide.parameters()):
        q.grad = p.grad.float()
    alrao.clip_grad_norm_(net, 0.5)
    alrao.clip_grad_norm_(wide, 0.5)
    for p, q in zip(net.parameters(), wide.parameters()):
        torch.testing.assert_close(p.grad.float(), q.grad, rtol=2e-2, atol=1e-3)


def test_by_hand():
    net = alrao.AlraoModel(nn.Linear(1, 1, bias=False), alrao.ClassifierClones(1, 2, 2, bias=False))
    net.backbone.weight.grad = torch.tensor([[3.0]])
    net.head.weight.grad = torch.tensor([[[0.3], [0.4]], [[30.0], [40.0]]])
    norms = alrao.grad_norms(net)
    assert norms.backbone == 3 and norms.clones[0].tolist() == pytest.approx([0.5, 50])
    assert alrao.clip_grad_norm_(net, 1.0) == 3
    assert net.backbone.weight.grad.item() == pytest.approx(1, abs=1e-5)
    assert net.head.weight.grad.flatten().tolist() == pytest.approx([0.3, 0.4, 0.6, 0.8], abs=1e-5)


@pytest.mark.parametrize("what", ["parameters", "generator", "named group", "wrapped"])
def test_what_it_takes(what):
    net, expected = trained(), trained()
    alrao.clip_grad_norm_(expected, 0.5)
    given = {
        "parameters": list(net.parameters()),
        "generator": net.parameters(),
        "named group": alrao.AlraoSGD(net).param_groups[0]["params"],
        "wrapped": nn.Sequential(net),
    }[what]
    alrao.clip_grad_norm_(given, 0.5)
    torch.testing.assert_close(grads(net), grads(expected), rtol=0, atol=0)


def test_a_plain_network():
    net = nn.Linear(3, 2)
    for p in net.parameters():
        p.grad = torch.randn_like(p) * 10
    other = copy.deepcopy(net)
    for p, q in zip(net.parameters(), other.parameters()):
        q.grad = p.grad.clone()
    torch.testing.assert_close(alrao.clip_grad_norm_(net, 1.0), torch_clip(other.parameters(), 1.0))
    torch.testing.assert_close(grads(net), grads(other), rtol=0, atol=0)


def test_missing_gradients():
    net = trained(bias=False)
    net.backbone[0].weight.grad = None
    net.head.weight.requires_grad_(False)
    net.head.weight.grad = None
    alrao.clip_grad_norm_(net, 0.1)
    assert net.backbone[2].weight.grad.norm() <= 0.1
    assert alrao.clip_grad_norm_(nn.Linear(2, 2), 1.0) == 0
    assert alrao.clip_grad_norm_([], 1.0) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_part_that_is_not_finite_leaves_the_others(bad):
    net, expected = trained(), trained()
    net.head.weight.grad[2, 0, 0] = bad
    alrao.clip_grad_norm_(net, 0.5)
    alrao.clip_grad_norm_(expected, 0.5)
    keep = torch.tensor([0, 1, 3])
    torch.testing.assert_close(net.head.weight.grad[keep], expected.head.weight.grad[keep])
    torch.testing.assert_close(grads(net.backbone), grads(expected.backbone))

    net.head.weight.grad[2, 0, 0] = bad
    before = [g.clone() for g in grads(net)]
    with pytest.raises(RuntimeError, match="norm of the gradients of the clones is"):
        alrao.clip_grad_norm_(net, 0.01, error_if_nonfinite=True)
    torch.testing.assert_close(grads(net), before, rtol=0, atol=0, equal_nan=True)


def test_compiled():
    net, expected = trained(), trained()
    alrao.clip_grad_norm_(expected, 0.5)
    torch._dynamo.reset()
    torch.compile(lambda: alrao.clip_grad_norm_(net, 0.5), backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(grads(net), grads(expected))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, 1.0), TypeError, "^net: got 3, expected a torch.nn.Module or parameters"),
        (([3], 1.0), TypeError, r"^net: got \[3\]"),
        ((trained(), "a"), TypeError, "^max_norm: got 'a'"),
        ((trained(), -1.0), ValueError, "^max_norm: got -1.0, expected a number >= 0"),
        ((trained(), math.nan), ValueError, "^max_norm: got nan"),
        ((trained(), 1.0, None), TypeError, "^norm_type: got None"),
        ((trained(), 1.0, 2.0, "yes"), TypeError, "^error_if_nonfinite: got 'yes'"),
        ((trained(), 1.0, 2.0, False, 3), TypeError, "^foreach: got 3"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        alrao.clip_grad_norm_(*arguments)


def test_sparse_gradients():
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"^net: got a gradient of layout torch.sparse_coo"):
        alrao.clip_grad_norm_(embedding, 1.0)
