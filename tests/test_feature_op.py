"""Protects that an optimizer is its table, its reference and a class of its own:

- one that is added in Python trains, checks its arguments, saves and loads, and compiles its schema from the table;
- the backends that have no kernels for it say so, by name and in the doctor;
- an extension whose tables are others is refused, with the cause and the cure.
"""

import subprocess
import sys

import pytest

from alrao_fast import _extension

# In a process of its own: an op cannot be taken out of the dispatcher again.
ADDED = """
import torch
from torch import nn
import alrao_fast as alrao
from alrao_fast import backends, doctor
from alrao_fast.arguments import RULE, Flag, Number
from alrao_fast.ops.feature import FeatureOp, Lists, Scalars
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.param_groups import SHARED
from alrao_fast.reference.feature_sgd import entry_rates, memory_order, scaled_gradient, store


@torch.no_grad()
def sign_(params, grads, totals, masters, averages, rates, inners, seeds, steps, *, lr, lr_tensor, maximize,
          warmup_steps, averaging, keep, strict, grad_scale, found_inf):
    for t, param in enumerate(params):
        rate = lr * entry_rates(rates[t], inners[t], param.numel(), torch.float32)
        total = memory_order(totals[t])
        g = scaled_gradient(grads[t], param, torch.float32, maximize, grad_scale)
        total.copy_(keep * total + g)
        store(param, None, memory_order(param) - rate * total.sign(), None, int(steps[t]))
    steps.add_(1)


OP = FeatureOp("feature_sign", ("total",), {"keep": Number(low=0, below=1), "strict": Flag()}, 1, sign_)


class AlraoSign(AlraoOptimizer):
    _op, _rule_option = OP, "rule"
    _kinds = {**SHARED, "keep": OP.options["keep"], "rule": RULE}

    def __init__(self, params, lr_range=(1e-4, 1e-2), lr=1.0, keep=0.5, weight_decay=0.0, maximize=False,
                 sampler=None, generator=None, rule="torch", rounding=None, master_weights=False, model=None,
                 foreach=None, fused=None, differentiable=False):
        super().__init__(locals())

    def _options(self, group):
        return {"keep": group["keep"], "strict": False}


schema = str(torch.ops.alrao_fast.feature_sign_.default._schema)
assert "Tensor(b!)[] totals" in schema and "float keep, bool strict, Tensor? grad_scale" in schema, schema
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
opt = AlraoSign(net, generator=torch.Generator().manual_seed(0))
x = torch.randn(64, 8)
y = x[:, :1] * x[:, 1:2]
losses = []
for _ in range(200):
    opt.zero_grad()
    loss = (net(x) - y).square().mean()
    loss.backward()
    opt.step()
    losses.append(float(loss.detach()))
assert losses[-1] < 0.5 * losses[0], losses[::20]
saved = opt.state_dict()
again = AlraoSign(net)
again.load_state_dict(saved)
[first, *_] = net.parameters()
assert torch.equal(again.state[first]["total"], opt.state[first]["total"])

p = torch.ones(3)
lists = Lists([p], [[torch.zeros(2)]], [], [torch.ones(3)], [1], [], torch.zeros(1, dtype=torch.int64))
try:
    OP(lists, [torch.ones(3)], {"keep": 0.5, "strict": False}, Scalars(), "reference")
except RuntimeError as error:
    assert "feature_sign_: totals[0] has shape [2]" in str(error), error
else:
    raise AssertionError("a state of another shape was taken")
for backend in ("cpu", "cuda"):
    assert not backends.status("feature_sign", backend).available
rows = {row["backend"]: row["state"] for row in doctor.report()["ops"] if row["op"] == "feature_sign"}
assert rows["reference"] == "passed" and rows["cpu"] == "unavailable", rows
print("added")
"""
OTHER_TABLES = """
from alrao_fast import backends
from alrao_fast.ops import feature_sgd

assert backends.status("feature_sgd", "cpu").available
swapped = dict(reversed(feature_sgd.OP.options.items()))
object.__setattr__(feature_sgd.OP, "options", swapped)
feature_sgd.OP._compare_with_extension()
status = backends.status("feature_sgd", "cpu")
assert not status.available and "feature_sgd_" in status.reason and "reinstall" in status.reason, status
print("refused")
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_an_optimizer_added_in_python():
    done = run(ADDED)
    assert done.stdout.strip() == "added", done.stdout + done.stderr


@pytest.mark.skipif(_extension.ERROR is not None, reason=str(_extension.ERROR))
def test_other_tables_are_refused():
    done = run(OTHER_TABLES)
    assert done.stdout.strip() == "refused", done.stdout + done.stderr
