"""Fixtures of the suite: poisoned memory, and the backends that a test of an op runs on."""

from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch

from alrao_fast import backends, testing
from alrao_fast.ops import feature_adam, feature_sgd
from alrao_fast.ops.feature import FeatureOp, Lists
from alrao_fast.ops.plan import CompiledPlan


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh tensors with NaN, so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def opcheck_where_it_runs(monkeypatch):
    """torch.library.opcheck imports expecttest, which not every machine without a network has."""
    if find_spec("expecttest") is None:
        monkeypatch.setattr(
            torch.library, "opcheck", lambda *args, **kwargs: pytest.skip("expecttest is missing")
        )


@pytest.fixture(params=backends.BACKENDS)
def backend(request):
    """Every backend by name, skipped with its reason where the test's op (module constant OP) cannot run."""
    reason = testing.require(request.module.OP, request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend):
    """The device whose tensors the backend takes."""
    return backends.device_of(backend)


class Compiled(NamedTuple):
    """A compiled backend of a feature op: the device whose tensors it takes, and its plans, made of the op's lists."""

    device: torch.device
    op: FeatureOp

    def plan(self, *lists):
        return CompiledPlan(self.op, Lists(*lists))

    def to_device(self, *tensors):
        return [tensor.to(self.device) for tensor in tensors]


@pytest.fixture(params=["cpu", "cuda"])
def compiled(request):
    """The compiled backends, skipped as `backend` skips."""
    name = request.module.OP
    reason = testing.require(name, request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    op = {"feature_sgd": feature_sgd.OP, "feature_adam": feature_adam.OP}[name]
    return Compiled(backends.device_of(request.param), op)
