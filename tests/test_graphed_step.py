"""What this file protects: GraphedStep. Without a GPU everything but the capture itself, which a repetition of the step
stands in for: the warm-up that leaves no trace, the static batch, lr under schedulers, refusals. With one: replays
equal the ordinary loop bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import alrao_fast as alrao
from alrao_fast import backends, graphed_step, testing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Backbone(nn.Module):
    """With buffers that a forward writes, and a random generator that it draws from."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))

    def forward(self, x, scale=None):
        out = self.net(x)
        return out if scale is None else (out * scale, out.detach().mean())


def make(device=CPU, dtype=torch.float32, optimizer=alrao.AlraoSGD, **options):
    torch.manual_seed(0)
    net = alrao.AlraoModel(Backbone(), alrao.ClassifierClones(16, 5, 3)).to(device, dtype)
    if optimizer is alrao.AlraoSGD:
        options = {"momentum": 0.9, **options}
    generator = torch.Generator().manual_seed(1)
    return net, optimizer(net, (1e-3, 1.0), generator=generator, **options)


def batches(count, device=CPU, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = torch.randn(8, 6, generator=generator).to(device, dtype)
        yield x, torch.randint(5, (8,), generator=generator).to(device)


def everything(net, opt):
    """Copies of all that a step writes."""
    tensors = {name: value for name, value in net.state_dict().items()}
    tensors["running"] = net.head.running
    for number, own in opt.state_dict()["state"].items():
        tensors |= {f"{number}.{key}": v for key, v in own.items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # The same bits, NaN for NaN.
        assert torch.equal(actual[name].nan_to_num(nan=0.5), value.nan_to_num(nan=0.5)), name


def loop(net, opt, data, scaler=None, scheduler=None):
    losses = []
    for x, y in data:
        opt.zero_grad()
        loss = net(x, targets=y)
        if scaler is None:
            loss.backward()
            opt.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.detach().clone())
    return losses


@pytest.fixture
def repeated(monkeypatch):
    """The capture replaced by running the step again at each call, into the same outputs."""

    def capture(step, warm_up, steps, device):
        warm_up(steps)
        outputs = torch.zeros(())

        def replay():
            out = step()
            outputs.copy_(out[0] if isinstance(out, tuple) else out)

        return replay, outputs

    monkeypatch.setattr(graphed_step, "_capture", capture)
    monkeypatch.setattr(graphed_step, "_device_of", lambda tensors: tensors[0].device)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "after some steps"])
@pytest.mark.parametrize(
    ("optimizer", "dtype", "options"),
    [
        (alrao.AlraoSGD, torch.float32, {}),
        (alrao.AlraoAdam, torch.float32, {"amsgrad": True}),
        (alrao.AlraoMuon, torch.bfloat16, {}),
        (alrao.AlraoSGD, torch.bfloat16, {"master_weights": True}),
        (alrao.AlraoSGD, torch.bfloat16, {}),
        (alrao.AlraoSGD, torch.float32, {"fused": False}),
    ],
    ids=["sgd", "adam", "muon", "masters", "stochastic rounding", "reference"],
)
def test_construction_leaves_no_trace(repeated, fresh, optimizer, dtype, options):
    def start():
        net, opt = make(dtype=dtype, optimizer=optimizer, **options)
        if not fresh:
            loop(net, opt, batches(2, dtype=dtype))
        return net, opt

    data = list(batches(4, dtype=dtype))
    net, opt = start()
    torch.manual_seed(3)
    losses = loop(net, opt, data)
    expected = everything(net, opt)

    net, opt = start()
    before = everything(net, opt)
    torch.manual_seed(3)
    step = alrao.GraphedStep(net, opt, *data[-1])
    after = everything(net, opt)
    assert_same({name: after[name] for name in before}, before)
    created = after.keys() - before.keys()
    assert not fresh or all(not after[n].any() for n in created if "master" not in n)
    for (x, y), loss in zip(data, losses):
        assert torch.equal(step(x, y), loss)
    assert_same(everything(net, opt), expected)


