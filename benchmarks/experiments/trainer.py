"""The training that all experiments stand on: the step, eager or captured, and a network on a task by epochs."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import alrao_fast as alrao
from benchmarks.experiments.methods import Method, normalises, package_class
from benchmarks.experiments.tasks import Score, Task

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step:
    """`step(x, y)` trains on one batch and returns its loss, detached, without waiting for the device.

    Args:
        net: called as `net(x, targets=y)`, or, `recurrent`, `net(x, state, targets=y)` for (loss, state).
        clip: bound of the norm of all gradients together, or None.
        amp: "bf16" or "fp16" (with loss scaling) for autocast, or None.
    """

    def __init__(
        self,
        net: nn.Module,
        opt: torch.optim.Optimizer,
        *,
        recurrent: bool = False,
        clip: float | None = None,
        amp: str | None = None,
    ) -> None:
        self.net = net
        self.opt = opt
        self.recurrent = recurrent
        self.clip = clip
        self.amp = amp
        self.params = [param for group in opt.param_groups for param in group["params"]]
        self.device = self.params[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.state: tuple[Tensor, ...] | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the network runs."""
        dtype = AMP[self.amp] if self.amp else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def reset_state(self) -> None:
        """Start the next batch without a recurrent state."""
        self.state = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.opt.zero_grad()
        with self.autocast():
            if self.recurrent:
                loss, state = self.net(x, self.state, targets=y)
                self.state = tuple(part.detach() for part in state)
            else:
                loss = self.net(x, targets=y)
        self.scaler.scale(loss).backward()
        self._clip()
        self.scaler.step(self.opt)
        self.scaler.update()
        return loss.detach()

    def _clip(self) -> None:
        if self.clip is not None:
            self.scaler.unscale_(self.opt)
            nn.utils.clip_grad_norm_(self.params, self.clip)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the network and the optimizer: the loss scale."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state)


class CapturedStep(Step):
    """The same step as one CUDA graph, by `alrao.GraphedStep`: for Alrao's optimizers, all batches of one shape.

    Load checkpoints before the first call, which captures.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.graphed: alrao.GraphedStep | None = None

    def reset_state(self) -> None:
        # A state of zeros is what a recurrent network starts from.
        if self.state is not None:
            self.state = tuple(torch.zeros_like(part) for part in self.state)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if self.recurrent and self.state is None:
            with torch.no_grad(), self.autocast():
                _, state = self.net(x)
            self.state = state
            self.reset_state()
        inputs = (x, self.state) if self.recurrent else (x,)
        if self.graphed is None:
            self.graphed = alrao.GraphedStep(
                _Cast(self.net, self.autocast).train(),
                self.opt,  # type: ignore[arg-type]
                inputs,
                y,
                scaler=self.scaler if self.scaler.is_enabled() else None,
                before_step=self._clip,
            )
        out = self.graphed(inputs, y)
        if not self.recurrent:
            return out.clone()
        loss, self.state = out
        return loss.clone()


class _Cast(nn.Module):
    """A network whose forward, and nothing else, runs in a context."""

    def __init__(self, net: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.net = net
        self.context = context

    def forward(self, *args: Any, **options: Any) -> Any:
        with self.context():
            return self.net(*args, **options)


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
