"""AlraoMuon. Protects:

- its step against the mathematics written here in float64, on every backend, and against torch.optim.Muon and AdamW;
- which parameters are matrices and what their rows are: convolutions, gates, experts, embeddings, clones, what a
  group says;
- the bound of the rates by the size of an update; low precision, compiled, skipped and moved steps.
"""

import copy
import math

import pytest
import torch
from checkpoint_harness import generator
from torch import nn

import alrao_fast as alrao
from alrao_fast import AlraoAdam, AlraoMuon, Constant, Feature, PerWeight, describe_rates

OP = "feature_sgd"
pytestmark = pytest.mark.usefixtures("used_backend")
ADJUSTMENTS = ("original", "match_rms_adamw")


class Net(nn.Module):
    """Matrices of one shape twice, of its transpose, convolved, much taller than wide; and what is none."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        sizes = (6, 9), (9, 6), (6, 9), (9, 20)
        self.layers = nn.Sequential(*(nn.Linear(*size) for size in sizes))
        self.conv = nn.Conv1d(3, 4, 2)
        self.norm = nn.LayerNorm(6)


def net(device="cpu", dtype=torch.float64):
    torch.manual_seed(3)
    return Net().to(device, dtype)


MATRICES = {"conv.weight", *(f"layers.{k}.weight" for k in range(4))}


def gradient(name, param, step):
    torch.manual_seed(100 * step + sum(name.encode()))
    return torch.randn(param.shape, dtype=torch.float64).to(param)


def give(module, step):
    for name, param in module.named_parameters():
        param.grad = gradient(name, param, step)


def orthogonal(matrix):
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Reference:
    """The update of one parameter, in float64."""

    def __init__(self, param, rate, is_matrix, options):
        self.p, self.rate = param.detach().double().cpu().clone(), rate.double().cpu()
        self.m, self.v, self.average = 0 * self.p, 0 * self.p, self.p.clone()
        self.is_matrix, self.options = is_matrix, options

    def step(self, grad, t):
        o = self.options
        g = grad.double().cpu() * (-1 if o["maximize"] else 1)
        if self.is_matrix:
            self.m = o["momentum"] * self.m + (1 - o["momentum"]) * g
            ahead = o["momentum"] * self.m + (1 - o["momentum"]) * g
            d = orthogonal((ahead if o["nesterov"] else self.m).flatten(1))
            a, b = d.shape
            original = o["adjust_lr_fn"] == "original"
            d = d * (math.sqrt(max(1, a / b)) if original else 0.2 * math.sqrt(max(a, b)))
            d = d.view(self.p.shape)
        else:
            b1, b2 = o["betas"]
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g * g
            d = self.m / (1 - b1 ** (t + 1)) / ((self.v / (1 - b2 ** (t + 1))).sqrt() + 1e-8)
        rate = self.rate * o["lr"] * min(1, (t + 1) / o["warmup_steps"])
        self.p = self.p - rate * (d + o["weight_decay"] * self.p)
        a = o["averaging"]
        self.average = self.average + (a + 1) / (t + a + 1) * (self.p - self.average)


@pytest.mark.parametrize("adjust_lr_fn", ADJUSTMENTS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_against_float64(backend, device, adjust_lr_fn, nesterov):
    module = net(device)
    options = {
        "adjust_lr_fn": adjust_lr_fn,
        "nesterov": nesterov,
        "momentum": 0.8,
        "betas": (0.8, 0.95),
        "maximize": nesterov,
        "weight_decay": 0.3,
        "lr": 0.5,
        "warmup_steps": 3,
        "averaging": 2.0,
    }
    opt = AlraoMuon(module, (1e-2, 1.0), generator=generator(0), **options)
    references = {}
    for name, param in module.named_parameters():
        rate = opt.state[param]["rate"]
        by_column = name == "embedding.weight"
        rate = rate if param.dim() == 1 or by_column else rate.view(-1, *[1] * (param.dim() - 1))
        references[name] = Reference(param, rate, name in MATRICES, options)
    for t in range(6):
        give(module, t)
        opt.step()
        for name, param in module.named_parameters():
            references[name].step(gradient(name, param, t), t)
    for name, param in module.named_parameters():
        close = {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(param.detach().cpu(), references[name].p, **close)
        average = opt.state[param]["average"].cpu()
        torch.testing.assert_close(average, references[name].average, **close)
        assert int(opt.state[param]["step"]) == 6


@pytest.mark.parametrize("exponent", [70, -20])
def test_the_size_of_a_gradient_changes_nothing(backend, device, exponent):
    """Its square may be beyond float32."""
    modules = [net(device, torch.float32) for _ in range(2)]
    for module, scale in zip(modules, (1.0, 2.0**exponent)):
        opt = AlraoMuon(module.layers, generator=generator(0))
        give(module, 0)
        for param in module.parameters():
            param.grad.mul_(scale)
        opt.step()
    for once, scaled in zip(*(module.layers for module in modules)):
        torch.testing.assert_close(scaled.weight, once.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adjust_lr_fn", ADJUSTMENTS)
def test_torchs_muon_and_adamw(backend, device, adjust_lr_fn):
    """torch iterates in bfloat16, which is off by up to 0.02 in an entry of an orthogonal matrix."""
    ours, theirs = net(device, torch.float32), net(device, torch.float32)
    del ours.conv, theirs.conv
    opt = AlraoMuon(
        ours, sampler=Constant(0.02), adjust_lr_fn=adjust_lr_fn, weight_decay=0.1, lr=0.5
    )
    named = dict(theirs.named_parameters())
    matrices = [named[name] for name in named if name in MATRICES]
    others = [named[name] for name in named if name not in MATRICES]
    both = (
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn=adjust_lr_fn),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1),
    )
    steps = 8
    for t in range(steps):
        give(ours, t)
        give(theirs, t)
        opt.step()
        for other in both:
            other.step()
    for (name, mine), yours in zip(ours.named_parameters(), theirs.parameters()):
        moved = float((yours - net(device).get_parameter(name)).detach().abs().max())
        assert moved > 0.02
        atol = 0.01 * 0.02 * steps if name in MATRICES else 1e-6
        torch.testing.assert_close(mine, yours, rtol=0, atol=atol)


def orthogonalized(module, **options):
    opt = AlraoMuon(module, generator=generator(0), **options)
    rows = describe_rates(opt, file=None)
    return {row.parameter for row in rows if row.orthogonalized}, opt


@pytest.mark.filterwarnings("ignore:.* feature layout")
def test_which_parameters_are_matrices():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 5))

    class MyEmbedding(Bare):
        pass

    layouts = {"table": Feature(dim=1)}
    alrao.register_feature_layout(MyEmbedding, lambda module: layouts)
    try:
        module = nn.ModuleDict(
            {
                "linear": nn.Linear(4, 5),
                "one": nn.Linear(4, 1),
                "conv": nn.Conv2d(3, 4, 3),
                "gray": nn.Conv2d(1, 4, 3),
                "depthwise": nn.Conv2d(4, 4, 3, groups=4),
                "up": nn.ConvTranspose2d(4, 6, 2),
                "up_gray": nn.ConvTranspose2d(1, 6, 2),
                "up_depthwise": nn.ConvTranspose2d(4, 8, 2, groups=4),
                "lstm": nn.LSTM(3, 4),
                "attention": nn.MultiheadAttention(4, 2),
                "embedding": nn.Embedding(5, 4),
                "norm": nn.LayerNorm((3, 4)),
                "bare": Bare(),
                "mine": MyEmbedding(),
                "head": alrao.ClassifierClones(4, 3, 2),
            }
        )
        found, opt = orthogonalized(module)
    finally:
        alrao.register_feature_layout(MyEmbedding, None)
    recurrent = {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    attention = {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert found == {"linear.weight", "conv.weight", "up.weight"} | recurrent | attention
    assert [group["orthogonalize"] for group in opt.param_groups] == [True, False]
    rows = describe_rates(AlraoAdam(module), file=None)
    assert {row.orthogonalized for row in rows} == {None}


@pytest.mark.parametrize("names", [("table", "output"), ("output", "table")])
def test_an_embedding_shared_with_an_output_layer_is_none(names):
    """Whichever of the two comes first in the model."""
    layers = {"table": nn.Embedding(7, 4), "output": nn.Linear(4, 7, bias=False)}
    layers["output"].weight = layers["table"].weight
    module = nn.ModuleDict({name: layers[name] for name in names})
    found, _ = orthogonalized(module)
    assert found == set()


def test_what_a_group_says():
    module = net()
    groups = [
        {"params": module.layers[:2], "orthogonalize": False},
        {"params": [*module.layers[2].parameters(), *module.norm.parameters()], "momentum": 0.5},
        {"params": [module.embedding.weight], "orthogonalize": True, "lr": 0.1},
    ]
    found, opt = orthogonalized(groups, model=module)
    assert found == {"layers.2.weight", "embedding.weight"}
    kinds = [(g["orthogonalize"], g["momentum"], g["lr"]) for g in opt.param_groups]
    rest = {"momentum": 0.95, "lr": 1.0}
    assert kinds == [
        (False, *rest.values()),
        (True, 0.5, 1.0),
        (False, 0.5, 1.0),
        (True, 0.95, 0.1),
    ]
    own = opt.state[module.layers[2].weight]["drawn_rate"]
    assert own is opt.state[module.layers[2].bias]["drawn_rate"]
    for wrong in ([module.conv.bias], alrao.ClassifierClones(4, 3, 2)):
        count = len(opt.param_groups)
        with pytest.raises(ValueError, match="orthogonalize: got True with parameter"):
            opt.add_param_group({"params": wrong, "orthogonalize": True})
        assert len(opt.param_groups) == count
    opt.param_groups[1]["orthogonalize"] = False
    with pytest.raises(ValueError, match="orthogonalize: got False, expected True"):
        opt.step()


def follow(module, param, view):
    """The step of a parameter by the rate 1, and what it is made of its gradient's matrices, given as a list."""
    opt = AlraoMuon(module, sampler=Constant(1.0), nesterov=False)
    before = param.detach().clone()
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    moved = view(before - param.detach())
    for mine, grad in zip(moved, view(param.grad), strict=True):
        expected = 0.2 * math.sqrt(max(grad.shape)) * orthogonal(grad)
        torch.testing.assert_close(mine, expected)


