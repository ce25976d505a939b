"""Protects how the optimizers' Triton kernels are started again, without a GPU: by a driver that starts nothing.

- What Triton's own launch passes on to the driver, to the last argument, is passed without it, too.
- Other devices, dtypes or alignments are looked up anew.
"""

import pytest
import torch

from alrao_fast import backends

pytest.importorskip("triton", reason="triton is not installed")
if backends.INTERPRETED:
    pytest.skip("the kernels are interpreted in this process", allow_module_level=True)

from alrao_fast.kernels.feature import adam
from alrao_fast.kernels.feature.frame import Plan, run_plan
from alrao_fast.kernels.feature.plan import Lists
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_aot import TARGETS

pytestmark = pytest.mark.xdist_group("triton_compile")


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 17}

    def load_binary(self, name, kernel, shared, device):
        # Module, function, registers, spills, threads of a block.
        return object(), (device, name), 32, 0, 1024

    def unload_module(self, module):
        pass


# Of no real device: what is compiled for it is kept by its number.
DEVICE = 1000


class Driver:
    """A device of sm_90 that notes what it is to start, and starts nothing."""

    def __init__(self):
        self.utils, self.launcher_cls = Utils(), self.launcher
        self.device, self.started = DEVICE, []

    def get_current_target(self):
        return TARGETS["sm_90"]

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 1 + device

    def launcher(self, source, metadata):
        return lambda *arguments: self.started.append(arguments)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(driver, "_active", Driver())
    return driver.active


@pytest.fixture
def jit_runs(monkeypatch):
    """The launches that go through Triton's own, by the kernels' names."""
    runs, run = [], JITFunction.run

    def counted(self, *arguments, **options):
        runs.append(self.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", counted)
    return runs


OPTIONS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0} | dict.fromkeys(
    ("amsgrad", "decoupled", "authors_eps"), False
)


class Step:
    """Steps of Adam over tensors of some dtypes: a launch for each of them, and that of the counts."""

    def __init__(self, *dtypes):
        params = [torch.ones(8, 6, dtype=dtype) for dtype in dtypes]
        states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        rates = [torch.ones(8) for _ in params]
        steps = torch.zeros(len(params), dtype=torch.int64)
        self.lists = Lists(params, states, [], rates, [6] * len(params), [], steps)
        self.plan = Plan(self.lists)
        self.grads = [torch.ones_like(p) for p in params]

    def __call__(self, **scalars):
        given = {"lr_tensor": None, "grad_scale": None, "found_inf": None, "lr": 1.0} | scalars
        run_plan(
            self.plan,
            adam.UPDATE,
            self.lists,
            self.grads,
            OPTIONS,
            maximize=False,
            warmup_steps=0.0,
            averaging=0.0,
            check=lambda: None,
            **given,
        )


def taken(device):
    """What was started since the last time: grid, stream, function and arguments, tensors by their memory."""

    def value(x):
        # What hooks get is a dict in an object of its own.
        return x.data_ptr() if isinstance(x, torch.Tensor) else getattr(x, "data", x)

    found = [[*map(value, arguments)] for arguments in device.started]
    device.started.clear()
    return found


@pytest.mark.parametrize("found_inf", [None, torch.zeros(1)], ids=["", "found_inf"])
def test_started_again_as_by_triton(device, jit_runs, found_inf):
    step = Step(torch.float32, torch.bfloat16)
    step(lr=0.25, found_inf=found_inf)
    assert jit_runs == ["feature_kernel", "feature_kernel", "count_steps_kernel"]
    first = taken(device)
    assert [arguments[4][1] for arguments in first] == jit_runs
    jit_runs.clear()
    step(lr=0.25, found_inf=found_inf)
    assert not jit_runs
    assert taken(device) == first
    step(lr=0.5, found_inf=found_inf)
    changed = [(a, b) for own, new in zip(first, taken(device)) for a, b in zip(own, new) if a != b]
    assert changed == [(0.25, 0.5)] * 2


def test_what_depends_on_the_arguments_is_looked_up_anew(device, jit_runs):
    step = Step(torch.float32)
    numbers = torch.ones(5)
    step(lr_tensor=numbers[:1])
    step(lr_tensor=numbers[4:])
    jit_runs.clear()
    for changes in (
        {},
        {"lr_tensor": numbers[1:2]},
        {"lr_tensor": numbers[:1].double()},
        {"lr_tensor": numbers[:1], "grad_scale": numbers[:1]},
    ):
        step(**changes)
        assert jit_runs == ["feature_kernel"]
        jit_runs.clear()
        step(**changes)
        assert not jit_runs
    device.device = DEVICE + 1
    taken(device)
    step()
    assert jit_runs == ["feature_kernel", "count_steps_kernel"]
    assert {(arguments[3], arguments[4][0]) for arguments in taken(device)} == {
        (DEVICE + 2, DEVICE + 1)
    }
