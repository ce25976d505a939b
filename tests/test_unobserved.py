"""A training that the switch does not see says so. Protects:

- one warning per head, from the first step that moves its clones; none where the head observes in any way, was loaded,
  copied or compiled, or is not trained; what it says is true;
- `collapse("best")` and `suggested_lr()` refuse before the first observation.
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alrao_fast.nn import AlraoModel, ClassifierClones, MixtureLoss, RegressorClones
from alrao_fast.optim import AlraoAdam, AlraoMuon, AlraoSGD

WARNING = r"ClassifierClones is trained without any observation.*MixtureLoss\(net\)"


def build(num_clones=4):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
    return AlraoModel(backbone, ClassifierClones(8, 5, num_clones))


def batch():
    return torch.randn(16, 3), torch.randint(5, (16,))


def steps(net, optimizer, loss, number=3):
    for _ in range(number):
        optimizer.zero_grad()
        loss(net, *batch()).backward()
        optimizer.step()


def ordinary(net, x, y):
    return F.nll_loss(net(x), y)


def in_eval_mode(net, x, y):
    return net.eval()(x, targets=y)


def updated_by_hand(net, x, y):
    losses = [F.cross_entropy(out, y) for out in net.head.clone_outputs(net.backbone(x))]
    net.head.switch.update(-torch.stack(losses).detach())
    return sum(losses)


SEEN = {
    "targets": lambda net, x, y: net(x, targets=y),
    "criterion": lambda net, x, y: MixtureLoss(net)(net(x), y),
    "clone_loss": lambda net, x, y: net.head.clone_loss(
        net.backbone(x), lambda out: out.square().mean(-1)
    ),
    "by hand": updated_by_hand,
}


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("optimizer_type", [AlraoSGD, AlraoAdam, AlraoMuon])
@pytest.mark.parametrize("loss", [ordinary, in_eval_mode])
def test_one_warning(optimizer_type, loss):
    net = build()
    optimizer = optimizer_type(net)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        steps(net, optimizer, loss)
    assert len(caught) == 1
    assert net.head.switch.t.item() == 1
    # Neither another optimizer nor a copy of it says it again; another head does.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(net, optimizer_type(net), loss)
    other = build()
    with pytest.warns(UserWarning, match=WARNING):
        steps(other, optimizer_type(other.parameters()), loss)


@pytest.mark.parametrize("loss", SEEN)
def test_no_warning_where_the_switch_sees(loss, no_warning):
    net = build()
    steps(net, AlraoSGD(net), SEEN[loss])
    assert net.head.switch.t.item() == 4
    # From now on an ordinary step is the user's choice.
    steps(net, AlraoSGD(net), ordinary)


def test_resumed_copied_and_compiled(no_warning):
    net = build()
    steps(net, AlraoSGD(net), SEEN["targets"])
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        steps(other, AlraoSGD(other), SEEN["targets"])
        assert other.head.switch.has_observed
    other = build()
    other.load_state_dict(net.state_dict())
    steps(other, AlraoSGD(other), SEEN["targets"])
    compiled = build()
    call = torch.compile(compiled, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # Dynamo's of Python 3.13.0.
        warnings.filterwarnings("ignore", "Guards may run slower", RuntimeWarning)
        optimizer = AlraoSGD(compiled)
        steps(compiled, optimizer, lambda _, x, y: call(x, targets=y))
    assert compiled.head.switch.has_observed and compiled.head.switch.t.item() == 4


def test_clones_that_are_not_trained(no_warning):
    net = build()
    net.head.requires_grad_(False)
    steps(net, AlraoSGD(net), ordinary)
    steps(net, AlraoSGD(net.backbone), ordinary)


def test_the_head_that_comes_later():
    """Its first step counts, not the optimizer's."""
    net = build()
    net.head.requires_grad_(False)
    optimizer = AlraoSGD(net)
    steps(net, optimizer, ordinary)
    net.head.requires_grad_(True)
    with pytest.warns(UserWarning, match=WARNING):
        steps(net, optimizer, ordinary)


def test_a_loss_that_is_refused_is_no_observation():
    net, (x, y) = build(), batch()
    opt = AlraoSGD(net)
    with pytest.raises(RuntimeError, match="target: got 7"):
        net(x, targets=torch.full_like(y, 7))
    with pytest.warns(UserWarning, match=WARNING):
        steps(net, opt, ordinary)


def test_reset():
    net = build()
    steps(net, AlraoSGD(net), SEEN["targets"])
    net.head.reset_parameters()
    with pytest.warns(UserWarning, match=WARNING):
        steps(net, AlraoSGD(net), ordinary)


def test_what_the_warning_says_is_true():
    """No clone is preferred; equal clones, by the mixture's gradient, learn at a quarter of their speed."""
    net = build()
    x, y = batch()
    with torch.no_grad():
        net.head.weight.copy_(net.head.weight[:1].expand_as(net.head.weight).clone())
        net.head.bias.zero_()
    ordinary(net, x, y).backward()
    assert torch.equal(net.posterior(), torch.full((4,), 0.25, dtype=torch.float64))
    mixed = net.head.weight.grad.clone()
    net.zero_grad()
    net(x, targets=y).backward()
    torch.testing.assert_close(net.head.weight.grad, 4 * mixed)


@pytest.mark.parametrize("head", [ClassifierClones, RegressorClones])
def test_refusals(head):
    net = AlraoModel(nn.Linear(3, 8), head(8, 5, 4))
    optimizer = AlraoSGD(net)
    x = torch.randn(6, 3)
    net(x)
    with pytest.raises(RuntimeError, match=r"suggested_lr: the switch has made no observation"):
        net.suggested_lr()
    with pytest.raises(RuntimeError, match=r"collapse\('best'\): the switch has made no obs"):
        net.collapse("best")
    torch.testing.assert_close(net.collapse("mixture")(x), net.eval()(x))
    y = torch.randint(5, (6,)) if head is ClassifierClones else torch.randn(6, 5)
    net.train()(x, targets=y)
    net.collapse("best")
    assert 1e-5 <= net.suggested_lr() <= 10
    assert optimizer.state


def test_a_single_clone_is_the_best():
    net = AlraoModel(nn.Linear(3, 8), ClassifierClones(8, 5, 1))
    AlraoSGD(net, (1e-3, 1e-1))
    assert net.suggested_lr() == pytest.approx(1e-2)
    x = torch.randn(6, 3)
    torch.testing.assert_close(net.collapse("best", num_extras=0)(x), net.eval()(x))
