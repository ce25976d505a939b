"""Protects mixed precision, against torch.optim, on every backend:

- gradients, scale and parameters after scaler.step: groups of several dtypes, frozen parameters, a scale that grows, an
  infinite step, two optimizers of one scaler, gradients of 16 bits, scales that are no powers of two;
- training under autocast and gradient clipping, as one writes it and as Lightning does;
- fused=True alone leaves loss scaling to the step.
"""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import alrao_fast as alrao

OP = "feature_sgd"
pytestmark = pytest.mark.usefixtures("used_backend")
# Powers of two, by which every product is exact, fused into an addition or not.
RATE, DECAY, MOMENTUM = 2.0**-3, 2.0**-7, 0.5


def optimizers(kind, ours, groups, fused=None):
    """An optimizer of ours with one rate, or torch's."""
    options = {"weight_decay": DECAY, "fused": fused}
    if kind == "SGD":
        options["momentum"] = MOMENTUM
    if not ours:
        return getattr(torch.optim, kind)(groups, lr=RATE, **options)
    return getattr(alrao, f"Alrao{kind}")(groups, sampler=alrao.Constant(RATE), **options)


def groups(device):
    """Two groups, one of two dtypes, the other with a parameter that is frozen and one without a gradient."""
    torch.manual_seed(0)

    def parameter(*shape, dtype=torch.float32, frozen=False):
        value = torch.randn(*shape, dtype=dtype).to(device)
        return nn.Parameter(value, requires_grad=not frozen)

    first = [parameter(7, 5), parameter(7), parameter(3, 4, dtype=torch.float64)]
    return [
        {"params": first},
        {"params": [parameter(6, frozen=True), parameter(33, 2), parameter(4)], "maximize": True},
    ]


def give_gradients(params, step, scale):
    """The same for the same step: small whole numbers of 2^-10, so that a scale below 2^13 is exact."""
    generator = torch.Generator().manual_seed(step)
    for number, p in enumerate(params):
        values = torch.randint(-1000, 1000, p.shape, generator=generator) * 2.0**-10
        p.grad = (values.double() * scale).to(p) if p.requires_grad and number != 5 else None


def params_of(groups):
    return [p for group in groups for p in group["params"]]


def assert_same_gradients(actual, expected):
    for p, q in zip(actual, expected):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert p.grad.dtype == q.grad.dtype
            assert torch.equal(p.grad.nan_to_num(nan=7.0), q.grad.nan_to_num(nan=7.0))


@pytest.mark.filterwarnings("ignore:.* bare tensors")
@pytest.mark.parametrize("fused", [None, True])
def test_a_scaled_step_is_torchs(backend, device, fused):
    runs = []
    for ours in (True, False):
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2)
        scaler.scale(torch.zeros((), device=device))
        parts = [groups(device), groups(device)]
        opts = [optimizers(*pair, fused) for pair in zip(("SGD", "Adam"), (ours, ours), parts)]
        runs.append((scaler, [params_of(part) for part in parts], opts))
    (scaler, ours, own), (other, theirs, _) = runs
    for step in range(7):
        before = [[p.detach().clone() for p in params] for params in ours]
        for each, parts, opts in runs:
            for number, (params, opt) in enumerate(zip(parts, opts)):
                give_gradients(params, step, each.get_scale())
                if (step, number) in ((2, 0), (5, 1)):
                    # Only one of the two overflows.
                    params[1].grad[0] = math.inf
                    params[4].grad[-1] = math.nan
                each.step(opt)
            each.update()
        for number, (params, others) in enumerate(zip(ours, theirs)):
            assert_same_gradients(params, others)
            for p, q, old in zip(params, others, before[number]):
                if (step, number) in ((2, 0), (5, 1)):
                    assert torch.equal(p, old)
                elif number == 0:
                    assert torch.equal(p, q)
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert scaler.get_scale() == other.get_scale()
    assert scaler.get_scale() == 2.0**10  # down twice and up twice
    assert not any(hasattr(opt, name) for opt in own for name in ("grad_scale", "found_inf"))


def refused_by_grad_scaler(dtype, device):
    """bfloat16 on CUDA, up to torch 2.13 at least: the op by which GradScaler looks at gradients lacks it."""
    grad, one = torch.ones(1, dtype=dtype, device=device), torch.ones((), device=device)
    try:
        torch._amp_foreach_non_finite_check_and_unscale_([grad], torch.zeros_like(one), one)
    except NotImplementedError:
        return True
    return False


@pytest.mark.filterwarnings("ignore:.* bare tensors")
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_16_bits(backend, device, dtype, kind):
    if refused_by_grad_scaler(dtype, device):
        pytest.skip(f"torch's GradScaler takes no gradients of {dtype} on {device.type}")
    results = []
    for ours in (True, False):
        # As a number of float16 it would be infinite.
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
        scaler.scale(torch.zeros((), device=device))
        param = nn.Parameter(torch.linspace(-1, 1, 40, device=device).to(dtype))
        param.grad = torch.linspace(-6e4, 6e4, 40, device=device).to(dtype)
        scaler.step(optimizers(kind, ours, [param], fused=True))
        results.append(param)
    assert results[0].grad.any()
    assert_same_gradients(results[:1], results[1:])


