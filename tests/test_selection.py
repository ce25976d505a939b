"""Protects the choice of what runs where (conftest.py): marks that name parameters, --backends, --at-least.

A mark whose parameter or value is gone is an error, and so is a run of fewer tests than it should have: nothing drops
out in silence.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTS = """
import pytest

OP = "feature_sgd"


@pytest.mark.sanitized(size=[2], name=["a"])
@pytest.mark.sanitized(size=[{value}])
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sizes(size, name):
    pass


def test_backends(backend):
    pass
"""


@pytest.fixture
def run(tmp_path):
    """Runs pytest on the tests above; returns exit status and output."""
    (tmp_path / "conftest.py").symlink_to(HERE / "conftest.py")

    def run(*arguments, value=3):
        (tmp_path / "test_it.py").write_text(TESTS.format(value=value))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_mark_holds_for_the_values_it_names_and_too_few_tests_fail(run):
    code, said = run("-m", "sanitized", "--at-least", "4")
    passed = {line.split()[0] for line in said.splitlines() if "PASSED" in line}
    assert passed == {f"test_it.py::test_sizes[{name}]" for name in ("2-a", "3-a", "3-b")}, said
    assert code == 1 and "3 tests have passed, expected at least 4" in said


def test_a_value_that_is_gone_is_an_error(run):
    code, said = run(value=4)
    assert code != 0
    assert "test_sizes is marked sanitized(size=[4]), and has no such parameter or value" in said


def test_only_some_backends(run):
    code, said = run("--backends", "reference", "--at-least", "7")
    assert code == 0, said
    assert "test_backends[reference]" in said and "test_backends[cpu]" not in said
    assert "7 passed, 3 deselected" in said
