"""MixtureLoss: `criterion(net(x), y)` is `net(x, targets=y)`. Protects:

- loss, gradients, switch and statistics bit for bit, on every backend; extras; any shape; options of the head; a head
  in a module of one's own; whole trainings; under autocast, activation checkpoints, a compiled backbone;
- one observation per prediction; eval mode by hand; copies of criterion and net apart from each other;
- nothing lives longer than the prediction, nothing is saved or copied with it; the errors.
"""

import copy
import gc
import io
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from alrao_fast.nn import AlraoModel, ClassifierClones, MixtureLoss, RegressorClones, predictions
from alrao_fast.optim import AlraoSGD

OP = "switch_mixture"
pytestmark = pytest.mark.usefixtures("used_backend", "used_device")


class WithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 8)

    def forward(self, x):
        hidden = self.linear(x)
        return hidden.tanh(), hidden


def plain_backbone():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh())


def build(head=ClassifierClones, backbone=plain_backbone, **options):
    torch.manual_seed(0)
    return AlraoModel(backbone(), head(8, 5, 4, **options))


def batch(head, *shape):
    shape = shape or (6,)
    if head is RegressorClones:
        return torch.randn(*shape, 3), torch.randn(*shape, 5)
    y = torch.randint(5, shape)
    y.flatten()[1] = -100
    return torch.randn(*shape, 3), y


def first(out):
    return out[0] if isinstance(out, tuple) else out


def assert_same_step(net, other, loss, expected):
    """Loss, gradients and state of the two nets agree to the last bit."""
    assert torch.equal(loss, expected)
    loss.backward(), expected.backward()
    for (name, p), q in zip(net.named_parameters(), other.parameters()):
        assert torch.equal(p.grad, q.grad), name
    for (name, a), b in zip(net.named_buffers(), other.buffers()):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("head", "options"),
    [
        (ClassifierClones, {}),
        (ClassifierClones, {"reduction": "sum", "evidence": "sum", "bias": False}),
        (RegressorClones, {"sigma2": 0.5}),
        (RegressorClones, {"reduction": "sum"}),
    ],
)
@pytest.mark.parametrize("backbone", [plain_backbone, WithState])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_training(backend, head, options, backbone, shape):
    net, other = build(head, backbone, **options), build(head, backbone, **options)
    criterion = MixtureLoss(net)
    for step in range(3):
        x, y = batch(head, *shape)
        loss, expected = criterion(net(x), y), first(other(x, targets=y))
        assert_same_step(net, other, loss, expected)
        assert net.head.switch.t.item() == step + 2


def test_whole_training(backend):
    nets = build(), build()
    optimizers = [
        AlraoSGD(net.parameters(), momentum=0.9, generator=torch.Generator().manual_seed(0))
        for net in nets
    ]
    criterion = MixtureLoss(nets[0])
    x, y = torch.randn(64, 3), torch.randint(2, (64,))
    for part in torch.arange(64).split(8) * 5:
        for optimizer in optimizers:
            optimizer.zero_grad()
        criterion(nets[0](x[part]), y[part]).backward()
        nets[1](x[part], targets=y[part]).backward()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values()):
        assert torch.equal(a, b)
    assert nets[0].suggested_lr() == nets[1].suggested_lr()
    assert nets[0].clone_metrics()["count"] == 5 * 64


