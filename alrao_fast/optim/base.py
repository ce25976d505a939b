"""What the optimizers share: param groups, the drawn rates, state, checkpoints and the frame of `step()`.

The class gathers tensors and stores them; the arithmetic is the ops'. What an update needs of a param group is bound
once (binding.py) and kept until something changes: `step()` then only collects the gradients.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from alrao_fast import compiler
from alrao_fast.arguments import Generator, Instance, Kind, Number, Optional, checked
from alrao_fast.ops.feature import FeatureOp, Options, Scalars
from alrao_fast.optim import averages, checkpoint
from alrao_fast.optim.binding import (
    Binding,
    Call,
    GroupBinding,
    Needs,
    bind,
    check_gradient,
    gradients,
)
from alrao_fast.optim.flat_layouts import gathered, spread
from alrao_fast.optim.imitations import itself
from alrao_fast.optim.layouts import Layout
from alrao_fast.optim.notices import warn_of_default_rule, warn_of_no_averages
from alrao_fast.optim.owners import warn_of_unobserved
from alrao_fast.optim.param_groups import (
    SAMPLER,
    OptionChecks,
    as_groups,
    check_of_optimizer,
    check_shared,
    expanded,
    modules_of,
)
from alrao_fast.optim.places import Places
from alrao_fast.optim.rated import Rated
from alrao_fast.optim.rates import Constant, Sampler
from alrao_fast.optim.states import complete, rates_in

# The arguments of a constructor that are no options of a param group.
_OWN = {
    "sampler": SAMPLER,
    "generator": Optional(Generator()),
    "model": Optional(Instance(nn.Module, "a torch.nn.Module")),
    "rate_bound": Optional(Number(above=0)),
}


class AlraoOptimizer(Rated):
    """Base class: not for use on its own."""

    # With fused=True, as in torch.optim, and by default for fp16 parameters, whose gradients GradScaler refuses.
    _step_supports_amp_scaling: bool
    # The op, the options of a param group and what they may be, and which of them may name the authors' rule.
    _op: FeatureOp
    _kinds: Mapping[str, Kind]
    # Whether states of bf16 and fp16 parameters are float32 even without master weights.
    _float32_states = False
    # Options that checkpoints did not have once, as they were then.
    _of_old: Mapping[str, Any] = MappingProxyType({})
    # Within averaged().
    _shows_averages = False

    def __init__(self, arguments: dict[str, Any]) -> None:
        """`arguments`: the `locals()` of a subclass's constructor, which has named and typed them."""
        defaults = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        self._option_checks = OptionChecks(self._kinds, self._check_group)
        defaults |= self._option_checks.checked(defaults)
        params = defaults.pop("params")
        own = checked(_OWN, {name: defaults.pop(name, None) for name in _OWN})
        model = own["model"]
        self._sampler, self._generator = own["sampler"], own["generator"]
        self._rate_bound = own["rate_bound"]
        # Of every parameter met so far, in the order in which rates are drawn.
        self._layouts: dict[Tensor, Layout] = {}
        # What a state that was cleared begins with again: its entries among RATES.
        self._rates: dict[Tensor, dict[str, Tensor]] = {}
        self._places = Places()
        self._alone()
        self._vectors, self._undrawn, self._bounds, self._bare = {}, {}, {}, []
        self._binding = Binding()
        self._constructing = True
        groups = as_groups(params)
        for root in modules_of(groups) if model is None else [model]:
            self._resolve(root)
        super().__init__(groups, defaults)
        self._follow_fused()
        self._draw()
        self._warn_of_bare_tensors()
        self._warn_of_small_multiplier(0, stacklevel=3)
        if not isinstance(self._sampler, Constant):
            params = (p for group in self.param_groups for p in group["params"])
            warn_of_default_rule(params, self._layouts, stacklevel=3)
        self._constructing = False
        self._complete(self.param_groups)
        self._option_checks.follow(self.param_groups)

    def _follow_fused(self) -> None:
        fused = self.defaults["fused"]
        halves = (p.dtype == torch.float16 for group in self.param_groups for p in group["params"])
        if fused or (fused is None and any(halves)):
            self._step_supports_amp_scaling = True

    def _check_group(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError where options, each of which is valid, do not go together."""
        check_shared(options)

    def _options(self, group: dict[str, Any]) -> Options:
        """The op's options as `group` has them."""
        raise NotImplementedError

    def _update_of(self, group: Mapping[str, Any]) -> tuple[FeatureOp, Callable[..., Call]]:
        """The op of a group, and how a call of it is made."""
        return self._op, Call

    def _check_loaded(self, number: int, group: Mapping[str, Any]) -> None:
        """Raise ValueError where group `number` is not what `group`, from a checkpoint, was."""

    def _implied(self, group: dict[str, Any], sampler: Sampler | None) -> dict[str, Any]:
        """Options of a new group that follow from the others and from its own sampler."""
        return {}

    def _lr_factor(self, group: dict[str, Any]) -> float:
        """What multiplies a group's lr."""
        return 1.0

    # Param groups and rates.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: `params` is a module, a tensor, or an iterable of modules, tensors and (name, tensor) pairs.

        The group's options are those of the constructor; it may also have its own `sampler`, `lr_range` and, but for
        `AlraoSGD`, `rate_bound`. A bare tensor has the layout its module gives it, if the optimizer has met the module
        or it is in an `AlraoModel` or a head, else one rate per index of dim 0.
        Raises, and adds nothing, where an option or a parameter is not valid.
        """
        self = itself(self)
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: got a {type(param_group).__name__}, expected a dict")
        group = dict(param_group)
        total_steps = self._run and self._run.total_steps
        check_of_optimizer(group, generator=self._generator, total_steps=total_steps)
        sampler = SAMPLER.check("sampler", group.pop("sampler", None))
        options = self._option_checks.checked({**self.defaults, **group})
        group |= {name: value for name, value in options.items() if name in group}
        bound = group.pop("rate_bound", self._rate_bound)
        bound = _OWN["rate_bound"].check("rate_bound", bound)
        if "lr_range" in group and sampler is None:
            sampler = self._from_interval(*group["lr_range"])
            sampler.is_of_group = True
        group |= self._implied(group, sampler)
        before = len(self.param_groups), dict(self._layouts)
        try:
            for module in modules_of([group]):
                self._resolve(module)
            group["params"] = expanded(group["params"])
            self._lay_out(group["params"])
            for part in self._parts(group, options):
                compiler.without_import(super().add_param_group)(part)
                added = self.param_groups[-1]
                self._undrawn.update(dict.fromkeys(added["params"], (sampler, added["lr_range"])))
                self._bounds.update(dict.fromkeys(added["params"], bound))
                self._places.note(self.param_groups, sampler)
            if not self._constructing:
                self._draw()
        except Exception:
            del self.param_groups[before[0] :]
            self._layouts, self._undrawn, self._bare, self._bounds = before[1], {}, [], {}
            self._places.note(self.param_groups)
            raise
        if not self._constructing:
            self._warn_of_bare_tensors()
            self._warn_of_small_multiplier(before[0], stacklevel=2)
            self._complete(self.param_groups[before[0] :])

    def refresh(self) -> None:
        """Give rates and states to parameters that were put into `param_groups` by hand, or whose state was cleared.

        `step()`, `state_dict()` and `load_state_dict()` do so by themselves.
        """
        self = itself(self)
        self._follow_sharding()
        self._adopt()
        self._complete(self.param_groups)

    def _complete(self, groups: Iterable[dict[str, Any]]) -> None:
        """Give all parameters of `groups` their rates, and those that are trained the states that they lack."""
        for group in groups:
            for param in group["params"]:
                own = self.state[param]
                # Clearing the state forgets momentum, not the rates.
                if own.get("rate") is None:
                    own.update(self._rates[param])
                elif isinstance(own["rate"], Tensor):
                    self._rates[param] = rates_in(own)
            if not self._option_checks.hold(group):
                # The next step says which option is not valid.
                continue
            op, _ = self._update_of(group)
            names = op.states[: op.num_states(self._options(group))]
            has_averages = group.get("averaging") is not None
            precision = self._float32_states, group["master_weights"], has_averages
            trained = [p for p in group["params"] if p.requires_grad or p.grad is not None]
            complete(op, trained, self.state, names, *precision)

    # Checkpoints and copies.

    def state_dict(self) -> dict[str, Any]:
        """The states, rates among them, and the groups' options, as torch's `state_dict`.

        Complete at any time, before the first step and after `state.clear()` too. Parameters that were taken out of the
        groups are left out. Of flat shards of FullyShardedDataParallel the rates are saved for each entry, as FSDP
        gathers them; `load_state_dict`, which all ranks have to call then, takes them for whole parameters, too.
        """
        self = itself(self)
        self.refresh()
        own = {p for group in self.param_groups for p in group["params"]}
        whole = self.state
        if any(isinstance(key, Tensor) and key not in own for key in whole):
            self.state = defaultdict(
                dict, {k: v for k, v in whole.items() if not isinstance(k, Tensor) or k in own}
            )
        try:
            saved = compiler.without_import(super().state_dict)()
        finally:
            self.state = whole
        spread(saved, [p for group in self.param_groups for p in group["params"]], self._layouts)
        if self._run:
            for group in saved["param_groups"]:
                group["steps_taken"] = self._run.taken
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict()` returned; raises, changing nothing, where it does not fit the parameters.

        Tensors are copied. Rates stay float32, step counts int64 and master weights float32, whatever the parameters'
        dtype; the groups' options, the rounding seeds among them, are taken from `state_dict`.
        """
        self = itself(self)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.refresh()
        layouts = self._layouts
        params = [p for group in self.param_groups for p in group["params"]]
        state_dict = gathered(state_dict, params, layouts)
        groups, state = checkpoint.fitted(
            state_dict,
            self.param_groups,
            [self._update_of(group)[0] for group in self.param_groups],
            name_of=lambda param: layouts[param].name,
            rates_of=lambda param, _: ((layouts[param].length(param),), torch.float32),
            missing_rates=partial(
                checkpoint.rates_of_frozen,
                layouts=layouts,
                own=lambda param: rates_in(self.state[param]),
            ),
            of_old=self._of_old,
        )
        for number, group in enumerate(groups):
            group |= self._option_checks.checked(group)
            self._check_loaded(number, group)
        self.param_groups, self.state, self._binding = groups, state, Binding()
        self._places.note(groups)
        taken = [group.pop("steps_taken", None) for group in groups]
        if self._run:
            warn_of_no_averages(groups, stacklevel=2)
            self._run.go_on_from(taken[0], state.values())
        for group in groups:
            for param in group["params"]:
                own, layout = rates_in(state[param]), self._layouts[param]
                self._rates[param] = own
                if layout.vector in self._vectors and layout.feature_of is None:
                    self._vectors[layout.vector] = own.get("drawn_rate", own["rate"])
        self._tell_heads()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._adopt()
        own = {p for group in self.param_groups for p in group["params"]}
        return {
            **super().__getstate__(),
            "_layouts": {p: layout for p, layout in self._layouts.items() if p in own},
            "_rates": {p: rates for p, rates in self._rates.items() if p in own},
            "_places": self._places,
            "_vectors": self._vectors,
            "_sampler": self._sampler,
            "_generator": self._generator,
            "_run": self._run,
            "_rate_bound": self._rate_bound,
            "_constructing": False,
            "_undrawn": {},
            "_bounds": {},
            "_bare": [],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_fused()
        self._binding = Binding()
        self._alone()
        self._option_checks = OptionChecks(self._kinds, self._check_group)
        self._tell_heads()

    # Averages.

    def averaged(
        self, model: nn.Module | None = None, loader: Iterable[Any] | None = None
    ) -> AbstractContextManager[None]:
        """Within it the parameters are their running averages, clones included; afterwards what they were, bit for bit.

            with opt.averaged(net, loader):
                accuracy = evaluate(net.eval())
                torch.save(net.state_dict(), "averaged.pt")

        Needs `averaging` in at least one param group. A parameter that no step has updated stays as it is; one that
        was frozen later is the average of the updates that it had.

        Args:
            model: whose running statistics in BatchNorm are of other weights than the averages: they are estimated
                anew, as `torch.optim.swa_utils.update_bn` does but for frozen layers, and put back at the end, with
                whatever else the passes wrote into buffers (spectral normalisation does). Random numbers drawn for
                them change none that are drawn afterwards.
            loader: the batches for that, tensors or tuples that begin with the inputs. Some dozens are enough:
                `itertools.islice(loader, 40)`. Needed if and only if a model is given, read if that has BatchNorm.
                Without either, a warning at the end of the block tells of BatchNorm whose statistics nothing in it
                has estimated.

        What `state_dict()` of a module returns shares the parameters' memory: save it, or copy it, within the block.
        Resume from what was saved outside. Weights that were written by hand count in the average from the next step
        on. Raises ValueError where there are no averages or one argument comes without the other; RuntimeError at a
        `step()` within.
        """
        return averages.averaged(itself(self), model, loader)

    # The step.

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if self._shows_averages:
            raise RuntimeError("step() within averaged(): the parameters are their averages there")
        self._option_checks.follow(self.param_groups)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._option_checks.follow(self.param_groups)
        # Set by GradScaler for the duration of its step.
        scaler_sets = self.__dict__
        grad_scale, found_inf = scaler_sets.get("grad_scale"), scaler_sets.get("found_inf")
        self._binding.follow(self.state)
        for number, group in enumerate(self.param_groups):
            params = group["params"]
            grads = gradients(params)
            if self._counts.get(number) != len(grads):
                grads = self._recounted(number)
            if not grads:
                continue
            options = self._options(group)
            scalars = Scalars(
                group["lr"],
                group["maximize"],
                grad_scale,
                found_inf,
                group.get("warmup_steps", 0),
                group.get("averaging") or 0.0,
                self._lr_factor(group),
            )
            try:
                needs = self._needs(group, options, grads)
                make = partial(self._bind, group, needs)
                self._binding.step(number, params, grads, needs, options, scalars, make)
            except (RuntimeError, ValueError):
                # A gradient that has turned sparse since the tensors were bound, or is on meta, has a clearer message.
                for param in params:
                    if param in self._layouts:
                        check_gradient(param, self._layouts[param].name)
                raise
        if self._run:
            self._run.count(self)
        return loss

    def _needs(self, group: dict[str, Any], options: Options, grads: list[Tensor]) -> Needs:
        op, _ = self._update_of(group)
        return Needs(
            op.states[: op.num_states(options)],
            self._float32_states,
            group["master_weights"],
            group.get("averaging") is not None,
            group["rounding"],
            "reference" if group["fused"] is False else op.select(grads),
        )

    @compiler.disable("the optimizer's tensors are bound anew")
    @torch.no_grad()
    def _bind(self, group: dict[str, Any], needs: Needs, done: Collection[int]) -> GroupBinding:
        self._adopt()
        self._complete([group])
        warn_of_unobserved(group["params"])
        op, make_call = self._update_of(group)
        own = group["params"], self._layouts, self.state, needs, group["rounding_seed"], done
        return bind(op, *own, make_call)

    _hooked_step = Optimizer.profile_hook_step(_step)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure`, if given, returns."""
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiler._is_profiler_enabled
        ):
            return self._hooked_step() if closure is None else self._hooked_step(closure)
        return self._step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or with `set_to_none=False` set them to zero."""
        if not set_to_none or profiler._is_profiler_enabled:
            compiler.without_import(super().zero_grad)(set_to_none)
            return
        # Without torch's profiler range and grouping, which take a tenth of a small model's step.
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    # torch would wrap step in a profiler range, which costs more than the whole of a small update; `step` above runs
    # the hooks, and the range while a profiler is on.
    step.hooked = True  # type: ignore[attr-defined]
