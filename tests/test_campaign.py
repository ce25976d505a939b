"""Generated calls of the whole public API and fixed cases: each is right or raises a clear error (campaign/). Protects:

- options, parameters, data and state of every kind, by hand or by file, against torch.optim, plain torch and float64;
- modes of autograd, networks that diverge, averages of models, copies and checkpoints;
- that a training killed at random moments ends bit for bit as one that was let alone;
- the judge: a wrong result, an obscure error, a changed state and a refused good value are failures.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from campaign import __main__ as command
from campaign import engine, kills, registry
from campaign.engine import ERROR, FAILURE, RIGHT, Trial, judge

CALLS, CHUNK = 1200, 100


def failures(seed: int, numbers: range) -> str:
    outcomes = [registry.run(f"{seed}:{number}") for number in numbers]
    return "\n".join(str(outcome) for outcome in outcomes if outcome.verdict == FAILURE)


@pytest.mark.long(5)
@pytest.mark.parametrize("first", range(0, CALLS, CHUNK))
def test_generated(first):
    found = failures(0, range(first, first + CHUNK))
    assert not found, f"\n{found}\nto repeat one: python tests/campaign --only ID"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_generated_at_length(seed):
    found = failures(seed, range(5000))
    assert not found, f"\n{found}\nto repeat one: python tests/campaign --only ID"


@pytest.mark.parametrize("name", registry.CASES)
def test_case(name):
    outcome = registry.run(name)
    assert outcome.verdict != FAILURE, f"\n{outcome}"


def test_ids_repeat_a_call():
    first = [registry.run(f"0:{number}") for number in range(25)]
    again = [registry.run(f"0:{number}") for number in reversed(range(25))]
    assert [o[:4] for o in first] == [o[:4] for o in reversed(again)]


QUICK = ("SGD, masters", "Adam, stochastic rounding")


@pytest.mark.parametrize(
    ("case", "number", "steps"),
    [
        *((case, 4, 60) for case in QUICK),
        *(pytest.param(case, 100, 600, marks=pytest.mark.slow) for case in kills.CASES),
    ],
)
def test_killed_and_resumed(case, number, steps, tmp_path):
    program = [sys.executable, kills.__file__, "--case", case, "--kills", str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, "--steps", str(steps), "--folder", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every bit is the same" in done.stdout


def fill(tensor):
    tensor.fill_(3.0)
    raise ValueError("x: got 2, expected 3")


def raises(problem):
    raise problem


@pytest.mark.parametrize(
    ("run", "expect", "verdict", "kind"),
    [
        (lambda t: 3, "right", RIGHT, ""),
        (lambda t: 4, "right", FAILURE, "accepted and wrong"),
        (lambda t: 4, "either", FAILURE, "accepted and wrong"),
        (lambda t: 3, "refused", FAILURE, "accepted"),
        (lambda t: raises(ValueError("x: got 2, expected 3")), "refused", ERROR, ""),
        (lambda t: raises(ValueError("x: got 2, expected 3")), "either", ERROR, ""),
        (lambda t: raises(ValueError("x: got 2")), "right", FAILURE, "refused a good value"),
        (lambda t: raises(ValueError("x: got 5, expected 3")), "refused", FAILURE, "obscure error"),
        (lambda t: raises(ValueError("y: got 2, expected 3")), "refused", FAILURE, "obscure error"),
        (lambda t: raises(ValueError("x: got 2")), "refused", FAILURE, "obscure error"),
        (lambda t: raises(KeyError("x: got 2, expected 3")), "refused", FAILURE, "obscure error"),
        (lambda t: "x" < 2, "refused", FAILURE, "obscure error"),
        (
            lambda t: raises(ValueError("x: got 2, expected 3, /a/b.cpp:3")),
            "refused",
            FAILURE,
            "a path in the message",
        ),
        (fill, "refused", FAILURE, "changed by a call that raised"),
    ],
)
def test_judge(run, expect, verdict, kind):
    def right(result):
        assert result == 3

    tensor = torch.zeros(2)
    trial = Trial("", lambda: run(tensor), expect, right, ("x",), 2, [tensor])
    assert judge(trial)[:2] == (verdict, kind)


def test_changed_global_state_is_a_failure(monkeypatch):
    def leave_a_trace():
        torch.set_grad_enabled(False)

    monkeypatch.setitem(engine.CASES, "trace", leave_a_trace)
    outcome = registry.run("trace")
    assert outcome.verdict == FAILURE and "grad" in outcome.why
    assert torch.is_grad_enabled()


def test_command_line_survives_a_crash():
    """A call that ends its process is the failure of that call; the others are still counted."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from campaign import __main__, engine\n"
        "engine.CASES['crash'] = lambda: os._exit(9)\n"
        "sys.exit(__main__.main())"
    )
    worker = [sys.executable, "-c", code, "--worker"]
    outcomes = list(command.isolated(["0:0", "crash", "0:1"], 1, worker))
    assert [(o.id, o.kind == "crash") for o in outcomes] == [
        ("0:0", False),
        ("crash", True),
        ("0:1", False),
    ]
    assert "1 crash" in command.table(outcomes, short=True)
