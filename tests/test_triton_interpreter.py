"""Runs the tests of the ops on the Triton kernels without a GPU, interpreted, each file in a process of its own.

The interpreter is chosen at the import of triton and cannot be left again. It is slow, so of the shared tests those run
that reach another path of a kernel; ALRAO_INTERPRET=all runs every one (half an hour).
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
        and numpy.lib.NumpyVersion(numpy.__version__) >= "2.5.0"
    ):
        pytest.skip("Triton 3.6's interpreter needs numpy < 2.5", allow_module_level=True)

CHOSEN = {
    "test_triton.py": "not (chunks and (special or size or regression))",
    "test_switch_update.py": "triton",
    "test_compat_golden.py": "triton and mlp",
    "test_switch_mixture.py": (
        "triton and (hand or clones_own or compile or first_of_equal or invalid or leading "
        "or only_the_gradients or all_clones_dead and joint or streamed and its and float32)"
    ),
    "test_feature_sgd.py": (
        "triton and (hand or several_dtypes or master or found_inf or invalid or one_graph "
        "or equals and float32 and (authors or loss) or equals and float64 and loss "
        "or bits and bfloat16 and 5 or every_bit and stochastic)"
    ),
    "test_feature_adam.py": (
        "triton and (hand or masters or found_inf or invalid or keeps_a_nan or one_graph "
        "or equals and float32 and (amsgrad or authors))"
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_interpreted(name):
    chosen = "triton" if os.environ.get("ALRAO_INTERPRET") == "all" else CHOSEN[name]
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"),
            *(("-k", chosen) if chosen else ()),
            str(Path(__file__).with_name(name)),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "ALRAO_REQUIRE": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
