"""Runs the tests of the ops on the Triton kernels without a GPU, interpreted, in processes of their own.

The interpreter is chosen at the import of triton and cannot be left again. It is slow, so of the shared tests those run
that reach another path of a kernel, marked `interpreted`; `make test-all` runs every one (half an hour).
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest

from alrao_fast import backends

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
if backends.INTERPRETED:
    pytest.skip("the kernels are interpreted in this process already", allow_module_level=True)

if find_spec("triton"):
    import triton

    if (
        triton.__version__.startswith("3.6.")
        and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
    ):
        pytest.skip("Triton 3.6's interpreter needs numpy < 2.4", allow_module_level=True)

HERE = Path(__file__).resolve().parent
# The files of one process, and how many of their marked tests must pass.
PARTS = {
    "triton": (["test_triton.py", "test_triton_exponential.py"], 104),
    "plan": (["test_triton_plan.py"], 13),
    "feature": (
        [
            "test_feature_sgd.py",
            "test_feature_rounding.py",
            "test_feature_adam.py",
            "test_feature_averages.py",
        ],
        60,
    ),
    "mixture": (
        [
            "test_switch_mixture.py",
            "test_switch_mixture_dead.py",
            "test_switch_mixture_log_prob.py",
            "test_switch_mixture_autograd.py",
            "test_switch_mixture_extremes.py",
            "test_mixture_derivatives.py",
        ],
        115,
    ),
    "options": (["test_loss_options.py", "test_loss_weights.py", "test_loss_formulas.py"], 55),
    "switch": (["test_switch_update.py", "test_compat_golden.py"], 40),
    "gradient": (["test_gradient_clip.py"], 65),
}


def test_every_marked_file_runs():
    files = (path for path in HERE.glob("test_*.py") if path != Path(__file__))
    marked = {path.name for path in files if "mark.interpreted" in path.read_text()}
    assert marked == {name for names, _ in PARTS.values() for name in names}


@pytest.mark.long(50)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "marks",
    [
        "interpreted and not many_launches",
        pytest.param("interpreted or device", marks=pytest.mark.slow),
    ],
    ids=["paths", "all"],
)
def test_interpreted(part, marks):
    names, floor = PARTS[part]
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"),
            *("-m", marks, "--backends", "triton", "--at-least", str(floor)),
            *(str(HERE / name) for name in names),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "ALRAO_REQUIRE": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
