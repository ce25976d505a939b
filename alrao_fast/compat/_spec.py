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
from alrao_fast.optim import adam, checkpoint, sgd
from alrao_fast.optim.binding import (
    Binding,
    Call,
    GroupBinding,
    MakeRates,
    by_device_and_dtype,
    gradients,
    is_copy,
)
from alrao_fast.optim.param_groups import OptionChecks
from alrao_fast.optim.places import Places
from alrao_fast.optim.states import complete, like, steps_of
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
        self._places = Places()
        self._refresh()

    def _refresh(self) -> None:
        """Give the parameters the states that they lack, and those put in by hand the rates of the ones before them."""
        groups = self.param_groups
        for new, old in self._places.heirs(groups):
            if new not in self._rates:
                own = {**self.state.get(old, {}), **self.state.get(new, {})}
                rate, dim = self._rates[old]
                self._rates[new] = own.get("rate", rate), own.get("rate_dim", dim)
        for number, group in enumerate(groups):
            for place, param in enumerate(group["params"]):
                if param not in self._rates:
                    raise RuntimeError(
                        f"parameter {place} of param group {number}, of shape {list(param.shape)}, was put there "
                        "without rates: expected one in the place of another of its shape, or a new optimizer"
                    )
        self._places.note(groups)
        for group in groups:
            for param in group["params"]:
                state, (rate, dim) = self.state[param], self._rates[param]
                # Clearing the state forgets momentum, not the rates.
                if state.get("rate") is None:
                    state["rate"], state["rate_dim"] = rate, dim
                elif isinstance(state["rate"], Tensor):
                    self._rates[param] = state["rate"], state.setdefault("rate_dim", dim)
            if not self._option_checks.hold(group):
                # The next step says which option is not valid.
                continue
            trained = [p for p in group["params"] if p.requires_grad or p.grad is not None]
            complete(self._op, trained, self.state, self._kept(group))

    def _kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the states that the group's options need."""
        return self._op.states[: self._op.num_states(self._options(group))]

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
        self._refresh()
        mask = [p.grad is not None and id(p) not in done for p in params]
        members = [p for p, has_grad in zip(params, mask) if has_grad]
        names, impl = key
        calls = []
        for positions in by_device_and_dtype(members):
            own = members if positions is None else [members[k] for k in positions]
            lists, derived = self._lists(own, names)
            calls.append(Call(self._op, lists, impl, positions, derived))
        return GroupBinding(calls, params, mask, key, self.state)

    def _lists(
        self, members: list[Tensor], names: tuple[str, ...]
    ) -> tuple[Lists, dict[int, MakeRates]]:
        first = self._op.first_state if self._op.first_state in names else ""
        for param in members:
            own = self.state[param]
            own.update({name: like(own[name], param, param.dtype) for name in names})
        owns = [self.state[param] for param in members]
        states = [[own[name] for own in owns] for name in names]
        steps = steps_of(owns, members[0].device, first)
        rates, inners = [], []
        derived: dict[int, MakeRates] = {}
        for k, param in enumerate(members):
            own = self.state[param]
            own["rate"] = own["rate"].to(param.device)
            dim, make = own["rate_dim"], partial(_in_memory, own, param)
            rates.append(make())
            inners.append(1 if dim is None or rates[k].numel() == 1 else param.stride(dim))
            if is_copy(rates[k], own["rate"]):
                derived[k] = make
        return Lists(members, states, [], rates, inners, [], steps), derived

    def state_dict(self) -> dict[str, Any]:
        """The states, rates among them, and the groups' options, as torch's `state_dict`."""
        self._refresh()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned; raises, changing nothing, where it does not fit.

        The rates keep their precision whatever the parameters' dtype; where `state_dict` has none they stay.
        """
        self._refresh()
        own = [p for group in self.param_groups for p in group["params"]]
        names = {p: f"params[{number}]" for number, p in enumerate(own)}
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups, state = checkpoint.fitted(
            state_dict,
            self.param_groups,
            [self._op] * len(self.param_groups),
            name_of=names.__getitem__,
            rates_of=self._saved_rates,
            missing_rates=lambda param, saved, read: {"rate": self.state[param]["rate"]},
        )
        for group in groups:
            group |= self._option_checks.checked(group)
        for param in own:
            state[param].setdefault("rate_dim", self.state[param]["rate_dim"])
        self.param_groups, self.state, self._binding = groups, state, Binding()
        self._rates = {p: (state[p]["rate"], state[p]["rate_dim"]) for p in own}
        self._places.note(groups)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _saved_rates(
        self, param: Tensor, saved: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and dtype that the rates of a saved state have to have."""
        own = self.state[param]["rate"]
        dim, rate = saved.get("rate_dim", self.state[param]["rate_dim"]), saved.get("rate")
        if dim is None:
            return tuple(param.shape), own.dtype
        if not isinstance(dim, int) or not 0 <= dim < max(param.dim(), 1):
            raise ValueError(
                f"state 'rate_dim' in state_dict is {dim!r}; expected None or a dimension of {list(param.shape)}"
            )
        # One rate serves all entries, too.
        single = not param.dim() or (isinstance(rate, Tensor) and rate.numel() == 1)
        return (1 if single else param.size(dim),), own.dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._binding = Binding()
        self._option_checks = OptionChecks(self._kinds, self._check_group)
        known = ((p, own) for p, own in self.state.items() if "rate" in own)
        self._rates = {p: (own["rate"], own["rate_dim"]) for p, own in known}
        self._places = Places()
        self._places.note(self.param_groups)


def _in_memory(own: dict[str, Any], param: Tensor) -> Tensor:
    """The rates as the op takes them: in memory order, and float64 for float64 parameters only."""
    rate = own["rate"] if param.dtype == torch.float64 else own["rate"].float()
    return like_parameter(rate, param) if own["rate_dim"] is None else rate


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
