"""Protects a short import, and a training without the compiler: torch._dynamo takes longer to import than torch.

- `import alrao_fast` takes little of the time that torch takes, and imports neither the compiler nor triton; nor does a
  training: construction, steps, checkpoints, the switch's hints, collapse.
- What graphs are left for is still left for, as torch.compiler.disable does it: whether the compiler comes before or
  after, without compiling anything else anew, and fullgraph refuses it with the reason.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from alrao_fast import compiler

HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "triton",
    "sympy",
    "onnx",
    "transformers",
    "matplotlib",
    "lightning",
)
TRAINING = """
import sys
import torch
from torch import nn
import alrao_fast as alrao

x, y = torch.randn(5, 8), torch.randint(4, (5,))
for Optimizer in (alrao.AlraoSGD, alrao.AlraoAdam, alrao.AlraoMuon):
    net = alrao.AlraoModel(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), alrao.ClassifierClones(6, 4, 3))
    opt = Optimizer(net)
    opt.add_param_group({"params": nn.Linear(2, 2)})
    for _ in range(2):
        opt.zero_grad(set_to_none=False)
        alrao.MixtureLoss(net)(net(x), y).backward()
        opt.step()
        opt.zero_grad()
    opt.load_state_dict(opt.state_dict())
    net.load_state_dict(net.state_dict())
    net.eval()(x), net.suggested_lr(), net.collapse("best")
    alrao.describe_rates(net, file=sys.stderr)
"""

# Only torch's own wrapper is left out.
OTHERS = """
import functools
from alrao_fast import compiler

class Mine(torch.optim.SGD):
    @functools.wraps(torch.optim.SGD.state_dict)
    def state_dict(self):
        return "mine"

mine = Mine.__new__(Mine)
assert compiler.without_import(mine.state_dict)() == "mine"
assert compiler.without_import(mine.zero_grad).__func__ is torch.optim.SGD.zero_grad.__wrapped__
"""


def run(code, *flags):
    # As a user's process, whatever the tests' one was told.
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ALRAO_BACKEND")}
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done


def seconds(module, importtime):
    """What `-X importtime` says of an import with all that it brings."""
    (found,) = re.findall(rf"\| +(\d+) \| {re.escape(module)}$", importtime, re.MULTILINE)
    return int(found) / 1e6


@pytest.mark.long(3)
def test_import_is_short():
    """0.08 of torch's time when written, 1.3 with the compiler; the best of some, for others use the machine too.

    Without the garbage collection, whose look at all of torch's objects falls into the one import or the other.
    """
    shares = []
    for _ in range(3):
        importtime = run(
            "import gc; gc.disable(); import torch, alrao_fast", "-X", "importtime"
        ).stderr
        shares.append(seconds("alrao_fast", importtime) / seconds("torch", importtime))
        if shares[-1] < 0.15:
            break
    assert min(shares) < 0.2


def test_nothing_heavy_is_imported():
    """Neither by the import nor by a training; what torch brings by itself is torch's."""
    code = """
import sys
heavy = {0!r}
import torch
expected = [name for name in heavy if name in sys.modules]
import alrao_fast
assert [name for name in heavy if name in sys.modules] == expected
{1}
assert [name for name in heavy if name in sys.modules] == expected
"""
    run(code.format(HEAVY, TRAINING + OTHERS))


def test_the_compiler_may_come_after():
    run(
        TRAINING
        + """
assert "torch._dynamo" not in sys.modules
net.train()
criterion = alrao.MixtureLoss(net)
net.backbone = torch.compile(net.backbone, backend="eager")
step = torch.compile(opt.step, backend="eager")
for _ in range(2):
    criterion(net(x), y).backward()
    step()
try:
    torch.compile(lambda out: criterion(out, y), backend="eager", fullgraph=True)(net(x))
except torch._dynamo.exc.Unsupported as error:
    assert "what a prediction is made of is known to Python alone" in str(error), error
else:
    raise AssertionError("fullgraph took a break")
"""
    )


class Ours:
    def __init__(self, addend):
        self.addend = addend

    @compiler.disable("by hand")
    def outside(self, x, factor):
        """Leaves the graph."""
        return self.inside(x) * factor

    def inside(self, x):
        # Whatever is called from there is outside, too.
        assert not torch.compiler.is_compiling()
        return x + self.addend


class Torchs(Ours):
    outside = torch.compiler.disable(Ours.outside.__wrapped__, reason="by hand")


def compiled_calls(cls, **options):
    """The results, and the numbers of compilations and of graphs, of calls with many objects and shapes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(backend="eager", **options)
    def function(made, x, factor):
        return made.outside(x * 2, factor) + 1

    results = [function(cls(n), torch.ones(n), n) for n in range(2, 16)]
    counters = torch._dynamo.utils.counters
    return results, counters["frames"]["ok"], counters["stats"]["unique_graphs"]


def test_disabled_as_by_torch():
    compiled_calls(Ours)
    torch._dynamo.utils.counters.clear()
    results, frames, graphs = compiled_calls(Ours)
    expected, frames_of_torch, graphs_of_torch = compiled_calls(Torchs)
    assert results[0].tolist() == [(2 + 2) * 2 + 1] * 2
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0)
    # One more for the question whether there is a compiler.
    assert frames_of_torch <= frames <= frames_of_torch + 1 and graphs == graphs_of_torch > 0
    for cls in (Ours, Torchs):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"reason: by hand"):
            compiled_calls(cls, fullgraph=True)
    torch._dynamo.reset()


def test_disabled_is_the_function():
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    assert compiler.is_loaded() and compiler.without_import(opt.state_dict) == opt.state_dict
    assert Ours.outside.__name__ == "outside" and Ours.outside.__doc__ == "Leaves the graph."
    assert Ours(1).outside(torch.zeros(1), factor=3).item() == 3
