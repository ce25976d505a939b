"""Protects the choice of an implementation.

- auto by device; a backend asked for by name runs or raises with the cause, never another one in its place.
- `use_backend`, for the thread or task that runs the block, compiled code included, and ALRAO_BACKEND; unknown names,
  with where they come from; a broken or missing extension is told at first use, not at import.
"""

import asyncio
import subprocess
import sys
import threading

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
    assert backends._in_use.get() == backends._of_process


def test_context_is_left_on_an_error():
    with pytest.raises(KeyError), backends.use_backend("reference"):
        raise KeyError
    assert backends._in_use.get() == backends._of_process


def in_use():
    return backends.select("feature_sgd", CPU)


def test_blocks_of_two_threads_overlap():
    entered, left, seen = threading.Event(), threading.Event(), []

    def other():
        seen.append(in_use())
        with backends.use_backend("reference"):
            entered.set()
            left.wait(10)
            seen.append(in_use())
        seen.append(in_use())

    default = in_use()
    thread = threading.Thread(target=other)
    with backends.use_backend("auto"):
        thread.start()
        entered.wait(10)
        seen.append(in_use())
    left.set()
    thread.join()
    assert seen == [default, default, "reference", default] and in_use() == default


def test_blocks_of_two_tasks_overlap():
    async def task(name, seen):
        with backends.use_backend(name):
            await asyncio.sleep(0.01)
            seen.append((name, in_use()))
        await asyncio.sleep(0)
        seen.append(("after", in_use()))

    async def both():
        seen = []
        await asyncio.gather(task("reference", seen), task("auto", seen))
        return seen

    default = in_use()
    assert sorted(asyncio.run(both())) == sorted(
        [("reference", "reference"), ("auto", default), ("after", default), ("after", default)]
    )


def test_compiled_code_follows_the_block():
    number = {name: k for k, name in enumerate(backends.BACKENDS)}

    def chosen(x):
        return x + number[backends.select("feature_sgd", x.device)]

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")

    def run(seen):
        seen.append(backends.BACKENDS[int(compiled(torch.zeros(())))])

    seen, elsewhere, default = [], [], in_use()
    run(seen)
    with backends.use_backend("reference"):
        run(seen)
        thread = threading.Thread(target=run, args=(elsewhere,))
        thread.start()
        thread.join()
        run(seen)
    run(seen)
    assert seen == [default, "reference", "reference", default] and elsewhere == [default]


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
        (lambda: backends.use_backend("gpu"), "name: got 'gpu'"),
        (lambda: backends.select("feature_sgd", CPU, ""), "impl: got '', expected auto"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", [None, 3, ["cpu"]])
def test_names_of_other_types(name):
    for call, argument in (
        (lambda: backends.select("feature_sgd", CPU, name), "impl"),
        (lambda: backends.use_backend(name), "name"),
    ):
        with pytest.raises(TypeError, match=f"{argument}: got .*expected auto or one of cuda"):
            call()


def test_a_block_is_named_where_its_backend_does_not_run_on_the_tensors():
    with (
        backends.use_backend("cuda"),
        pytest.raises(ValueError, match="use_backend: 'cuda' does not run on cpu tensors"),
    ):
        backends.select("feature_sgd", CPU)


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
    assert "ALRAO_BACKEND: got 'fast', expected auto or one of cuda" in run_python(
        late, ALRAO_BACKEND="fast"
    )


def test_import_initialises_no_device():
    code = "import torch, alrao_fast; print(torch.cuda.is_initialized())"
    assert run_python(code) == "False"
