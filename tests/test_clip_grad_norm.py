"""Protects clip_grad_norm_ and grad_norms: which gradients share a norm, and what is clipped.

- Backbone and each clone against torch's function for them alone: several heads, modules around the model, any
  parameters; without heads it is torch's function; a clone that explodes touches nobody else.
- Absent gradients, frozen parts, empty and shared parameters, several dtypes, gradients that lie apart.
- Loss scales: unscaled before, and in the kernels (fused=True, float16 parameters), against unscaled training.
- torch.compile, error_if_nonfinite; refusals leave every gradient as it was.
"""

import copy
import math

import pytest
import torch
from torch import nn

import alrao_fast as alrao
from alrao_fast import clip_grad

OP = "gradient_clip"
pytestmark = pytest.mark.usefixtures("used_backend", "used_device")
CLONES = 4


def model(bias=True):
    head = alrao.ClassifierClones(16, 3, num_clones=CLONES, bias=bias)
    return alrao.AlraoModel(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), head)


def give_gradients(module, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    for number, param in enumerate(module.parameters()):
        values = torch.randn(param.shape, generator=generator, device="cpu", dtype=torch.float64)
        # Some parts are to be clipped, others not.
        param.grad = (values * scale * 0.05 * (1 + number)).to(param)
        if param.dim() and param.size(0) == CLONES:
            param.grad *= torch.arange(1.0, 1 + CLONES).to(param).view(-1, *[1] * (param.dim() - 1))


def grads_of(params):
    return [None if p.grad is None else p.grad.clone() for p in params]


def assert_clipped(net, heads, before, max_norm, order=2.0):
    """Every gradient of `net` is what torch makes of its part of those `before`; returns the parts' norms."""
    params = dict(zip(net.parameters(), before))
    own = [p for head in heads for p in head.parameters()]
    mine = {id(p) for p in own}
    parts = [[(p, grad) for p, grad in params.items() if grad is not None and id(p) not in mine]]
    for head in heads:
        for n in range(head.num_clones):
            parts.append([(p[n], params[p][n]) for p in head.parameters() if params[p] is not None])
    for p in own:
        assert p.grad is None or p.grad.shape == p.shape
    norms = []
    actual = [[p.grad for p, grad in params.items() if grad is not None and id(p) not in mine]]
    for head in heads:
        for n in range(head.num_clones):
            actual.append([p.grad[n] for p in head.parameters() if p.grad is not None])
    for part, now in zip(parts, actual, strict=True):
        leaves = [nn.Parameter(torch.zeros_like(grad)) for _, grad in part]
        for leaf, (_, grad) in zip(leaves, part):
            leaf.grad = grad.clone()
        norms.append(float(nn.utils.clip_grad_norm_(leaves, max_norm, order, foreach=False)))
        for leaf, grad in zip(leaves, now, strict=True):
            torch.testing.assert_close(grad, leaf.grad, rtol=2e-6, atol=0)
    return norms


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, math.inf, "inf"])
@pytest.mark.parametrize("bias", [True, False])
def test_backbone_and_clones_by_themselves(backend, bias, order):
    net = model(bias)
    give_gradients(net)
    before = grads_of(net.parameters())
    found = alrao.grad_norms(net, order)
    norm = alrao.clip_grad_norm_(net, 1.0, order)
    backbone, *clones = assert_clipped(net, [net.head], before, 1.0, order)
    assert norm.shape == () and norm.dtype == torch.float64
    torch.testing.assert_close(norm.item(), backbone, rtol=1e-6, atol=0)
    assert torch.equal(found.backbone, norm)
    assert isinstance(found.clones, tuple) and len(found.clones) == 1
    torch.testing.assert_close(found.clones[0].tolist(), clones, rtol=1e-6, atol=0)


def test_parameters_find_their_heads(backend):
    net = model()
    other = copy.deepcopy(net)
    for one in (net, other):
        give_gradients(one)
    alrao.clip_grad_norm_(net, 0.5)
    norm = alrao.clip_grad_norm_(other.parameters(), 0.5)
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p.grad, q.grad)
    # Some of them: no part of the others.
    give_gradients(net)
    untouched = net.head.weight.grad.clone()
    assert alrao.clip_grad_norm_(net.backbone.parameters(), 0.5) == norm
    assert torch.equal(net.head.weight.grad, untouched)
    assert alrao.clip_grad_norm_([net.head.weight], 0.5) == 0
    torch.testing.assert_close(net.head.weight.grad[1].norm().item(), 0.5, rtol=1e-5, atol=0)
    assert alrao.clip_grad_norm_(net.head.bias, 0.5).shape == ()
    assert [own.shape for own in alrao.grad_norms(net.head).clones] == [(CLONES,)]


