"""Which tests run where, and fixtures: poisoned memory, the backends that a test of an op runs on.

Marks (pyproject.toml says what for) may name parameters and the values for which they hold:
`interpreted(dtype=[torch.float32])`. A name or value that the test does not have is an error.
"""

import functools
import gc
import inspect
import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from alrao_fast import backends, testing

SELECTIVE_MARKS = ("device", "emulated", "sanitized", "interpreted", "many_launches", "slow")
# The parameters that say on which backend a test runs.
BACKEND_PARAMS = ("backend", "compiled", "dispatched", "gpu_backend")

# The same numbers in every run: whoever changes something else meets no new failure of an old test. Others are tried by
# --hypothesis-profile search.
settings.register_profile("same", derandomize=True, max_examples=40)
settings.register_profile("search", max_examples=2000)
settings.load_profile("same")


def pytest_addoption(parser):
    group = parser.getgroup("alrao_fast")
    group.addoption(
        "--backends",
        metavar="NAMES",
        help="of the tests that are made for several backends, those of these: cuda,triton",
    )
    group.addoption(
        "--at-least", metavar="N", type=int, default=0, help="fail unless N tests have passed"
    )


def is_worker(config):
    """Of pytest-xdist; its variables in the environment reach processes that are none."""
    return hasattr(config, "workerinput")


def pytest_configure(config):
    if is_worker(config):
        # One thread for each worker, here and in the processes that its tests start.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def multiply_in_float64():
    """Round the interpreter's products once, whatever the machine.

    It multiplies by numpy, whose float32 results depend on which kernel of BLAS runs on the processor; some of them are
    further from the truth than the products of torch, by which the error budgets are set.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.data.dtype != np.float32 or b.data.dtype != np.float32:
            return multiply(self, a, b, d, *options)
        total = a.data.astype(np.float64) @ b.data + d.data
        return TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def find_builtins_once():
    """Spare the interpreter the search for the language's builtins at every call of a function inside a kernel.

    It exchanges them there for its own, and went through all members of five namespaces: half of its time.
    """
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(namespace):
        members = inspect.getmembers(namespace)
        return [name for name, member in members if interpreter.tl.core.is_builtin(member)]

    def patch_builtin(namespace, *rest):
        for name in builtins_of(namespace):
            member = getattr(namespace, name)
            if interpreter.tl.core.is_builtin(member):
                interpreter._patch_attr(namespace, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


if backends.INTERPRETED and find_spec("triton"):
    multiply_in_float64()
    find_builtins_once()


def declare_torchvision_ops():
    """Let torchvision be imported whose library was built for another torch: CUDA's, beside a torch for the CPU.

    What the registry of packages has does not load there, and then not even its Python parts can be imported, which
    timm and Lightning take. The ops that they describe to torch need a schema; none of our tests calls them.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(os.path.join(os.path.dirname(spec.origin), "_C.so"))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, op):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


TORCHVISION = declare_torchvision_ops()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of --dist loadgroup, by the groups that whole files name: xdist 3.8's own has no effect under pytest 9.2."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    named = re.compile(r"^pytestmark = [^=]*?xdist_group\(\"(\w+)\"\)", re.MULTILINE)
    groups = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        if found := named.search(path.read_text()):
            groups[path.name] = found.group(1)

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = nodeid.split("::")[0].rsplit("/", 1)[-1]
            return groups.get(name, nodeid)

    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keep the cyclic collector from what stays: ten thousands of tests, and torch."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector):
    made = yield
    # All tests made from one function: here every value of its parameters can be seen.
    if isinstance(made, list) and made:
        for mark in {id(mark): mark for item in made for mark in item.own_markers}.values():
            if mark.name in SELECTIVE_MARKS and mark.kwargs:
                take_mark_where_it_does_not_hold(collector, made, mark)
    return made


def take_mark_where_it_does_not_hold(collector, items, mark):
    params = [(getattr(item, "callspec", None) and item.callspec.params) or {} for item in items]
    for name, values in mark.kwargs.items():
        for value in values:
            if not any(name in own and own[name] == value for own in params):
                raise collector.CollectError(
                    f"{items[0].originalname} is marked {mark.name}({name}=[{value!r}]),"
                    " and has no such parameter or value"
                )
    for item, own in zip(items, params):
        if mark in item.own_markers and any(own[k] not in v for k, v in mark.kwargs.items()):
            item.own_markers.remove(mark)


@pytest.hookimpl(tryfirst=True)  # marks count from then on
def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("--backends")
    chosen = chosen.split(",") if chosen else list(backends.BACKENDS)
    if unknown := set(chosen) - set(backends.BACKENDS):
        raise pytest.UsageError(f"--backends: there is no {', '.join(sorted(unknown))}")
    kept, others = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        name = next((params[p] for p in BACKEND_PARAMS if p in params), None)
        if name in ("cuda", "triton"):
            item.add_marker("device")
        (others if name in backends.BACKENDS and name not in chosen else kept).append(item)
    items[:] = kept
    if others:
        config.hook.pytest_deselected(items=others)
    if is_worker(config):
        # Whoever starts last shall not be the longest.
        items.sort(key=lambda item: -seconds(item))


def seconds(item):
    mark = item.get_closest_marker("long")
    return mark.args[0] if mark else 0


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or is_worker(session.config):
        return
    passed, floor = len(reporter.stats.get("passed", ())), session.config.getoption("--at-least")
    if passed < floor:
        reporter.write_line(f"\n{passed} tests have passed, expected at least {floor}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
    return available(request)


def available(request):
    reason = testing.require(request.module.OP, request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(request):
    """The device whose tensors the test's backend takes."""
    names = [name for name in BACKEND_PARAMS if name in request.fixturenames]
    return backends.device_of(request.getfixturevalue(names[0]))


@pytest.fixture(params=[name for name in backends.BACKENDS if name != "reference"])
def compiled(request):
    """A backend that is to be held against the reference, skipped as `backend` skips."""
    return available(request)


@pytest.fixture(params=["cpu", "cuda"])
def dispatched(request):
    """A backend of torch's dispatcher, skipped as `backend` skips."""
    return available(request)


@pytest.fixture
def used_backend(request):
    """Tests that take `backend` run on it when nothing is said, the others on the best one."""
    if "backend" not in request.fixturenames:
        yield
        return
    with backends.use_backend(request.getfixturevalue("backend")):
        yield


@pytest.fixture
def used_device(request):
    """New tensors of tests that take `backend` are on its device."""
    if "backend" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("device"):
        yield
