"""A training process that is killed at random moments and resumes from its last checkpoint.

    python tests/campaign/kills.py --case "Adam, masters" --kills 100 --folder DIR

prints whether weights, optimizer state, switch and random state ended bit for bit as those of a run that was let alone.
The trainees are forks of this process, which has imported everything and computed nothing: a life costs milliseconds.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import alrao_fast as alrao

EVERY = 3
CASES: dict[str, Any] = {
    "SGD, stochastic rounding": lambda net, g: alrao.AlraoSGD(
        net, (1e-4, 1.0), momentum=0.9, generator=g
    ),
    "SGD, masters": lambda net, g: alrao.AlraoSGD(
        net, (1e-4, 1.0), momentum=0.9, weight_decay=1e-3, master_weights=True, generator=g
    ),
    "Adam, stochastic rounding": lambda net, g: alrao.AlraoAdam(net, (1e-5, 1e-1), generator=g),
    "Adam, masters": lambda net, g: alrao.AlraoAdam(
        net, (1e-5, 1e-1), amsgrad=True, master_weights=True, generator=g
    ),
}


class Training:
    """bfloat16, dropout, batches in a random order, a schedule: all that a checkpoint has to hold."""

    def __init__(self, case: str) -> None:
        torch.manual_seed(1)
        backbone = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Dropout(0.3), nn.Tanh())
        self.net = alrao.AlraoModel(backbone, alrao.ClassifierClones(12, 4, 5)).bfloat16()
        self.opt = CASES[case](self.net, torch.Generator().manual_seed(2))
        self.schedule = torch.optim.lr_scheduler.StepLR(self.opt, 40, 0.9)
        self.order = torch.Generator().manual_seed(3)
        self.x = torch.randn(64, 8, generator=self.order).bfloat16()
        self.y = (self.x[:, 0] > 0).long() + 2 * (self.x[:, 1] * self.x[:, 2] > 0).long()
        self.step, self.permutation = 0, torch.empty(0, dtype=torch.int64)
        self.seen: list[int] = []

    def take_step(self) -> None:
        if not len(self.permutation):
            self.permutation = torch.randperm(64, generator=self.order)
        rows, self.permutation = self.permutation[:16], self.permutation[16:]
        self.opt.zero_grad()
        self.net(self.x[rows], targets=self.y[rows]).backward()
        self.opt.step()
        self.schedule.step()
        self.seen.append(int(rows[0]))
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "opt": self.opt.state_dict(),
            "schedule": self.schedule.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "permutation": self.permutation.clone(),
            "seen": self.seen,
            "step": self.step,
        }

    def save(self, path: Path) -> None:
        """Whole or not at all: the old file stays until the new one is complete."""
        unfinished = path.with_suffix(".unfinished")
        torch.save(self.state(), unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.net.load_state_dict(saved["net"])
        self.opt.load_state_dict(saved["opt"])
        self.schedule.load_state_dict(saved["schedule"])
        self.order.set_state(saved["order"])
        torch.set_rng_state(saved["random"])
        self.permutation, self.seen, self.step = (
            saved[key] for key in ("permutation", "seen", "step")
        )


def live(case: str, path: Path, limit: int, begun: Callable[[], Any] = lambda: None) -> Training:
    """Train from the last checkpoint, if there is one, up to step `limit`, saving every few steps."""
    training = Training(case)
    if path.exists():
        training.load(path)
    begun()
    while training.step < limit:
        training.take_step()
        if training.step % EVERY == 0:
            training.save(path)
    return training


def killed_life(case: str, path: Path, limit: int, rng: random.Random) -> None:
    """A life that ends by SIGKILL: some before they have begun to train, the others some time afterwards.

    At its limit it goes on saving until then.
    """
    seconds = rng.uniform(0, 0.04)
    hear, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            training = live(case, path, limit, lambda: os.write(say, b"x"))
            while True:
                training.save(path)
        finally:
            os._exit(1)
    os.close(say)
    if rng.random() < 0.8:
        os.read(hear, 1)
    time.sleep(seconds)
    os.close(hear)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError("the trainee ended before it was killed")


def differences(own: Any, right: Any, path: str = "") -> list[str]:
    """Where two states differ by a bit."""
    if isinstance(right, torch.Tensor):
        same = own.dtype == right.dtype and own.shape == right.shape
        raw = [t.contiguous().flatten().view(torch.uint8) for t in (own, right)] if same else []
        return [] if same and torch.equal(*raw) else [path]
    if isinstance(right, dict):
        if list(own) != list(right):
            return [f"{path}: keys {list(own)}, right are {list(right)}"]
        return [d for key in right for d in differences(own[key], right[key], f"{path}[{key!r}]")]
    if isinstance(right, list | tuple):
        if len(own) != len(right):
            return [f"{path}: {len(own)} entries, right are {len(right)}"]
        return [
            d for k, pair in enumerate(zip(own, right)) for d in differences(*pair, f"{path}[{k}]")
        ]
    return [] if own == right else [f"{path}: {own!r}, right is {right!r}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="kills.py", description=__doc__)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    path = arguments.folder / "checkpoint.pt"
    for kill in range(arguments.kills):
        limit = arguments.steps * (kill + 1) // (arguments.kills + 1)
        killed_life(arguments.case, path, limit, rng)
    while not path.exists():
        # All came before the first checkpoint, as on a slow machine: nothing would be resumed.
        killed_life(arguments.case, path, limit, rng)
    at_last = torch.load(path, weights_only=True)["step"]
    resumed = live(arguments.case, path, arguments.steps)
    alone = live(arguments.case, arguments.folder / "alone.pt", arguments.steps)
    found = differences(resumed.state(), alone.state())
    print(f"{arguments.kills} kills, step {at_last} after the last, then to {arguments.steps}")
    print("\n".join(found) or "every bit is the same")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
