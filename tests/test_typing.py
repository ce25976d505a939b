"""Protects the types: a user's program passes `mypy --strict`, with the package as it is installed, editable too.

- typing/user.py uses the public names without an error; typing/wrong.py has mistakes, each of which is found.
- `__all__` is what a checker can read, and has every name of `nn`, `optim` and `ops.mixture`.
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import alrao_fast
from alrao_fast.ops import mixture

PROGRAMS = Path(__file__).with_name("typing")
CODE = re.compile(r"(?:^|  )\[([a-z-]+)\]$")


# mypy runs once.
pytestmark = pytest.mark.xdist_group("mypy")


@pytest.fixture(scope="module")
def errors(request):
    """What mypy finds in the programs, as (file, line, code)."""
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install -e '.[dev]'")
    # Outside of the repository, whose configuration and folders a user does not have.
    folder = request.config.cache.mkdir("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"]
    done = subprocess.run(
        [*command, "--cache-dir", folder, *sorted(PROGRAMS.glob("*.py"))],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    # torch's own: an annotation of its arguments, but none of its result.
    lines = [line for line in lines if 'Call to untyped function "backward"' not in line]
    return [(Path(line.split(":")[0]).name, int(line.split(":")[1]), line) for line in lines]


@pytest.mark.long(12)
def test_a_users_program(errors):
    """Where alrao_fast is not found, the editable install is of another time: pip install -e . mends it."""
    assert [line for file, _, line in errors if file == "user.py"] == []


def test_mistakes_are_found(errors):
    expected = {}
    for number, line in enumerate((PROGRAMS / "wrong.py").read_text().splitlines(), 1):
        if code := CODE.search(line):
            expected[number] = code[1]
    found = {number: CODE.search(line)[1] for file, number, line in errors if file == "wrong.py"}
    assert found == expected and len(expected) >= 6


@pytest.mark.parametrize(
    "module, names",
    [
        (alrao_fast, [*alrao_fast.nn.__all__, *alrao_fast.optim.__all__]),
        (alrao_fast.functional, mixture.__all__),
    ],
    ids=["alrao_fast", "functional"],
)
def test_all_names(module, names):
    assert sorted(set(names) - set(module.__all__)) == []
    assert all(hasattr(module, name) for name in module.__all__)
    # In the order of Python's sort, once each.
    assert module.__all__ == sorted(set(module.__all__))
    # `from alrao_fast import *` must not take torch's away.
    assert not {"nn", "optim"} & set(module.__all__)
