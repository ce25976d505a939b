"""The training that all experiments stand on: the step, eager or captured, and a network on a task by epochs."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import alrao_fast as alrao
from benchmarks.experiments.methods import Method
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
        opt: Any,
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
                self.opt,
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


class Average:
    """The average of parameters over the steps, later ones counting more: polynomial decay with gamma = 8.

    (Shamir and Zhang 2013; as DoG's authors average.) The first call of `step` starts it at the parameters.
    """

    GAMMA = 8.0

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = [param.data for param in params]
        self.values = [torch.zeros_like(param) for param in self.params]
        self.count = 0

    def step(self) -> None:
        self.count += 1
        share = (1 + self.GAMMA) / (self.count + self.GAMMA)
        torch._foreach_lerp_(self.values, self.params, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are the average; afterwards what they were, to the bit."""
        kept = [param.clone() for param in self.params]
        torch._foreach_copy_(self.params, self.values)
        try:
            yield
        finally:
            torch._foreach_copy_(self.params, kept)


def rate_factor(step: int, total: int, warmup: float, cosine: bool) -> float:
    """What the rates of step `step` of `total`, from 0 on, are multiplied by."""
    grown = min(1.0, (step + 1) / (warmup * total)) if warmup * total > 1 else 1.0
    return grown * (0.5 * (1 + math.cos(math.pi * step / total)) if cosine else 1.0)


# Batches that a network's running statistics of BatchNorm are measured on anew, as Schedule-Free's authors say.
RECALIBRATION = 50


class Trainer:
    """Trains `net` by `opt` on a task's batches, and does what the method asks for beside the optimizer's steps.

    Args:
        epochs: of the whole run, which warm-up and annealing are parts of.
        amp: "bf16" or "fp16" for mixed precision.
        cuda_graph: run the steps of Alrao's optimizers as one CUDA graph.
    """

    def __init__(
        self,
        method: Method,
        net: nn.Module,
        opt: Any,
        task: Task,
        *,
        epochs: int = 1,
        amp: str | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.method = method
        self.net = net
        self.opt = opt
        self.task = task
        # The baselines of torch.optim take ordinary steps: the same numbers, only slower.
        make = CapturedStep if cuda_graph and isinstance(net, alrao.AlraoModel) else Step
        self.step = make(net, opt, recurrent=task.recurrent, clip=task.clip, amp=amp)
        self.average = Average(net.parameters()) if method.averaged else None
        self.total = epochs * task.steps()
        self.done = 0
        self.rates = [group["lr"] for group in opt.param_groups]

    def epoch(
        self, seed: int, number: int, after_step: Callable[[int], object] | None = None
    ) -> float:
        """Train for one epoch; returns its mean loss, taken while the network changes.

        `after_step(k)` follows the k-th step, from 1 on.
        """
        self.net.train()
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
        """One step, and what the method does around each of them."""
        method = self.method
        if method.warmup or method.schedule:
            factor = rate_factor(self.done, self.total, method.warmup, method.schedule)
            for group, rate in zip(self.opt.param_groups, self.rates):
                group["lr"] = rate * factor
        loss = self.step(x, y)
        self.done += 1
        if self.average is not None:
            self.average.step()
        if method.after_step is not None:
            method.after_step(self)
        return loss

    @contextmanager
    def evaluation(self, seed: int, number: int) -> Iterator[nn.Module]:
        """The network in eval mode, its parameters those that the method evaluates after epoch `number`.

        Where these are not the ones that were trained, statistics of BatchNorm are measured anew.
        """
        with ExitStack() as stack:
            if self.method.evaluation is not None:
                stack.enter_context(self.method.evaluation(self.opt))
            if self.average is not None:
                stack.enter_context(self.average.applied())
            if self.method.evaluation is not None or self.average is not None:
                batches = itertools.islice(self.task.batches(seed, number), RECALIBRATION)
                with torch.no_grad():
                    update_bn((x for x, _ in batches), self.net.train())
            yield self.net.eval()

    @torch.no_grad()
    def evaluate(self, net: nn.Module, part: str) -> Score:
        """Mean loss in nats and accuracy in percent of a network on a part of the task's data."""
        with self.step.autocast():
            return self.task.evaluate(net, part)