def test_a_part_of_the_heads(backend):
    """A group of an optimizer, and heads that share a parameter, which has one norm."""
    net = model()
    twin = alrao.ClassifierClones(16, 3, num_clones=CLONES)
    twin.weight = net.head.weight
    give_gradients(net)
    give_gradients(twin)
    weight, bias = net.head.weight.grad.clone(), twin.bias.grad.clone()
    params = alrao.AlraoSGD(net).param_groups[0]["params"]
    first, second = alrao.grad_norms([*params, twin.bias]).clones
    own = torch.stack([torch.cat([weight[n].flatten(), net.head.bias.grad[n]]) for n in range(4)])
    torch.testing.assert_close(first, own.double().norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(second, bias.double().norm(dim=1), rtol=1e-6, atol=0)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_several_heads_in_a_wrapped_module(backend):
    net = nn.ModuleDict(
        {
            "a": alrao.ClassifierClones(5, 2, num_clones=CLONES),
            "trunk": nn.Linear(4, 5),
            "b": alrao.RegressorClones(5, 2, num_clones=CLONES + 1),
        }
    )
    give_gradients(net)
    before = grads_of(net.parameters())
    found = alrao.grad_norms(Wrapped(net))
    alrao.clip_grad_norm_(Wrapped(net), 0.3)
    norms = assert_clipped(net, [net["a"], net["b"]], before, 0.3)
    assert [own.shape for own in found.clones] == [(CLONES,), (CLONES + 1,)]
    clones = torch.cat(found.clones).tolist()
    torch.testing.assert_close([found.backbone.item(), *clones], norms, rtol=1e-6, atol=0)
    # Of parameters in their order, whichever head is the older.
    other = [*net["b"].parameters(), *net["a"].parameters()]
    assert [own.shape for own in alrao.grad_norms(other).clones] == [(CLONES + 1,), (CLONES,)]
    net["a"].zero_grad()
    assert [own.shape for own in alrao.grad_norms(net).clones] == [(CLONES + 1,)]


def test_without_heads_it_is_torchs(backend):
    ours = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))
    theirs = copy.deepcopy(ours)
    for net in (ours, theirs):
        give_gradients(net)
    norm = alrao.clip_grad_norm_(ours.parameters(), 0.7, 2.0, True, foreach=True)
    total = nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)
    torch.testing.assert_close(norm.float(), total, rtol=1e-6, atol=0)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
    assert alrao.grad_norms(ours).clones == ()


def test_a_clone_that_explodes_stops_nobody_else(backend):
    net = model()
    other = copy.deepcopy(net)
    for one in (net, other):
        give_gradients(one, scale=0.01)
    net.head.weight.grad[1] = 1e30
    net.head.weight.grad[2] = math.nan
    norm = alrao.clip_grad_norm_(net, 1.0)
    assert norm == alrao.clip_grad_norm_(other, 1.0) and norm < 1
    for p, q in zip(net.backbone.parameters(), other.backbone.parameters()):
        assert torch.equal(p.grad, q.grad)
    for clone in (0, 3):
        assert torch.equal(net.head.weight.grad[clone], other.head.weight.grad[clone])
    torch.testing.assert_close(net.head.weight.grad[1].norm().item(), 1.0, rtol=1e-5, atol=0)
    assert net.head.weight.grad[2].isnan().all() and net.head.bias.grad[2].isnan().all()


def test_absent_frozen_and_empty(backend):
    net = model()
    net.backbone.append(nn.Linear(16, 16))
    net.backbone.empty = nn.Parameter(torch.zeros(0, 3))
    net.backbone[0].requires_grad_(False)
    give_gradients(net)
    net.backbone[0].weight.grad = net.backbone[0].bias.grad = net.head.bias.grad = None
    before = grads_of(net.parameters())
    norm = alrao.clip_grad_norm_(net, 0.2)
    norms = assert_clipped(net, [net.head], before, 0.2)
    torch.testing.assert_close(norm.item(), norms[0], rtol=1e-6, atol=0)
    net.zero_grad()
    assert alrao.clip_grad_norm_(net, 0.2) == 0
    assert alrao.clip_grad_norm_(iter([]), 0.2) == 0


def test_given_twice_counts_once(backend):
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    assert alrao.clip_grad_norm_([p, p], 1.0) == 2
    torch.testing.assert_close(p.grad.tolist(), [0.5] * 4, rtol=1e-6, atol=0)


def test_several_dtypes(backend):
    net = model()
    net.backbone[0].bfloat16()
    net.head.double()
    give_gradients(net)
    before = [grad.double() for grad in grads_of(net.parameters())]
    found = alrao.grad_norms(net)
    exact = math.sqrt(sum(float(grad.square().sum()) for grad in before[:2]))
    torch.testing.assert_close(found.backbone.item(), exact, rtol=1e-6, atol=0)
    alrao.clip_grad_norm_(net, 0.1)
    torch.testing.assert_close(alrao.grad_norms(net).backbone.item(), 0.1, rtol=3e-3, atol=0)
    (clones,) = alrao.grad_norms(net).clones
    torch.testing.assert_close(clones.tolist(), [0.1] * CLONES, rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf])
