"""The training step of every case: mixed precision, clipping, a recurrent state carried over; eager or captured."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import alrao_fast as alrao

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
