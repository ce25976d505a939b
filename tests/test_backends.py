"""Protects the choice of an implementation.

- auto by device; a backend asked for by name runs or raises with the cause, never another one in its place.
- `use_backend` and ALRAO_BACKEND; unknown names; a broken or missing extension is told at first use, not at import.
"""

import subprocess
import sys

import pytest
import torch

from alrao_fast import _extension, backends

CPU = torch.device("cpu")


def run_python(code: str, **environment: str) -> str:
    """Output of `code` in a fresh interpreter."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Choices are remembered per process; each test starts and ends without."""
    monkeypatch.setattr(backends, "_chosen", {})


def test_auto_takes_the_best_available():
    built = backends.status("switch_update", "cpu").available
    assert backends.select("switch_update", CPU) == ("cpu" if built else "reference")
    assert backends.select("switch_update", torch.device("meta")) == "reference"
    assert backends.available("switch_update", "cpu")[-1] == "reference"


def test_reference_by_name_and_by_context():
    assert backends.select("feature_sgd", CPU, "reference") == "reference"
    with backends.use_backend("reference"):
        assert backends.select("feature_sgd", CPU) == "reference"
        with backends.use_backend("auto"):
            assert backends.select("feature_sgd", CPU) == backends.select(
                "feature_sgd", CPU, "auto"
            )
    assert backends._default == "auto"


def test_context_is_left_on_an_error():
    with pytest.raises(KeyError), backends.use_backend("reference"):
        raise KeyError
    assert backends._default == "auto"


def test_absent_backend_raises_with_the_cause(monkeypatch):
    monkeypatch.setattr(_extension, "ERROR", "the compiled extension was not built (no compiler)")
    with pytest.raises(backends.BackendUnavailableError, match=r"'cpu' cannot run .*no compiler"):
        backends.select("switch_mixture", CPU, "cpu")
    assert backends.select("switch_mixture", CPU) == "reference"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: backends.select("feature_sgd", CPU, "gpu"), "impl: got 'gpu', expected auto"),
        (lambda: backends.select("feature_sgd", CPU, "cuda"), "does not run on cpu tensors"),
        (lambda: backends.status("adam", "cpu"), "op: got 'adam'"),
        (lambda: backends.status("feature_sgd", "gpu"), "backend: got 'gpu'"),
        (lambda: backends.use_backend("gpu").__enter__(), "name: got 'gpu'"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_environment_variable_names_the_default():
    code = (
        "import torch; from alrao_fast import backends;"
        "print(backends.select('feature_sgd', torch.device('cpu')))"
    )
    assert run_python(code, ALRAO_BACKEND="reference") == "reference"
    late = (
        "import torch; from alrao_fast import backends\n"
        "try: backends.select('feature_sgd', torch.device('cpu'))\n"
        "except ValueError as error: print(error)"
    )
    assert "impl: got 'fast'" in run_python(late, ALRAO_BACKEND="fast")


def test_import_initialises_no_device():
    code = "import torch, alrao_fast; print(torch.cuda.is_initialized())"
    assert run_python(code) == "False"