def test_gates_convolutions_and_transposed_weights():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4).double()
    follow(lstm, lstm.weight_ih_l0, lambda t: [*t.view(4, 4, 3)])
    up = nn.ConvTranspose2d(4, 6, 2).double()
    follow(up, up.weight, lambda t: [t.transpose(0, 1).flatten(1)])
    # [I, O / groups, ...]: a row has the two inputs of its group.
    parts = [slice(0, 2), slice(2, 4)]

    def rows(t):
        return [torch.cat([t[own].transpose(0, 1).flatten(1) for own in parts])]

    for grouped in nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ConvTranspose1d(4, 6, 5, groups=2):
        follow(grouped.double(), grouped.weight, rows)
    conv = nn.Conv2d(3, 4, 2).double().to(memory_format=torch.channels_last)
    assert conv.weight.stride() != conv.weight.contiguous().stride()
    follow(conv, conv.weight, lambda t: [t.flatten(1)])


def test_a_rate_per_entry_leaves_the_matrices_as_they_are():
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {"lstm": nn.LSTM(3, 4), "up": nn.ConvTranspose2d(4, 6, 2), "gray": nn.Conv2d(1, 4, 3)}
    ).double()
    twin = copy.deepcopy(module)
    pairs = list(zip(module.parameters(), twin.parameters()))
    opts = [AlraoMuon(module, rate_bound=None, sampler=PerWeight(0.1, 0.1))]
    opts.append(AlraoMuon(twin, rate_bound=None, lr_range=(0.1, 0.1)))
    assert opts[0].state[module["up"].weight]["rate"].numel() == module["up"].weight.numel()
    for own, other in pairs:
        own.grad = torch.randn_like(own)
        other.grad = own.grad.clone()
    for opt in opts:
        opt.step()
    for own, other in pairs:
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64))

    dims = (0, 2) if transposed else (0, 1)
    alrao.register_feature_layout(Experts, lambda module: {"weight": Feature(dim=dims)})
    try:
        module = Experts()
        follow(module, module.weight, lambda t: [*(t.mT if transposed else t)])
        # Of 3 experts with 5 or 4 rows each.
        [group] = AlraoMuon(module).param_groups
        rate = AlraoMuon(module).state[module.weight]["rate"]
        assert group["orthogonalize"] and rate.numel() == (15 if transposed else 12)
    finally:
        alrao.register_feature_layout(Experts, None)