def test_a_failed_construction_leaves_no_trace(monkeypatch):
    net, opt = make()
    before, lr = everything(net, opt), opt.param_groups[0]["lr"]

    def capture(step, warm_up, steps, device):
        warm_up(steps)
        raise RuntimeError("no")

    monkeypatch.setattr(graphed_step, "_capture", capture)
    monkeypatch.setattr(graphed_step, "_device_of", lambda tensors: tensors[0].device)
    with pytest.raises(RuntimeError, match="no"):
        alrao.GraphedStep(net, opt, *next(batches(1)))
    after = everything(net, opt)
    assert_same({name: after[name] for name in before}, before)
    assert opt.param_groups[0]["lr"] is lr
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("first", ["scheduler", "step"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.5),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    ],
    ids=["exponential", "cosine", "lambda"],
)
def test_schedulers_move_the_captured_lr(repeated, schedule, first):
    data = list(batches(5))
    net, opt = make()
    loop(net, opt, data, scheduler=schedule(opt))
    expected, lr = everything(net, opt), opt.param_groups[0]["lr"]

    net, opt = make()
    scheduler = schedule(opt) if first == "scheduler" else None
    step = alrao.GraphedStep(net, opt, *data[0])
    static = opt.param_groups[0]["lr"]
    scheduler = scheduler or schedule(opt)
    torch.manual_seed(0)
    make()
    for x, y in data:
        step(x, y)
        scheduler.step()
    assert opt.param_groups[0]["lr"] is static
    assert float(static) == pytest.approx(lr, rel=1e-12)
    for name, value in everything(net, opt).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)


def test_an_assigned_lr_is_taken_over(repeated):
    net, opt = make()
    x, y = next(batches(1))
    step = alrao.GraphedStep(net, opt, x, y)
    static = opt.param_groups[0]["lr"]
    before = [p.detach().clone() for p in net.parameters()]
    opt.param_groups[0]["lr"] = 0.0
    step(x, y)
    assert opt.param_groups[0]["lr"] is static and float(static) == 0.0
    for param, value in zip(net.parameters(), before):
        assert torch.equal(param, value)


@pytest.mark.parametrize("function", [nn.utils.clip_grad_norm_, alrao.clip_grad_norm_])
def test_gradient_scaler_and_clipping(repeated, function):
    data = list(batches(6))
    data[2] = (data[2][0] * float("inf"), data[2][1])

    def run(captured):
        net, opt = make()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

        def clip():
            scaler.unscale_(opt)
            function(net.parameters(), 0.01)

        torch.manual_seed(3)
        if captured:
            step = alrao.GraphedStep(net, opt, *data[0], scaler=scaler, before_step=clip)
            for x, y in data:
                step(x, y)
        else:
            for x, y in data:
                opt.zero_grad()
                scaler.scale(net(x, targets=y)).backward()
                clip()
                scaler.step(opt)
                scaler.update()
        return everything(net, opt), scaler.state_dict()

    expected, scale = run(False)
    actual, own = run(True)
    assert own == scale and scale["scale"] != 8.0
    assert_same(actual, expected)


