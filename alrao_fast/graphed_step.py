"""GraphedStep: a whole training step, optimizer and switch included, as one CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from alrao_fast.arguments import Function, Instance, Integer, Optional, checked
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.binding import Objects

# Options of a param group that a captured step does not bake in, or that mean nothing to it.
_FREE_OPTIONS = ("params", "lr", "initial_lr", "param_names")

_KINDS = {
    "net": Instance(nn.Module, "a torch.nn.Module"),
    "opt": Instance(AlraoOptimizer, "an AlraoSGD, AlraoAdam or AlraoMuon"),
    "example_targets": Instance(Tensor, "a tensor"),
    "scaler": Optional(Instance(torch.amp.GradScaler, "a torch.amp.GradScaler")),
    "warmup": Integer(low=1, words="at least 1 step before the capture"),
    "before_step": Optional(Function("a function without arguments")),
}


class GraphedStep:
    """Captures forward, backward, switch update and optimizer step; calling it replays them on new data.

        step = alrao.GraphedStep(net, opt, x, y)
        for x, y in loader:
            loss = step(x, y)
            scheduler.step()

    One call costs the host a copy of the batch and one launch, whatever the number of layers. The numbers are those
    of the ordinary loop.

    Args:
        net: an `AlraoModel` (or any module whose forward takes `targets=` and returns a loss, or (loss, *extras)), in
            training mode, on one CUDA device.
        opt: its `AlraoSGD`, `AlraoAdam` or `AlraoMuon`.
        example_inputs: a batch of the shape and dtype that all will have: a tensor, or a tuple of the forward's
            positional arguments, which may hold tuples of tensors.
        example_targets: the targets that go with it.
        scaler: a `torch.amp.GradScaler`; scaling, the search for infinities and the scale's update are captured too. As
            with `fused=True` the kernels take the scale, whatever the optimizer's `fused` is.
        warmup: steps taken before the capture, so that kernels and workspaces are there; at least 1.
        before_step: called between backward and optimizer step; it must not wait for the device. Gradient clipping is
            `lambda: alrao.clip_grad_norm_(net, 0.25)`, under a scaler after `scaler.unscale_(opt)`.

    Construction leaves parameters, buffers (the switch among them), optimizer state, scaler and random generators as
    they were; gradients that were there are dropped. Afterwards every call takes one step and returns what the forward
    returned, detached, in memory that the next call overwrites: clone what must last. `param.grad` holds the
    gradients of the last call.

    Each group's `lr` becomes a float64 tensor on the device, which schedulers move in place and the graph reads; a
    number assigned to `group["lr"]` is taken over at the next call. Everything else that Python decides (other options
    of the groups, hooks, branches in the forward, autocast) is as it was at the capture: a changed option, an optimizer
    state that was loaded or exchanged, or a parameter that was exchanged or has moved raises, and asks for a new
    GraphedStep. Ordinary steps in between are allowed.

    Raises TypeError for an argument of another type; ValueError for a model that is not on one CUDA device or not in
    training mode, for data that do not have the example's structure, shapes and dtypes; RuntimeError where the capture
    fails.
    """

    def __init__(
        self,
        net: nn.Module,
        opt: AlraoOptimizer,
        example_inputs: Any,
        example_targets: Tensor,
        *,
        scaler: torch.amp.GradScaler | None = None,
        warmup: int = 3,
        before_step: Callable[[], object] | None = None,
    ) -> None:
        warmup = checked(_KINDS, locals())["warmup"]
        if not net.training:
            raise ValueError("net is in eval mode; expected training mode: call net.train() first")
        self._net, self._opt, self._scaler = net, opt, scaler
        self._before_step = before_step
        own = [p for group in opt.param_groups for p in group["params"]]
        self._params = list(dict.fromkeys([*net.parameters(), *own]))
        device = _device_of([*self._params, *net.buffers()])
        self._batch = _StaticBatch(example_inputs, example_targets, device)

        before = [group["lr"] for group in opt.param_groups]
        self._lrs = [_as_device_scalar(lr, device) for lr in before]
        for group, lr in zip(opt.param_groups, self._lrs):
            group["lr"] = lr
        # The graph's steps are counted where it is replayed.
        run, opt._run = opt._run, None
        try:
            self._replay, self._outputs = _capture(self._step, self._warm_up, warmup, device)
        except BaseException:
            opt.zero_grad()
            for group, lr in zip(opt.param_groups, before):
                group["lr"] = lr
            raise
        finally:
            opt._run = run
        # The graph writes into this memory: it must not go to anyone else.
        self._grads = [p.grad for p in self._params]
        self._state = opt.state
        self._options = [
            {name: value for name, value in group.items() if name not in _FREE_OPTIONS}
            for group in opt.param_groups
        ]
        self._pointers = [p.data_ptr() for p in self._params]
        self._lists = [group["params"] for group in opt.param_groups]
        self._objects = Objects(*self._lists, opt.state, *opt.state.values())

    def __call__(self, inputs: Any, targets: Tensor) -> Any:
        """One training step on a batch like the example, from any device; returns the loss, or (loss, *extras)."""
        self._check_unchanged()
        self._batch.fill(inputs, targets)
        self._follow()
        # What torch's schedulers ask, to warn of a schedule without steps.
        self._opt.__dict__["_opt_called"] = True
        self._replay()
        if self._opt._run:
            self._opt._run.count(self._opt)
        return self._outputs

    def _step(self) -> Any:
        self._opt.zero_grad()
        out = self._net(*self._batch.inputs, targets=self._batch.targets)
        loss = out[0] if isinstance(out, tuple) else out
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        if self._before_step is not None:
            self._before_step()
        if self._scaler is None:
            self._opt.step()
        else:
            with _scaling_in_kernels(self._opt):
                self._scaler.step(self._opt)
            self._scaler.update()
        return tree_map_only(Tensor, Tensor.detach, out)

    def _warm_up(self, steps: int) -> None:
        """Take `steps` steps and undo them; the optimizer has its states afterwards, untouched."""
        opt, scaler = self._opt, self._scaler
        device = self._params[0].device
        if scaler is not None:
            # Makes its tensors, if no scaled loss has done so.
            scaler.scale(torch.zeros((), device=device))
        saved = _Snapshot([*self._params, *self._net.buffers()], scaler, device)
        try:
            # A step that is skipped everywhere creates the states as they are at the start.
            opt.zero_grad()
            out = self._net(*self._batch.inputs, targets=self._batch.targets)
            (out[0] if isinstance(out, tuple) else out).backward()
            opt.__dict__["found_inf"] = torch.ones((), device=device)
            try:
                opt.step()
            finally:
                del opt.__dict__["found_inf"]
            states = [value for own in opt.state.values() for value in own.values()]
            saved.add([value for value in states if isinstance(value, Tensor)])
            for _ in range(steps):
                self._step()
        finally:
            saved.restore()
            opt.zero_grad()

    def _check_unchanged(self) -> None:
        again = "make a new GraphedStep"
        if self._opt._shows_averages:
            raise RuntimeError("a step within averaged(): the parameters are their averages there")
        if self._opt.state is not self._state:
            raise RuntimeError(
                f"the optimizer's state was replaced since the capture (load_state_dict): {again}"
            )
        groups = self._opt.param_groups
        if len(groups) != len(self._options):
            raise RuntimeError(
                f"the optimizer has {len(groups)} param groups, the captured step {len(self._options)}: {again}"
            )
        for number, (group, options) in enumerate(zip(groups, self._options)):
            for name, value in options.items():
                if group[name] != value:
                    raise RuntimeError(
                        f"{name} of param group {number} is {group[name]}, the captured step has {value}: only lr may "
                        f"change under a graph; {again}"
                    )
        same_lists = all(map(is_, self._lists, [group["params"] for group in groups]))
        if not same_lists or not self._objects.are_same():
            raise RuntimeError(
                f"a parameter or a state of the optimizer was exchanged since the capture: {again}"
            )
        if self._pointers != [p.data_ptr() for p in self._params]:
            raise RuntimeError(
                f"a parameter has other memory than at the capture (net.to, param.data = ...): {again}"
            )

    def _follow(self) -> None:
        """Take over what was assigned to `group["lr"]`."""
        for group, lr in zip(self._opt.param_groups, self._lrs):
            if group["lr"] is not lr:
                lr.fill_(group["lr"])
                group["lr"] = lr


@contextmanager
def _scaling_in_kernels(opt: AlraoOptimizer) -> Iterator[None]:
    """A GradScaler leaves loss scaling to the optimizer, as with fused=True: otherwise it waits for the device."""
    before = vars(opt).get("_step_supports_amp_scaling")
    opt._step_supports_amp_scaling = True
    try:
        yield
    finally:
        if before is None:
            del opt._step_supports_amp_scaling


class _StaticBatch:
    """Inputs and targets in memory that stays; `fill` copies a batch of the same structure, shapes and dtypes in."""

    def __init__(self, inputs: Any, targets: Tensor, device: torch.device) -> None:
        self.inputs = tree_map_only(
            Tensor, lambda t: t.detach().to(device, copy=True), _as_tuple(inputs)
        )
        self.targets = targets.detach().to(device, copy=True)

    def fill(self, inputs: Any, targets: Tensor) -> None:
        own, structure = tree_flatten(self.inputs)
        given, other = tree_flatten(_as_tuple(inputs))
        if other != structure:
            raise ValueError(
                f"inputs: got {other}, expected the structure of example_inputs, {structure}"
            )
        pairs = [*zip(own, given), (self.targets, targets)]
        for number, (static, new) in enumerate(pairs):
            if isinstance(static, Tensor):
                _check_like(_place(number, len(own)), new, static)
            elif new is not static and new != static:
                raise ValueError(
                    f"{_place(number, len(own))}: got {new!r}, but the step was captured with {static!r}"
                )
        for static, new in pairs:
            if isinstance(static, Tensor) and static is not new:
                static.copy_(new, non_blocking=True)


class _Snapshot:
    """Tensors, a GradScaler and the random generators as they are now, to be written back in place."""

    def __init__(
        self,
        tensors: list[Tensor],
        scaler: torch.amp.GradScaler | None,
        device: torch.device,
    ) -> None:
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        self.add(tensors)
        self._scaler = scaler
        self._scaler_state = scaler.state_dict() if scaler else {}
        self._device = device
        self._cpu_random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def add(self, tensors: list[Tensor]) -> None:
        """Save those that are not saved yet."""
        for tensor in tensors:
            if id(tensor) not in self._saved:
                self._saved[id(tensor)] = (tensor, tensor.detach().clone())

    def restore(self) -> None:
        for tensor, value in self._saved.values():
            # Past the version counter: for whoever watches it, nothing has been written.
            tensor.data.copy_(value)
        if self._scaler is not None and self._scaler_state:
            self._scaler.load_state_dict(self._scaler_state)
        torch.set_rng_state(self._cpu_random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random, self._device)


def _capture(
    step: Callable[[], Any],
    warm_up: Callable[[int], None],
    steps: int,
    device: torch.device,
) -> tuple[Callable[[], None], Any]:
    """Capture `step` after a warm-up on the same side stream; returns the replay and the static outputs."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            torch.clear_autocast_cache()
            warm_up(steps)
            torch.clear_autocast_cache()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Relaxed: the optimizer pins the new gradients' addresses, and pinning allocates.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="relaxed"):
                outputs = step()
        except RuntimeError as error:
            raise RuntimeError(
                "the training step cannot be captured; something in it waits for the device (.item(), bool(tensor), "
                f"printing a tensor) or depends on its values: {error}"
            ) from error
        finally:
            torch.clear_autocast_cache()
    return graph.replay, outputs


