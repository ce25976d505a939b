"""Protects scripts written for the authors' package: they run unmodified, and learn.

The scripts in tests/data import `alrao` and nothing of this package.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).with_name("data")


def run(script, *arguments, expect=0):
    command = [sys.executable, "-m", "alrao_fast.compat", str(script), *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert result.returncode == expect, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("optim", ["SGD", "Adam"])
def test_cnn_on_images(optim):
    out = run(DATA / "compat_cnn.py", "--epochs", "4", "--optim", optim)
    assert "Classifiers LR:1.0e-04, 6.3e-04, 4.0e-03, 2.5e-02, 1.6e-01, 1.0e+00" in out
    assert "epoch 3" in out and re.search(r"\|[ ▁▂▃▄▅▆▇█]{6}\|", out)
    assert float(re.search(r"test accuracy (\S+)", out).group(1)) > 0.9


def test_lstm_on_text():
    out = run(DATA / "compat_lstm.py", "--lr", "auto")
    assert "arguments ['--lr', 'auto']" in out
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", out)]
    assert len(losses) == 3 and losses[2] < 0.7 * losses[0]


def test_regression():
    out = run(DATA / "compat_regression.py")
    assert float(re.search(r"error (\S+)", out).group(1)) < 0.02


def test_the_written_out_loop_in_the_older_names():
    out = run(DATA / "compat_appendix.py")
    assert float(re.search(r"accuracy (\S+)", out).group(1)) > 0.8


def test_a_package_of_that_name_beside_the_script_is_not_used(tmp_path):
    (tmp_path / "alrao.py").write_text("raise SystemExit('the wrong package')")
    (tmp_path / "helper.py").write_text("VALUE = 7")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, helper, alrao, alrao.switch\n"
        "assert __name__ == '__main__'\n"
        "print(helper.VALUE, sys.argv[1:], alrao.switch.Switch.__module__)\n"
    )
    assert "7 ['a', '-b'] alrao_fast.compat.switch" in run(script, "a", "-b")


def test_processes_that_are_spawned_find_it_too(tmp_path):
    (tmp_path / "alrao.py").write_text("raise SystemExit('the wrong package')")
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, alrao\n"
        "from alrao.switch import Switch\n"
        "def work(switch): print(type(switch) is Switch, alrao.__name__, __name__)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=work, args=(Switch(2),))\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    assert "True alrao_fast.compat __mp_main__" in run(script)


def test_what_cannot_be_run():
    assert "no such script: nowhere.py" in run("nowhere.py", expect=2)
    command = [sys.executable, "-m", "alrao_fast.compat"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=DATA.parents[1])
    assert result.returncode == 2 and "usage:" in result.stdout


def test_install_refuses_to_replace_an_imported_package():
    code = (
        "import sys, types; sys.modules['alrao'] = types.ModuleType('alrao')\n"
        "import alrao_fast.compat as compat\n"
        "compat.install()"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=DATA.parents[1])
    assert "alrao has already been imported" in result.stderr