@pytest.mark.parametrize("fused", [None, True])
def test_a_captured_step_leaves_the_scale_to_the_kernels(repeated, monkeypatch, fused):
    data = list(batches(5))
    data[2] = (data[2][0] * float("inf"), data[2][1])

    def run(captured):
        net, opt = make(fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        torch.manual_seed(3)
        if captured:
            step = alrao.GraphedStep(net, opt, *data[0], scaler=scaler)
            for x, y in data:
                step(x, y)
        else:
            loop(net, opt, data, scaler)
        assert hasattr(opt, "_step_supports_amp_scaling") == bool(fused)
        return everything(net, opt), scaler.state_dict(), [p.grad for p in net.parameters()]

    expected, scale, gradients = run(False)
    # It reads found_inf on the host, which no graph can.
    monkeypatch.delattr(torch.amp.GradScaler, "_maybe_opt_step")
    actual, own, left = run(True)
    assert own == scale
    assert_same(actual, expected)
    assert_same(dict(enumerate(left)), dict(enumerate(gradients)))


def test_parameters_written_between_steps_reach_the_masters(repeated):
    net, opt = make(dtype=torch.bfloat16, master_weights=True, lr=0.0)
    x, y = next(batches(1, dtype=torch.bfloat16))
    step = alrao.GraphedStep(net, opt, x, y)
    weight = net.head.weight
    for write in (lambda: weight.data.mul_(1.5), lambda: weight.detach().clamp_(-0.1, 0.1)):
        write()
        written = weight.detach().clone()
        step(x, y)
        assert torch.equal(weight, written)
        assert torch.equal(opt.state[weight]["master"], written.float())


def test_several_inputs_and_extras(repeated):
    net, opt = make()
    x, y = next(batches(1))
    step = alrao.GraphedStep(net, opt, (x, torch.ones(1)), y)
    assert step((x, torch.ones(1)), y).shape == ()
    with pytest.raises(ValueError, match="structure of example_inputs"):
        step(x, y)


def test_options_that_are_not_tensors_stay(repeated):
    net, opt = make()
    x, y = next(batches(1))
    step = alrao.GraphedStep(net, opt, (x, 2.0), y)
    with pytest.raises(
        ValueError, match=r"inputs\[1\]: got 3.0, but the step was captured with 2.0"
    ):
        step((x, 3.0), y)


def _other_momentum(net, opt):
    opt.param_groups[0]["momentum"] = 0.5


def _loaded(net, opt):
    opt.load_state_dict(opt.state_dict())


def _moved(net, opt):
    net.head.weight.data = net.head.weight.data.clone()


def _group_added(net, opt):
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


@pytest.mark.filterwarnings("ignore:1 bare tensors")
def _state_exchanged(net, opt):
    states = opt.state[net.head.weight]
    states["momentum_buffer"] = states["momentum_buffer"].clone()


def _params_exchanged(net, opt):
    group = opt.param_groups[0]
    group["params"] = list(group["params"])


def _retired(net, opt):
    assert alrao.retire_clones(net, below=1, keep=2) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_retired, "a parameter or a state of the optimizer was exchanged"),
        (_other_momentum, "momentum of param group 0 is 0.5, the captured step has 0.9"),
        (_loaded, "state was replaced since the capture"),
        (_moved, "other memory than at the capture"),
        (_state_exchanged, "a parameter or a state of the optimizer was exchanged"),
        (_params_exchanged, "a parameter or a state of the optimizer was exchanged"),
        (_group_added, "has 2 param groups, the captured step 1"),
    ],
)
def test_what_a_graph_cannot_follow_raises(repeated, change, message):
    net, opt = make()
    x, y = next(batches(1))
    step = alrao.GraphedStep(net, opt, x, y)
    change(net, opt)
    before = everything(net, opt)
    with pytest.raises(RuntimeError, match=message):
        step(x, y)
    assert_same(everything(net, opt), before)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda x, y: (x[:4], y), r"inputs: got shape \[4, 6\] .* captured with \[8, 6\]"),
        (lambda x, y: (x.double(), y), "inputs: got shape .* torch.float64"),
        (lambda x, y: (x, y[:4]), r"targets: got shape \[4\]"),
    ],
)
def test_other_shapes_and_dtypes_raise(repeated, batch, message):
    net, opt = make()
    x, y = next(batches(1))
    step = alrao.GraphedStep(net, opt, x, y)
    before = everything(net, opt)
    with pytest.raises(ValueError, match=message):
        step(*batch(x, y))
    assert_same(everything(net, opt), before)