def _device_of(tensors: list[Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    names = ", ".join(sorted(str(device) for device in devices))
    if len(devices) != 1:
        raise ValueError(f"net is on {names}; expected all parameters and buffers on one device")
    device = devices.pop()
    if device.type != "cuda":
        raise ValueError(
            f"net is on {device}; expected a CUDA device: CUDA graphs exist there only, use the ordinary loop"
        )
    return device


def _as_device_scalar(lr: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(lr, Tensor) and lr.device == device:
        return lr
    # float64 holds what a Python float does: the step rounds it as it would have rounded the float.
    return torch.tensor(float(lr), dtype=torch.float64, device=device)


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _place(number: int, count: int) -> str:
    """What the argument at this place is called: an input, or after them the targets."""
    if number == count:
        return "targets"
    return "inputs" if count == 1 else f"inputs[{number}]"


def _check_like(name: str, new: Any, static: Tensor) -> None:
    if not isinstance(new, Tensor):
        raise TypeError(f"{name}: got a {type(new).__name__}, expected a tensor")
    if new.shape != static.shape or new.dtype != static.dtype:
        raise ValueError(
            f"{name}: got shape {list(new.shape)} and {new.dtype}, but the step was captured with "
            f"{list(static.shape)} and {static.dtype}: use drop_last=True in the loader, or one GraphedStep per shape"
        )