def test_gradients_that_lie_apart_share_their_norms(backend, device, order):
    """As on two devices: the groups, each with some of the gradients."""
    lists = "grads", "firsts", "counts"
    whole = model()
    apart = copy.deepcopy(whole)
    for net in (whole, apart):
        give_gradients(net)
    parts = clip_grad._Parts(apart, None)
    ((where, group),) = parts._groups.items()
    number = 0 if where.type == "cpu" else where.index
    same = torch.device(where.type) if where.index is not None else torch.device(where.type, number)
    parts._groups = {
        device: group._replace(device=device, **{name: getattr(group, name)[cut] for name in lists})
        for device, cut in ((where, slice(3)), (same, slice(3, None)))
    }
    assert len(parts._groups) == 2
    norms = parts.clip(0.5, order)
    expected = clip_grad._Parts(whole, None).clip(0.5, order)
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)
    for p, q in zip(whole.parameters(), apart.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_scaled_gradients(backend, kind):
    plain = model()
    scaled = copy.deepcopy(plain)
    give_gradients(plain)
    give_gradients(scaled, scale=1024.0)
    norm = alrao.clip_grad_norm_(scaled, 0.5, grad_scale=kind(1024.0))
    assert norm == alrao.clip_grad_norm_(plain, 0.5)
    assert alrao.grad_norms(scaled, grad_scale=kind(1024.0)).backbone <= 0.5 + 1e-6
    for p, q in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(p.grad * 1024, q.grad, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:.*trained without any observation")
@pytest.mark.parametrize("fused", [None, True, "in the kernels"])
def test_under_a_grad_scaler(backend, device, fused):
    """Unscaled by the scaler, or clipped with the scale that the step takes: the parameters of an unscaled step."""
    runs = []
    for scale in (None, 2.0**10):
        net = copy.deepcopy(model())
        torch.manual_seed(0)
        opt = alrao.AlraoSGD(net, sampler=alrao.Constant(0.5), fused=bool(fused) or None)
        with torch.no_grad():
            for number, p in enumerate(net.parameters()):
                p.fill_(0.01 * number)
        give_gradients(net, scale=scale or 1.0)
        if scale is None:
            alrao.clip_grad_norm_(net, 0.3)
            opt.step()
        else:
            scaler = torch.amp.GradScaler(device.type, init_scale=scale)
            scaler.scale(torch.zeros((), device=device))
            if fused == "in the kernels":
                alrao.clip_grad_norm_(net, 0.3, grad_scale=scaler.get_scale())
            else:
                scaler.unscale_(opt)
                alrao.clip_grad_norm_(net, 0.3)
            scaler.step(opt)
        runs.append([p.detach().clone() for p in net.parameters()])
    for plain, other in zip(*runs):
        torch.testing.assert_close(plain, other, rtol=1e-6, atol=1e-7)


def test_error_if_nonfinite(backend):
    net = model()
    give_gradients(net)
    net.head.bias.grad[2, 1] = math.inf
    before = grads_of(net.parameters())
    with pytest.raises(
        RuntimeError, match=r"^net: the norm of the gradients of clone 2 is inf, exp"
    ):
        alrao.clip_grad_norm_(net, 0.1, error_if_nonfinite=True)
    for p, grad in zip(net.parameters(), before):
        assert torch.equal(p.grad, grad)
    net.backbone[0].bias.grad[0] = math.nan
    with pytest.raises(RuntimeError, match=r"gradients of the backbone is nan, of clone 2 is inf"):
        alrao.clip_grad_norm_(net, 0.1, error_if_nonfinite=True)
    other = model()
    give_gradients(other)
    with pytest.raises(RuntimeError, match="backbone is nan, of clone 2 of head 1 is inf"):
        alrao.clip_grad_norm_(nn.ModuleList([other, net]), 0.1, error_if_nonfinite=True)
    net.zero_grad()
    give_gradients(net)
    alrao.clip_grad_norm_(net, 0.1, error_if_nonfinite=True)
    assert alrao.grad_norms(net).backbone <= 0.1 + 1e-6


@pytest.mark.parametrize("bare", [False, True])
def test_compiled(bare):
    net = model()
    torch._dynamo.reset()
    norms = []
    for compiled in (False, True):
        give_gradients(net)

        def clip():
            return alrao.clip_grad_norm_(net.parameters() if bare else net, 0.5)

        run = torch.compile(clip, fullgraph=True, backend="aot_eager") if compiled else clip
        norms.append((run(), *grads_of(net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*norms))


def test_clipped_training_is_that_of_clipped_parts(backend):
    """A few steps end to end: the backbone's own gradient, whatever the clones have."""
    torch.manual_seed(0)
    net = model()
    opt = alrao.AlraoSGD(net, (1e-3, 1.0), generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, 8)
    y = (x[:, 0] > 0).long()
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = net(x, targets=y)
        loss.backward()
        alrao.clip_grad_norm_(net, 0.25)
        found = alrao.grad_norms(net)
        assert found.backbone <= 0.25 + 1e-6 and found.clones[0].max() <= 0.25 + 1e-6
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def sparse_net():
    net = nn.Sequential(nn.Linear(3, 3), nn.Embedding(4, 3, sparse=True))
    give_gradients(net)
    net[1].weight.grad = None
    net[1](torch.tensor([1, 2])).sum().backward()
    return net


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"max_norm": -1}, ValueError, "max_norm: got -1, expected a number >= 0, inf for none"),
        ({"max_norm": math.nan}, ValueError, "max_norm: got nan"),
        ({"max_norm": None}, TypeError, "max_norm: got None"),
        ({"norm_type": 0}, ValueError, "norm_type: got 0, expected the order of a norm"),
        ({"error_if_nonfinite": "no"}, TypeError, "error_if_nonfinite: got 'no'"),
        ({"foreach": 2}, TypeError, "foreach: got 2"),
        ({"grad_scale": 0.0}, ValueError, "grad_scale: got 0.0, expected the loss scale"),
        ({"norm_type": -math.inf}, ValueError, "norm_type: got -inf"),
        ({"norm_type": None}, TypeError, "norm_type: got None"),
        ({"norm_type": "2"}, TypeError, "norm_type: got '2'"),
        ({"max_norm": "a"}, TypeError, "max_norm: got 'a'"),
        ({"net": 3}, TypeError, "net: got 3, expected a torch.nn.Module, a parameter or"),
        ({"net": [3]}, TypeError, "net: got 3 as entry 0, expected a parameter"),
        ({"net": "net"}, TypeError, "net: got 'net'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_messages(arguments, error, words):
    net = model()
    give_gradients(net)
    before = grads_of(net.parameters())
    with pytest.raises(error, match=f"^{words}"):
        alrao.clip_grad_norm_(**{"net": net, "max_norm": 1.0, **arguments})
    if not {"max_norm", "error_if_nonfinite", "foreach"} & set(arguments):
        with pytest.raises(error, match=f"^{words}"):
            alrao.grad_norms(**{"net": net, **arguments})
    for p, grad in zip(net.parameters(), before):
        assert torch.equal(p.grad, grad)


def test_sparse_gradients_are_refused(backend):
    net = sparse_net()
    before = net[0].weight.grad.clone()
    with pytest.raises(
        RuntimeError,
        match=r"^net: the gradient of parameter 2 is of layout torch.sparse_coo, expected an ordin",
    ):
        alrao.clip_grad_norm_(net, 1e-3)
    assert torch.equal(net[0].weight.grad, before)


def test_complex_gradients_are_refused(backend):
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, dtype=torch.complex64))
    give_gradients(net)
    before = net[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"^net: the gradient of parameter 1: got dtype Complex"):
        alrao.clip_grad_norm_(net, 1e-3)
    assert torch.equal(net[0].weight.grad, before)


