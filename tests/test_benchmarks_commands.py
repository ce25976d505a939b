"""`python benchmarks` itself and its short commands. Protects:

- a command runs from any directory, with the installed alrao_fast and no package `kernels` from the checkout;
- every command's module is there; demo from end to end: records, plots; compat's two steps agree and are timed.
"""

import importlib
import json
import runpy
import subprocess
import sys

import benchmarks_package
import pytest
import torch

benchmarks_package.load()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_runs_from_anywhere(tmp_path):
    command = [
        sys.executable,
        str(benchmarks_package.FOLDER),
        "gpu_ceilings",
        "--out",
        "found.json",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["copy_bytes_per_second"] > 0 and found["float32_flops_per_second"] > 0
    code = (
        "import runpy, sys; sys.argv = ['benchmarks', 'gpu_status']\n"
        f"try: runpy.run_path({str(benchmarks_package.FOLDER)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import importlib.util; assert importlib.util.find_spec('kernels') is None, sys.path"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_every_command_has_a_module():
    main = runpy.run_path(str(benchmarks_package.FOLDER / "__main__.py"))
    for command in main["COMMANDS"]:
        module = main["MODULES"].get(command, f"{command}.command")
        assert callable(importlib.import_module(f"benchmarks.{module}").main), command


def test_demo(tmp_path, capsys):
    from benchmarks.experiments.demo import main

    main(["--epochs", "1", "--seeds", "1", "--results", str(tmp_path)])
    found = json.loads((tmp_path / "runs.json").read_text())
    assert len(found["runs"]) == 9 and found["step_times"]["sgd"] == 1.0
    assert len(found["runs"][0]["posterior"][0]) == 10
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "loss_vs_lr.png",
        "learning_curves.png",
        "posterior.png",
    }
    assert "best of grid" in capsys.readouterr().out


def test_compat():
    from benchmarks.speed.compat import measure

    ours, loop = measure(batch=4, width=8, classes=5, clones=2, momentum=0.9, rounds=3)
    assert ours > 0 and loop > 0