@pytest.mark.parametrize("adjust_lr_fn", ADJUSTMENTS)
def test_the_bound_is_the_part_of_a_feature_that_changes(adjust_lr_fn):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    before = layer.weight.detach().clone()
    opt = AlraoMuon(layer, (10.0, 10.0), rate_bound=0.03, adjust_lr_fn=adjust_lr_fn)
    layer.weight.grad = torch.randn_like(layer.weight)
    opt.step()
    changed = (layer.weight.detach() - before).norm(dim=1) / before.norm(dim=1)
    assert bool((changed > 0.02).all() and (changed < 0.04).all())
    assert torch.equal(opt.state[layer.weight]["drawn_rate"], torch.full((64,), 10.0))
    groups = [{"params": layer, "rate_bound": None}]
    assert "rate_limit" not in AlraoMuon(groups).state[layer.weight]


@pytest.mark.parametrize("masters", [False, True])
def test_bfloat16(backend, device, masters):
    """The momentum is float32; a small rate moves a parameter in the mean, or its master."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 32).to(device, torch.bfloat16)
    start = layer.weight.detach().float()
    opt = AlraoMuon(layer, sampler=Constant(1e-4), master_weights=masters, momentum=0.0)
    grad = torch.randn(32, 32).to(device, torch.bfloat16)
    for _ in range(50):
        layer.weight.grad = grad
        opt.step()
    own = opt.state[layer.weight]
    assert own["exp_avg"].dtype == torch.float32 and ("master" in own) is masters
    expected = -50e-4 * 0.2 * math.sqrt(32) * orthogonal(grad.double().cpu())
    moved = (own["master"] if masters else layer.weight.detach().float()) - start
    moved = moved.double().cpu()
    if masters:
        assert float((moved - expected).norm() / expected.norm()) < 0.02
    # Without the noise of the rounding, which has no bias.
    along = float((moved * expected).sum() / expected.square().sum())
    assert along == pytest.approx(1, abs=0.02 if masters else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler(backend, device, dtype):
    """With and without fused=True the same step; a skipped one leaves all as it was."""
    modules = [net(device, dtype) for _ in range(2)]
    plain = AlraoMuon(modules[0], sampler=Constant(0.1), master_weights=True)
    fused = AlraoMuon(modules[1], sampler=Constant(0.1), master_weights=True, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    scaler.scale(torch.zeros((), device=device))
    for t in range(3):
        give(modules[0], t)
        plain.step()
        give(modules[1], t)
        for param in modules[1].parameters():
            param.grad *= 2.0**10
        scaler.step(fused)
        scaler.update()
    for p, q in zip(modules[0].parameters(), modules[1].parameters()):
        assert torch.equal(p.grad, q.grad)
    give(modules[1], 5)
    modules[1].layers[0].weight.grad[0, 0] = float("inf")
    scaler.step(fused)
    for p, q in zip(modules[0].parameters(), modules[1].parameters()):
        assert torch.equal(p, q)
        for key, value in plain.state[p].items():
            assert torch.equal(fused.state[q][key], value), key


def test_a_compiled_step():
    torch._dynamo.reset()
    modules = [net(dtype=torch.float32) for _ in range(2)]
    eager, compiled = (
        AlraoMuon(m, generator=generator(0), averaging=8.0, warmup_steps=2) for m in modules
    )
    step = torch.compile(compiled.step, backend="eager", fullgraph=True)
    for t in range(3):
        for module in modules:
            give(module, t)
        eager.step()
        (step if t else compiled.step)()
    for p, q in zip(*(m.parameters() for m in modules)):
        torch.testing.assert_close(p, q)
        for key, value in eager.state[p].items():
            torch.testing.assert_close(compiled.state[q][key], value)


def test_moved_parameters_take_a_step_once():
    modules = [net(dtype=torch.float32) for _ in range(2)]
    first, second = (AlraoMuon(m, generator=generator(0)) for m in modules)
    for t in range(4):
        for module in modules:
            give(module, t)
        if t == 2:
            for param in modules[1].parameters():
                param.data = param.data.clone()
            modules[1].layers[1].weight.data = modules[1].layers[1].weight.data.t().clone().t()
        first.step()
        second.step()
    for p, q in zip(*(m.parameters() for m in modules)):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(first.state[p]["exp_avg"], second.state[q]["exp_avg"])
