"""The scripts of examples/ at their smallest setting, and what `--help` does: nothing but help.

Each runs in this process (importing torch and the rest anew takes longer than the training does), in an empty
folder, and says at its end how well it predicts.
"""

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# The script, its smallest setting, the packages beside torch, and what it prints at its end.
SCRIPTS = {
    "digits.py": ("--epochs 5", "sklearn", r"epoch   5 .* test accuracy (9\d|[78]\d)"),
    "cifar10.py": (
        "--fake 32 --epochs 1 --batch 8 --workers 0 --blocks 1",
        "torchvision tqdm",
        r"epoch   1 ",
    ),
    "char_transformer.py": (
        "--steps 20 --width 32 --depth 1 --context 16 --sample 20",
        "tqdm",
        r"validation: [0-6]\.\d+ bits per character",
    ),
    "gpt2_trainer.py": (
        "--steps 10 --width 32 --layers 1 --context 16",
        "transformers accelerate",
        r"validation: [0-8]\.\d+ bits per byte",
    ),
    "lightning_digits.py": ("--epochs 4", "lightning sklearn", r"test accuracy (9\d|[78]\d)"),
    "accelerate_digits.py": ("--epochs 4", "accelerate sklearn", r"test accuracy (9\d|[78]\d)"),
    "train_gpt_fsdp2.py": (
        "--steps 20 --width 32 --depth 1 --context 16 --checkpoint run",
        "tqdm",
        r"validation: [0-6]\.\d+ bits per character on 1 processes",
    ),
    "rank_digits.py": ("--epochs 1 --seeds 1", "sklearn tqdm", r"cnn 16"),
    "skorch_digits.py": ("--epochs 3 --folds 2", "skorch sklearn", r"in 2 folds: (9\d|[78]\d)"),
}


def run(script, arguments, monkeypatch):
    # As Python does for a script: its folder is where it finds its neighbours.
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS)
def test_example_trains(script, tmp_path, monkeypatch, capsys):
    setting, packages, expected = SCRIPTS[script]
    for package in packages.split():
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run(script, setting.split(), monkeypatch)
    assert re.search(expected, capsys.readouterr().out)


@pytest.mark.parametrize("script", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_help_only_helps(script, tmp_path, monkeypatch, capsys):
    for package in SCRIPTS[script][1].split():
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(script, ["--help"], monkeypatch)
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("over", [0, 2])
def test_clones_over_ranks_that_are_not_there(over, tmp_path, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"--clones-over: got {over}, expected a divisor"):
        run("train_gpt_fsdp2.py", ["--clones-over", str(over)], monkeypatch)


def test_every_example_is_tried():
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(SCRIPTS)


def test_accelerates_configuration(monkeypatch):
    """As `accelerate launch --config_file` reads it, and hands it to the processes that it starts."""
    pytest.importorskip("accelerate")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = str(EXAMPLES / "accelerate_fsdp2.yaml")
    parsed = launch_command_parser().parse_args(["--config_file", config, "script.py"])
    args, _, _ = _validate_launch_command(parsed)
    assert args.use_fsdp and args.num_processes == 2
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "size_based_auto_wrap_policy"
    assert plugin.min_num_params == 10000