class Own(nn.Module):
    """Somebody's network, whose last layer was swapped."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = plain_backbone(), nn.Linear(8, 5)

    def forward(self, x):
        return self.classifier(self.body(x))


def test_a_swapped_classifier():
    net = Own()
    net.classifier = ClassifierClones(8, 5, 4)
    other = AlraoModel(copy.deepcopy(net.body), copy.deepcopy(net.classifier))
    x, y = batch(ClassifierClones)
    loss, expected = MixtureLoss(net)(net(x), y), other(x, targets=y)
    assert_same_step(net, other, loss, expected)
    # The head itself will do.
    features = other.backbone(x)
    criterion = MixtureLoss(other.head)
    assert torch.isfinite(criterion(other.head(features), y))


def test_classifier_in_eval_mode(backend):
    net = build()
    x, y = batch(ClassifierClones, 2, 3)
    net(x, targets=y)
    before = [b.clone() for b in net.buffers()]
    net.eval()
    criterion = MixtureLoss(net)
    out = net(x)
    expected = F.nll_loss(out.flatten(0, -2), y.flatten())
    torch.testing.assert_close(criterion(out, y), expected)
    torch.testing.assert_close(criterion(out, y), net(x, targets=y))
    # What was made of predictions, too, and of narrow targets.
    torch.testing.assert_close(criterion(torch.cat([out, out]), torch.cat([y, y])), expected)
    narrow = torch.where(y < 0, 4, y).to(torch.uint8)
    torch.testing.assert_close(criterion(out, narrow), criterion(out, narrow.long()))
    assert criterion(out, torch.full_like(y, -100)) == 0
    net.head.reduction = "sum"
    torch.testing.assert_close(criterion(out, y), expected * 5)
    for a, b in zip(net.buffers(), before):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    criterion(out, y).backward()
    assert net.head.weight.grad is not None


def test_regressor_in_eval_mode(backend):
    net = build(RegressorClones, sigma2=0.5).eval()
    x, y = batch(RegressorClones, 2, 3)
    out = net(x)
    squared = (out - y).square().sum(-1)
    expected = (squared / (2 * 0.5) + 2.5 * math.log(2 * math.pi * 0.5)).mean()
    criterion = MixtureLoss(net)
    torch.testing.assert_close(criterion(out, y), expected)
    torch.testing.assert_close(criterion(out[:1], y[:1].double()), criterion(out[0], y[0]))
    net.head.reduction = "sum"
    torch.testing.assert_close(criterion(out, y), expected * 6)


def test_eval_by_hand():
    """One clone with probabilities 1/10 and 9/10."""
    net = AlraoModel(nn.Identity(), ClassifierClones(1, 2, 1, bias=False))
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[[0.0], [math.log(3)]]]))
    x, y, criterion = torch.tensor([[2.0]]), torch.tensor([0]), MixtureLoss(net)
    for mode in (True, False):
        assert criterion(net.train(mode)(x), y).item() == pytest.approx(math.log(10), abs=1e-6)


def test_a_prediction_is_observed_once():
    """Logging, or the two targets of mixup."""
    net, other = build(), build()
    x, y = batch(ClassifierClones)
    criterion, out = MixtureLoss(net), net(x)
    criterion(out, y)
    state = [b.clone() for b in net.buffers()]
    other(x, targets=y)
    again = criterion(out, y.flip(0))
    assert torch.equal(again, other.eval()(x, targets=y.flip(0)))
    for a, b in zip(net.buffers(), state):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    criterion(net(x), y)
    assert net.head.switch.t.item() == 3


def test_two_predictions_before_their_losses():
    net, other = build(), build()
    batches = [batch(ClassifierClones) for _ in range(2)]
    criterion = MixtureLoss(net)
    outs = [net(x) for x, _ in batches]
    for out, (x, y) in zip(outs, batches):
        assert torch.equal(criterion(out, y), other(x, targets=y))


def test_copies_apart():
    """As a grid search makes them: the prediction knows its head."""
    net = build()
    criterion = copy.deepcopy(MixtureLoss(net))
    twin, other = copy.deepcopy(net), copy.deepcopy(net)
    x, y = batch(ClassifierClones)
    assert_same_step(twin, other, criterion(twin(x), y), other(x, targets=y))
    assert net.head.switch.t.item() == 1
    # The criterion's own copy of the net has stayed in training mode.
    criterion(twin.eval()(x), y)


def test_it_registers_nothing():
    net = build()
    criterion = MixtureLoss(net)
    assert not list(criterion.parameters()) and not criterion.state_dict()
    assert criterion.eval() is criterion and net.training


def test_under_autocast():
    net, other = build(), build()
    x, y = batch(ClassifierClones)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = MixtureLoss(net)(net(x), y), other(x, targets=y)
    assert_same_step(net, other, loss, expected)


def test_without_gradients():
    """As `net(x, targets=y)` there: an observation."""
    net, other = build(), build()
    x, y = batch(ClassifierClones)
    criterion = MixtureLoss(net)
    with torch.no_grad():
        assert torch.equal(criterion(net(x), y), other(x, targets=y))
    with torch.inference_mode():
        assert torch.equal(criterion(net(x), y), other(x, targets=y))
    assert net.head.switch.t.item() == 3


def test_activation_checkpoints():
    net, other = build(), build()
    x, y = batch(ClassifierClones)
    loss = MixtureLoss(net)(checkpoint(net, x, use_reentrant=False), y)
    assert_same_step(net, other, loss, other(x, targets=y))
    # A reentrant one has no graph to give.
    out = checkpoint(net, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="changed in place, or recomputed, since"):
        MixtureLoss(net)(out, y)


def test_compiled():
    torch._dynamo.reset()
    net, other = build(), build()
    x, y = batch(ClassifierClones)
    compiled = torch.compile(net, backend="eager")
    with pytest.raises(RuntimeError, match=r"compile net\.backbone in place of net"):
        MixtureLoss(compiled)(compiled(x), y)
    net.eval()
    torch.testing.assert_close(MixtureLoss(compiled)(compiled(x), y), net(x, targets=y))
    net.train()
    net.backbone = torch.compile(net.backbone, backend="eager")
    assert_same_step(net, other, MixtureLoss(net)(net(x), y), other(x, targets=y))

    @torch.compile(backend="eager")
    def loss(net, x, y):
        return MixtureLoss(net)(net(x), y)

    with pytest.raises(RuntimeError, match=r"compile net\.backbone in place of net"):
        loss(build(), x, y)
    torch._dynamo.reset()


def test_nothing_outlives_the_prediction():
    net = build()
    kept = len(predictions._origins)
    seen = []
    net.backbone.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    x, y = batch(ClassifierClones)
    gc.disable()
    try:
        out = net(x)
        loss = MixtureLoss(net)(out, y)
        loss.backward()
        del loss
        assert seen[0]() is not None and len(predictions._origins) == kept + 1
        del out
        assert seen[0]() is None and len(predictions._origins) == kept
        # What is kept of predictions in eval mode does not keep features.
        outs = [net.eval()(x).detach_() for _ in range(3)]
        assert [ref() for ref in seen[1:]] == [None] * 3
        del outs
        assert len(predictions._origins) == kept
    finally:
        gc.enable()


def test_a_saved_or_copied_prediction_is_a_plain_tensor():
    net = build()
    with torch.no_grad():
        out = net(torch.randn(6, 3))
    file = io.BytesIO()
    torch.save(out, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), out)
    assert not vars(out) and not vars(copy.deepcopy(out))
    with pytest.raises(RuntimeError, match="is not what the head returned"):
        MixtureLoss(net)(copy.deepcopy(out), torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda out, y: (out[:3], y[:3]), RuntimeError, "is not what the head returned"),
        (lambda out, y: (out.view_as(out), y), RuntimeError, "is not what the head returned"),
        (lambda out, y: (out.exp(), y), RuntimeError, r"shape \[6, 5\] that is not what"),
        (lambda out, y: (y, out), RuntimeError, r"shape \[6\] that is not what"),
        (lambda out, y: (out.mul_(2), y), RuntimeError, "changed in place"),
        (lambda out, y: (out, y[:3]), ValueError, r"target: got shape \[3\], expected \[6\]"),
        (lambda out, y: (out, y.tolist()), TypeError, r"targets: got \[.*\], expected a tensor"),
        (
            lambda out, y: ({"logits": out}, y),
            TypeError,
            "prediction: got {'logits': .*, expected a tensor",
        ),
        (lambda out, y: ((), y), TypeError, r"prediction: got \(\), expected a tensor"),
    ],
)
def test_invalid(change, error, message):
    net = build()
    x, y = batch(ClassifierClones)
    before = [b.clone() for b in net.buffers()]
    with pytest.raises(error, match=message):
        MixtureLoss(net)(*change(net(x), y))
    for a, b in zip(net.buffers(), before):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (nn.Linear(3, 2), ValueError, "net: got a Linear without clones, expected"),
        (
            nn.ModuleList([ClassifierClones(3, 2), RegressorClones(3, 2)]),
            ValueError,
            "net: got one with 2 heads",
        ),
        (lambda x: x, TypeError, "net: got .*, expected a torch.nn.Module"),
    ],
)
def test_invalid_net(net, error, message):
    with pytest.raises(error, match=message):
        MixtureLoss(net)


def test_eval_mode_refuses_targets_that_do_not_fit():
    for head, shape in ((ClassifierClones, [3]), (RegressorClones, [3, 5])):
        net = build(head).eval()
        x, y = batch(head)
        with pytest.raises(ValueError, match=rf"target: got shape \[{str(shape)[1:-1]}\]"):
            MixtureLoss(net)(net(x), y[:3])
