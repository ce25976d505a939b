"""SGD and Adam with a tensor of learning rates per parameter: for the internal network.

Rates come in full size and are kept as a vector along one dimension where they are constant along all others. They
are part of the state, next to the momentum, so that `state_dict` can resume a run.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from alrao_fast.arguments import Kind
from alrao_fast.ops.feature import FeatureOp, Lists, Options, Scalars
from alrao_fast.optim import adam, sgd
from alrao_fast.optim.binding import (
    Binding,
    Call,
    GroupBinding,
    as_count,
    by_device_and_dtype,
    gradients,
)
from alrao_fast.optim.param_groups import OptionChecks
from alrao_fast.reference.feature_sgd import like_parameter


def compact_rates(rate: Any, param: Tensor, name: str = "lr_params") -> tuple[Tensor, int | None]:
    """`(vector, dim)`: the rates of `param` along one dimension; all of them, in its shape, with None.

    `rate` is a number, a tensor that broadcasts to the parameter, or a vector over its dimension 0. Raises ValueError
    for any other shape and for rates that are negative or not finite.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    rate = torch.as_tensor(rate, device=param.device).detach().to(dtype)
    given = list(rate.shape)
    if rate.dim() == 1 and param.dim() > 1 and rate.numel() == param.size(0):
        rate = rate.view(-1, *[1] * (param.dim() - 1))
    try:
        rate = rate.expand(param.shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: a tensor of shape {given} for a parameter of shape {list(param.shape)}; expected that shape, "
            "one rate for each index of dimension 0, or a single rate"
        ) from None
    if not bool((rate.isfinite() & (rate >= 0)).all()):
        raise ValueError(f"{name}: a rate is negative or not finite; expected finite rates >= 0")
    if not rate.numel():
        return rate.new_zeros(1), 0
    first = rate.flatten()[:1]
    if bool((rate == first).all()):
        return first.clone(), 0
    for dim in range(rate.dim()):
        along = tuple(slice(None) if d == dim else slice(0, 1) for d in range(rate.dim()))
        if bool((rate == rate[along]).all()):
            return rate[along].flatten().clone(), dim
    return rate.clone(memory_format=torch.contiguous_format), None


