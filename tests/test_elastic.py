"""Protects a training whose process dies: examples/train_gpt_fsdp2.py under torchrun, two processes over gloo.

The second is killed within its second checkpoint. The first ends with an error that tells of it, instead of waiting;
torchrun starts both again, and they go on from the first checkpoint, the last that is whole. What they end with is, bit
for bit, what a run ends with that nothing has interrupted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

EXAMPLES = Path(__file__).parent.parent / "examples"
RUN = "--steps 6 --save-every 2 --batch 2 --context 8 --width 16 --depth 1 --clones 3 --device cpu"

# What each process runs. In the second life also the run without an interruption, by the same process group.
SCRIPT = f"""
import os, signal, sys
from pathlib import Path
import torch.distributed as dist

sys.path.insert(0, {str(EXAMPLES)!r})
import train_gpt_fsdp2 as example

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which has seen the other die
rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
start, save, load, end = example.start, example.dcp.save, example.load, dist.destroy_process_group
saved = []

def save_or_die(*args, **kwargs):
    saved.append(args)
    if life == 0 and rank == 1 and len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*args, **kwargs)

def note(folder, net, opt, step):
    Path(f"loaded {{rank}}").write_text(str(step))
    load(folder, net, opt, step)

example.start = lambda device: dist.is_initialized() or start(device)
example.dcp.save, example.load, dist.destroy_process_group = save_or_die, note, lambda: None
runs = ["interrupted"] if life == 0 else ["interrupted", "whole"]
try:
    for run in runs:
        sys.argv = ["example", *{RUN.split()!r}, "--checkpoint", run]
        example.main()
except BaseException as error:
    Path(f"error {{rank}}").write_text(repr(error))
    raise
end()
"""


def final(folder, tmp_path):
    assert [path.name for path in folder.iterdir()] == ["step-6"]
    dcp_to_torch_save(folder / "step-6", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    tensors, todo = {}, [("", state)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{name}/{key}", entry) for key, entry in value.items()]
        elif isinstance(value, list | tuple):
            todo += [(f"{name}/{key}", entry) for key, entry in enumerate(value)]
        else:
            tensors[name] = value if torch.is_tensor(value) else str(value)
    return tensors


def test_a_run_goes_on_after_the_death_of_a_process(tmp_path):
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    (tmp_path / "run.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "1"]
    done = subprocess.run(
        [*torchrun, *options, "run.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    error = (tmp_path / "error 0").read_text()
    assert "peer" in error or "reset" in error, error
    assert not (tmp_path / "error 1").exists()
    assert [(tmp_path / f"loaded {rank}").read_text() for rank in range(2)] == ["2", "2"]
    interrupted, whole = (final(tmp_path / name, tmp_path) for name in ("interrupted", "whole"))
    assert interrupted.keys() == whole.keys() and len(whole) > 20
    for name, value in whole.items():
        same = torch.equal if torch.is_tensor(value) else str.__eq__
        assert same(interrupted[name], value), name