def test_where_no_capture_is_possible():
    net, opt = make()
    x, y = next(batches(1))
    with pytest.raises(ValueError, match="net is on cpu; expected a CUDA device"):
        alrao.GraphedStep(net, opt, x, y)
    with pytest.raises(ValueError, match="net is in eval mode"):
        alrao.GraphedStep(net.eval(), opt, x, y)
    net.train()
    for name, value, error in (
        ("warmup", 0, ValueError),
        ("warmup", 2.5, TypeError),
        ("opt", torch.optim.SGD(net.parameters()), TypeError),
        ("net", net.forward, TypeError),
        ("example_targets", [0, 1], TypeError),
        ("scaler", 2.0, TypeError),
        ("before_step", 3, TypeError),
    ):
        arguments = {"net": net, "opt": opt, "example_inputs": x, "example_targets": y}
        with pytest.raises(error, match=rf"(?s)^{name}: got .*, expected"):
            alrao.GraphedStep(**{**arguments, name: value})


# On a GPU.

OP = "feature_sgd"


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    if backends.INTERPRETED:
        pytest.skip("Triton's kernels are interpreted in this process")
    for op in backends.OPS:
        reason = testing.require(op, request.param)
        if reason is not None:
            pytest.skip(f"{request.param}: {reason}")
    # Whatever chooses an algorithm by the workspace at hand would do so differently under capture.
    torch.use_deterministic_algorithms(False)
    with backends.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("optimizer", "dtype", "options"),
    [
        (alrao.AlraoSGD, torch.float32, {}),
        (alrao.AlraoAdam, torch.float32, {}),
        (alrao.AlraoMuon, torch.float32, {}),
        (alrao.AlraoSGD, torch.bfloat16, {"master_weights": True}),
        (alrao.AlraoSGD, torch.bfloat16, {}),
    ],
    ids=["sgd", "adam", "muon", "masters", "stochastic rounding"],
)
def test_replays_equal_the_loop(gpu_backend, optimizer, dtype, options):
    data = list(batches(6, CUDA, dtype))

    def start():
        net, opt = make(CUDA, dtype, optimizer, **options)
        torch.cuda.manual_seed(3)
        return net, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)

    net, opt, scheduler = start()
    losses = loop(net, opt, data, scheduler=scheduler)
    expected = everything(net, opt)
    net, opt, scheduler = start()
    step = alrao.GraphedStep(net, opt, *data[-1])
    for (x, y), loss in zip(data, losses):
        assert torch.equal(step(x, y), loss)
        scheduler.step()
    assert_same(everything(net, opt), expected)


def test_replays_equal_the_loop_under_a_scaler(gpu_backend):
    data = list(batches(6, CUDA))
    data[2] = (data[2][0] * float("inf"), data[2][1])
    results = []
    for captured in (False, True):
        net, opt = make(CUDA)
        torch.cuda.manual_seed(3)
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=2)
        if captured:
            step = alrao.GraphedStep(net, opt, *data[0], scaler=scaler)
            for x, y in data:
                step(x, y)
        else:
            loop(net, opt, data, scaler)
        results.append((everything(net, opt), scaler.state_dict()))
    (expected, scale), (actual, own) = results
    assert own == scale
    assert_same(actual, expected)


REFUSED = """
import torch, test_graphed_step as tests
import alrao_fast as alrao

net, opt = tests.make(tests.CUDA)
before = tests.everything(net, opt)
x, y = next(tests.batches(1, tests.CUDA))
try:
    alrao.GraphedStep(net, opt, x, y, before_step=lambda: float(net.head.weight.grad.sum()))
except RuntimeError as error:
    print(error)
after = tests.everything(net, opt)
tests.assert_same({name: after[name] for name in before}, before)
"""


def test_a_step_that_waits_for_the_device_is_refused(gpu_backend):
    # In a process of its own: a capture that fails leaves the device's generator unusable.
    environment = {**os.environ, "ALRAO_BACKEND": gpu_backend}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be captured" in done.stdout