class SpecOptimizer(Optimizer):
    """Base class of `SGDSpec` and `AdamSpec`."""

    _op: FeatureOp
    _kinds: Mapping[str, Kind]

    def __init__(self, arguments: dict[str, Any]) -> None:
        """`arguments`: the `locals()` of a subclass's constructor, which has named and typed them."""
        defaults = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        params, lr_params = defaults.pop("params"), defaults.pop("lr_params")
        self._option_checks = OptionChecks(self._kinds, self._check_group)
        super().__init__(params, defaults | self._option_checks.checked(defaults))
        self._binding = Binding()
        own = [p for group in self.param_groups for p in group["params"]]
        rates = list(lr_params)
        if len(rates) != len(own):
            raise ValueError(
                f"lr_params has {len(rates)} entries; expected {len(own)}, one for each parameter"
            )
        # What a state that was cleared begins with again.
        self._rates = {p: compact_rates(rate, p) for p, rate in zip(own, rates)}
        for param in own:
            self._begin(param)

    def _begin(self, param: Tensor) -> None:
        """Clearing the state forgets momentum, not the rates."""
        state, (rate, dim) = self.state[param], self._rates[param]
        if "rate" not in state:
            state["rate"], state["rate_dim"] = rate, dim
        state.setdefault("step", torch.zeros((), dtype=torch.int64, device=param.device))

    def _check_group(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError where options, each of which is valid, do not go together."""

    def _options(self, group: dict[str, Any]) -> Options:
        """The op's options, with the authors' rule."""
        raise NotImplementedError

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters that have a gradient; the gradients are only read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        """`step()` without torch's hooks and profiling around it."""
        self._option_checks.follow(self.param_groups)
        self._binding.follow(self.state)
        for number, group in enumerate(self.param_groups):
            params, options = group["params"], self._options(group)
            grads, names = gradients(params), self._op.states[: self._op.num_states(options)]
            if grads:
                key = names, self._op.select(params)
                make = partial(self._bind, params, key)
                self._binding.step(number, params, grads, key, options, Scalars(), make)

    def _bind(
        self, params: list[Tensor], key: tuple[tuple[str, ...], str], done: Collection[int]
    ) -> GroupBinding:
        mask = [p.grad is not None and id(p) not in done for p in params]
        members = [p for p, has_grad in zip(params, mask) if has_grad]
        calls = []
        for positions in by_device_and_dtype(members):
            own = members if positions is None else [members[k] for k in positions]
            calls.append(Call(self._op, self._lists(own, key[0]), self._op.select(own), positions))
        return GroupBinding(calls, params, mask, key, self.state)

    def _lists(self, members: list[Tensor], names: tuple[str, ...]) -> Lists:
        device = members[0].device
        for param in members:
            self._begin(param)
        states = [[self._like(p, name) for p in members] for name in names]
        steps = torch.stack([as_count(self.state[p]["step"], device) for p in members])
        rates, inners = [], []
        for k, param in enumerate(members):
            self.state[param]["step"] = steps[k]
            rate, dim = self.state[param]["rate"].to(device), self.state[param]["rate_dim"]
            self.state[param]["rate"] = rate
            # The op takes float64 rates for float64 parameters only.
            rate = rate if param.dtype == torch.float64 else rate.float()
            inners.append(1 if dim is None or rate.numel() == 1 else param.stride(dim))
            rates.append(like_parameter(rate, param) if dim is None else rate)
        return Lists(members, states, [], rates, inners, [], steps)

    def _like(self, param: Tensor, name: str) -> Tensor:
        """A state in the layout of the parameter as it is now; a new one is zero and starts the count of steps."""
        state, stored = self.state[param], self.state[param].get(name)
        if stored is None:
            state["step"] = torch.zeros_like(state["step"])
        like = torch.empty_strided(
            param.size(), param.stride(), dtype=param.dtype, device=param.device
        )
        state[name] = like.zero_() if stored is None else like.copy_(stored)
        return state[name]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned; the rates keep their precision whatever the parameters' dtype."""
        saved = [k for group in state_dict["param_groups"] for k in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for param in own:
            self._begin(param)
        present = [self.state[p] for p in own]
        super().load_state_dict(state_dict)
        self._binding = Binding()
        for param, key, before in zip(own, saved, present):
            state = {**before, **self.state[param]}
            given = state_dict["state"].get(key, {})
            if "rate" in given:
                state["rate"] = given["rate"].to(param.device, before["rate"].dtype, copy=True)
            self.state[param] = state
            self._rates[param] = state["rate"], state["rate_dim"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._binding = Binding()
        self._option_checks = OptionChecks(self._kinds, self._check_group)
        known = ((p, own) for p, own in self.state.items() if "rate" in own)
        self._rates = {p: (own["rate"], own["rate_dim"]) for p, own in known}


class SGDSpec(SpecOptimizer):
    """SGD with a rate tensor per parameter, and the authors' momentum:

    d = grad + weight_decay p;  buf = d at first, then buf (1 - momentum min(sqrt(lr), 1 / momentum)) + (1 -
    dampening) d;  p -= lr buf, or with nesterov lr (d + momentum buf).
    """

    _op = sgd.OP
    _kinds = sgd.OPTIONS

    def __init__(
        self,
        params: Any,
        lr_params: Iterable[Any],
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(locals())

    def _check_group(self, options: Mapping[str, Any]) -> None:
        sgd.check_group(options)

    def _options(self, group: dict[str, Any]) -> Options:
        return sgd.options_of(group, authors=True)


class AdamSpec(SpecOptimizer):
    """Adam with a rate tensor per parameter, eps added to the root of the uncorrected second moment:

    p -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps).
    """

    _op = adam.OP
    _kinds = adam.AlraoAdam._kinds

    def __init__(
        self,
        params: Any,
        lr_params: Iterable[Any],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(locals())

    def _options(self, group: dict[str, Any]) -> Options:
        return adam.options_of(group, authors=True)