@pytest.mark.filterwarnings("ignore:.* bare tensors")
def test_a_scale_that_is_no_power_of_two(backend, device):
    """The update takes the gradients that it leaves, and those are GradScaler's own."""
    results = []
    for fused in (True, None):
        scaler = torch.amp.GradScaler(device.type, init_scale=1000.0)
        scaler.scale(torch.zeros((), device=device))
        params = params_of(own := groups(device))
        opt = optimizers("SGD", True, own, fused)
        give_gradients(params, 0, 1000.0)
        scaler.step(opt)
        results.append(params)
    assert_same_gradients(*results)
    for p, q in zip(*results):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-7)


def network(device):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    return alrao.AlraoModel(backbone, alrao.ClassifierClones(16, 5, 3)).to(device)


def lightnings_step(scaler, opt, params, limit):
    """What lightning.pytorch's MixedPrecision does after the backward; returns the norm that it clips."""
    handles_unscaling = getattr(opt, "_step_supports_amp_scaling", False)
    if scaler is not None and not handles_unscaling:
        scaler.unscale_(opt)
    if handles_unscaling:
        raise RuntimeError("does not allow for gradient clipping")
    norm = nn.utils.clip_grad_norm_(params, limit)
    if scaler is None:
        opt.step()
    else:
        scaler.step(opt)
        scaler.update()
    return norm


@pytest.mark.parametrize("limit", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [None, False, True])
def test_training_under_autocast(backend, device, dtype, fused, limit):
    if fused and limit:
        pytest.skip("refused by Lightning for torch.optim's fused optimizers, too")
    results = []
    for ours in (True, False):
        net = network(device)
        opt = optimizers("SGD", ours, net if ours else net.parameters(), fused)
        scaler = None
        if dtype == torch.float16:
            scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=3)
        norms = []
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 6, generator=generator).to(device)
            y = torch.randint(5, (8,), generator=generator).to(device)
            opt.zero_grad()
            with torch.autocast(device.type, dtype=dtype):
                loss = net(x, targets=y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if limit is not None:
                norms.append(lightnings_step(scaler, opt, net.parameters(), limit))
            elif scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
        results.append((list(net.parameters()), norms, loss))
    (actual, norms, loss), (expected, other_norms, other_loss) = results
    assert torch.equal(loss, other_loss) and norms == other_norms
    assert_same_gradients(actual, expected)
    for p, q in zip(actual, expected):
        assert torch.equal(p, q)
    if limit is not None:
        assert max(norms) > limit
        norm = torch.cat([p.grad.flatten() for p in actual]).norm()
        assert float(norm) == pytest.approx(min(limit, float(norms[-1])), rel=1e-4)


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("kind", [alrao.AlraoSGD, alrao.AlraoAdam, alrao.AlraoMuon])
def test_only_fused_steps_take_the_scale(kind, fused):
    """As in torch.optim; what Lightning asks before it clips gradients."""
    opt = kind(nn.Linear(2, 2), fused=fused)
    for made in (opt, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert getattr(made, "_step_supports_amp_scaling", False) is bool(fused)


def test_fp16_parameters_need_no_fused():
    """GradScaler refuses to unscale their gradients: the kernels do."""
    assert not hasattr(
        alrao.AlraoSGD(nn.Linear(2, 2).half(), fused=False), "_step_supports_amp_scaling"
    )
    net = nn.Linear(2, 2).half()
    opt = alrao.AlraoSGD(net, sampler=alrao.Constant(0.5), master_weights=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = [p.detach().float() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.full_like(p, 2.0**11)
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    for p, old in zip(net.parameters(), before):
        torch.testing.assert_close(p.detach(), (old - 0.25).half())
        torch.testing.assert_close(p.grad, torch.full_like(p, 0.5))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips(backend, device, tmp_path, precision):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from lightning.pytorch.plugins import MixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self, ours):
            super().__init__()
            self.net, self.ours, self.norms = network("cpu"), ours, []

        def training_step(self, batch, index):
            return self.net(batch[0], targets=batch[1])

        def configure_optimizers(self):
            return optimizers("SGD", self.ours, self.net if self.ours else self.net.parameters())

        def configure_gradient_clipping(self, optimizer, **options):
            self.norms.append(self.norm())
            self.clip_gradients(optimizer, **options)
            self.norms.append(self.norm())

        def norm(self):
            return torch.cat([p.grad.flatten() for p in self.parameters()]).norm()

    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 6, generator=generator), torch.randint(5, (64,), generator=generator)
    )
    results = []
    for ours in (True, False):
        module = Module(ours)
        # Of its own accord it takes no float16 on a CPU.
        scaler = torch.amp.GradScaler(device.type) if precision == "16-mixed" else None
        lightning.Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1,
            max_epochs=1,
            plugins=MixedPrecision(precision, device.type, scaler),
            gradient_clip_val=0.05,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(module, torch.utils.data.DataLoader(data, 8))
        results.append(module)
    ours, theirs = results
    assert len(ours.norms) == 16 and ours.norms == theirs.norms
    assert max(ours.norms[::2]) > 0.05 and max(ours.norms[1::2]) <= 0.05 * (1 + 1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)