def test_what_a_head_shares_among_its_clones_is_the_backbones(backend):
    net = model()
    nn.utils.parametrizations.weight_norm(net.head, "weight", dim=0)
    net.head.temperature = nn.Parameter(torch.ones(CLONES - 1, 2))
    net.head.offset = nn.Parameter(torch.ones(()))
    give_gradients(net)
    parts = net.head.parametrizations.weight
    own = [net.head.bias.grad, parts.original0.grad, parts.original1.grad]
    shared = [p.grad for p in net.backbone.parameters()]
    shared += [net.head.temperature.grad, net.head.offset.grad]
    found = alrao.grad_norms(net)
    clones = [math.sqrt(sum(float(g[n].square().sum()) for g in own)) for n in range(CLONES)]
    backbone = math.sqrt(sum(float(g.square().sum()) for g in shared))
    torch.testing.assert_close(found.clones[0].tolist(), clones, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.backbone.item(), backbone, rtol=1e-6, atol=0)


def test_in_a_cuda_graph_without_waiting(backend, device):
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    net = model()
    give_gradients(net)
    first = grads_of(net.parameters())
    expected = alrao.clip_grad_norm_(net, 0.3)
    clipped = grads_of(net.parameters())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            norm = alrao.clip_grad_norm_(net, 0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):
        for p, grad in zip(net.parameters(), first):
            p.grad.copy_(grad)
        graph.replay()
        assert torch.equal(norm, expected)
        for p, grad in zip(net.parameters(), clipped):
            assert torch.equal(p.grad, grad)
