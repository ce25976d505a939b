"""The training that all experiments stand on: a network on a task, an epoch at a time, and what is evaluated of it."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import alrao_fast as alrao
from benchmarks.experiments.methods import Method, normalises, package_class
from benchmarks.experiments.steps import CapturedStep, Step
from benchmarks.experiments.tasks import Score, Task

# Batches that a network's running statistics of BatchNorm are measured on anew, as Schedule-Free's authors say.
RECALIBRATION = 50


class Trainer:
    """Trains `net` by `opt` on a task's batches.

    What is evaluated is the network itself, unless the method keeps another point for that: Schedule-Free's optimizer
    moves the parameters to its average and back; DoG has a second network.

    Args:
        epochs: of the whole run, over which the rate of a method with a schedule is annealed.
        amp: "bf16" or "fp16" for mixed precision.
        cuda_graph: run the steps of Alrao's optimizers as one CUDA graph.
    """

    def __init__(
        self,
        method: Method,
        net: nn.Module,
        opt: torch.optim.Optimizer,
        task: Task,
        *,
        epochs: int = 1,
        amp: str | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.net = net
        self.opt: Any = opt
        self.task = task
        # The baselines of torch.optim take ordinary steps: the same numbers, only slower.
        make = CapturedStep if cuda_graph and isinstance(net, alrao.AlraoModel) else Step
        self.step = make(net, opt, recurrent=task.recurrent, clip=task.clip, amp=amp)
        self.schedule_free = method.package == "schedulefree"
        self.averager = None
        if method.package == "dog-optimizer":
            self.averager = package_class("dog", "PolynomialDecayAverager")(net)
        self.schedule = None
        if method.schedule:
            total = epochs * task.steps()
            self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=total)

    def epoch(
        self, seed: int, number: int, after_step: Callable[[int], object] | None = None
    ) -> float:
        """Train for one epoch; returns its mean loss, taken while the network changes.

        `after_step(k)` follows the k-th step, from 1 on.
        """
        self.resume()
        self.step.reset_state()
        total = torch.zeros((), dtype=torch.float64, device=self.step.device)
        batches = self.task.batches(seed, number)
        # Shown only where an epoch takes a while.
        bar = tqdm(batches, total=self.task.steps(), leave=False, delay=10, unit="step")
        for count, (x, y) in enumerate(bar, 1):
            total += self.train_step(x, y)
            if after_step is not None:
                after_step(count)
        return float(total) / self.task.steps()

    def train_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step, and what the method does after each of them."""
        loss = self.step(x, y)
        if self.averager is not None:
            self.averager.step()
        if self.schedule is not None:
            self.schedule.step()
        return loss

    def resume(self) -> None:
        """Go on with training after an evaluation."""
        if self.schedule_free:
            self.opt.train()
        self.net.train()

    @torch.no_grad()
    def evaluated(self, seed: int, number: int) -> nn.Module:
        """The network to evaluate after epoch `number`, in eval mode."""
        net = self.net if self.averager is None else self.averager.averaged_model
        if self.schedule_free:
            self.opt.eval()
            if normalises(net):
                for x, _ in itertools.islice(self.task.batches(seed, number), RECALIBRATION):
                    net(x)
        return net.eval()

    @torch.no_grad()
    def evaluate(self, net: nn.Module, part: str) -> Score:
        """Mean loss in nats and accuracy in percent of a network on a part of the task's data."""
        with self.step.autocast():
            return self.task.evaluate(net, part)
