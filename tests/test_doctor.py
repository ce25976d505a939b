"""Protects: a row for every op and backend, with the reason where it is not available; that a wrong result, an
exception and a binary that does not load turn the exit status; the JSON form and the command itself."""

import json
import subprocess
import sys

import pytest

from alrao_fast import _extension, backends, doctor, functional


@pytest.fixture(scope="module")
def report():
    return doctor.report()


def test_every_op_on_every_backend(report):
    rows = {(row["op"], row["backend"]): row for row in report["ops"]}
    assert set(rows) == {(op, backend) for op in backends.OPS for backend in backends.BACKENDS}
    for (op, backend), row in rows.items():
        status = backends.status(op, backend)
        if status.available:
            assert row["state"] == "passed", row
            assert row["error"] < 1e-4
        else:
            assert (row["state"], row["detail"]) == ("unavailable", status.reason)
    assert report["healthy"]


def test_versions_and_build(report):
    assert report["build"] == _extension.build_info()
    if _extension.ERROR is None:
        assert report["cpu_isa"] in report["build"]["isas"]


def break_switch_update(monkeypatch, replacement):
    honest = functional.switch_update_

    def switch_update_(*state, impl):
        (honest if impl == "reference" else replacement)(*state, impl="auto")

    monkeypatch.setattr(functional, "switch_update_", switch_update_)
    monkeypatch.setattr(doctor, "_SELF_TESTS", {"switch_update": doctor._switch_update})
    monkeypatch.setattr(backends, "OPS", {"switch_update": "switch_update_"})
    monkeypatch.setattr(
        backends,
        "status",
        lambda op, backend: backends.Status(backend in ("cpu", "reference"), "-"),
    )


def test_a_wrong_result_is_a_failure(monkeypatch, capsys):
    break_switch_update(monkeypatch, lambda *state, impl: None)
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "failed" in said
    assert "logw: error" in said
    assert "SOMETHING IS BROKEN" in said


def test_an_exception_is_a_failure(monkeypatch, capsys):
    def raises(*state, impl):
        raise ValueError("out of order")

    break_switch_update(monkeypatch, raises)
    assert doctor.main() == 1
    assert "ValueError: out of order" in capsys.readouterr().out


@pytest.mark.parametrize(
    "build, healthy",
    [
        ({"torch": "2.99", "extension_skipped": None}, False),
        ({"extension_skipped": "no compiler"}, True),
    ],
)
def test_broken_and_left_out_extension(monkeypatch, capsys, build, healthy):
    monkeypatch.setattr(_extension, "ERROR", "it does not load")
    monkeypatch.setattr(_extension, "build_info", lambda: build)
    assert doctor.main() == (0 if healthy else 1)
    assert "it does not load" in capsys.readouterr().out


def test_command():
    done = subprocess.run(
        [sys.executable, "-m", "alrao_fast", "doctor", "--json"], capture_output=True, text=True
    )
    assert json.loads(done.stdout)["healthy"] == (done.returncode == 0)
