"""What is done by hand to a running optimizer: each edit to ours and to torch.optim's twin alike."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

RATE = 0.125
# Each draws what it needs from the generator at once and returns what is to be done to either twin.
Edit = Callable[[Random, Any], Callable[[Any], Any]]
EDITS: dict[str, Edit] = {}
# Adam of torch.optim cannot do these itself.
ONLY_SGD = ("pop momentum_buffer", "net.double()")
# Torch's twin has no masters that these could lose, and a parameter of its own dtype.
NO_MASTERS = ("clear the state of a parameter", "clear opt.state", "net.double()")
NO_MASTERS += (
    "clear opt.state, then load a state_dict saved before",
    "add_param_group in the middle",
)


def edit(function: Edit) -> Edit:
    EDITS[function.__doc__ or function.__name__] = function
    return function


def _place(rng: Random, program: Any) -> int:
    return rng.randrange(program.count)


@edit
def _pop(rng, program):
    """pop momentum_buffer"""
    place = _place(rng, program)
    return lambda twin: twin.states(place).pop("momentum_buffer", None)


@edit
def _replace(rng, program):
    """replace every state tensor by a clone"""

    def change(twin):
        for p in twin.params:
            own = twin.opt.state.get(p, {})
            for key, value in own.items():
                if isinstance(value, Tensor):
                    own[key] = value.clone()

    return change


@edit
def _replace_then_fill(rng, program):
    """replace a state tensor by other values"""
    place, value = _place(rng, program), rng.choice([0.0, 0.25, 3.0])

    def change(twin):
        own = twin.states(place)
        for key in twin.keys(place):
            own[key] = torch.full_like(own[key], value)

    return change


@edit
def _fill(rng, program):
    """fill a state tensor in place"""
    place, value = _place(rng, program), rng.choice([0.0, 0.25, 3.0])

    def change(twin):
        for key in twin.keys(place):
            twin.states(place)[key].fill_(value)

    return change


@edit
def _exchange(rng, program):
    """exchange the state tensors of two parameters"""
    one, two = program.count - 2, program.count - 1

    def change(twin):
        a, b = twin.states(one), twin.states(two)
        for key in twin.keys(one):
            a[key], b[key] = b[key], a[key]

    return change


@edit
def _exchange_params(rng, program):
    """exchange two parameters of two groups"""
    one, two = program.count - 2, program.count - 1

    def change(twin):
        a, b = twin.opt.param_groups[one]["params"], twin.opt.param_groups[two]["params"]
        a[0], b[0] = b[0], a[0]

    return change


@edit
def _clear_one(rng, program):
    """clear the state of a parameter"""
    place = _place(rng, program)
    return lambda twin: twin.states(place).clear()


@edit
def _clear(rng, program):
    """clear opt.state"""
    return lambda twin: twin.opt.state.clear()


@edit
def _clear_and_load(rng, program):
    """clear opt.state, then load a state_dict saved before"""

    def change(twin):
        saved = copy.deepcopy(twin.opt.state_dict())
        twin.opt.state.clear()
        twin.opt.load_state_dict(saved)

    return change


@edit
def _new_dicts(rng, program):
    """replace the state's dicts by copies"""

    def change(twin):
        for p in twin.params:
            if p in twin.opt.state:
                twin.opt.state[p] = dict(twin.opt.state[p])

    return change


@edit
def _rate(rng, program):
    """fill or replace state['rate']"""
    place, rate, new = _place(rng, program), rng.choice([0.0, 0.25, 0.5]), rng.random() < 0.5

    def change(twin):
        if not twin.ours:
            twin.opt.param_groups[place]["lr"] = rate
            return
        own = twin.states(place)
        # The parameters of a module share one tensor.
        own["rate"] = torch.full_like(own["rate"], rate)
        if not new:
            twin.gradients(77, tuple(range(program.count)))
            twin.opt.step()
            own["rate"].fill_(rate)

    return change


@edit
def _option(rng, program):
    """assign an option"""
    place = _place(rng, program)
    table = {
        "SGD": {"momentum": [0.0, 0.5], "dampening": [0.0, 0.5], "weight_decay": [0.0, 0.3]},
        "Adam": {"betas": [(0.5, 0.9), (0.0, 0.5)], "eps": [1e-2], "weight_decay": [0.0, 0.3]},
    }[program.kind]
    name = rng.choice([*table, "maximize", "lr"])
    value = rng.choice(table.get(name, [True, False]))
    if name == "lr":
        return lambda twin: twin.set_lr(place, 0.5)
    if name in ("momentum", "dampening") and program.options.get("nesterov"):
        name, value = "weight_decay", 0.3
    return lambda twin: twin.opt.param_groups[place].update({name: value})


@edit
def _tensor_option(rng, program):
    """an option as a tensor, changed in place between steps"""
    place = _place(rng, program)
    names = ["lr", "weight_decay"] + (["momentum", "dampening"] if program.kind == "SGD" else [])
    if program.options.get("nesterov"):
        names.remove("dampening")
    name, start, end = rng.choice(names), rng.choice([0.25, 0.5]), rng.choice([0.125, 0.75])

    def change(twin):
        factor = RATE if name == "lr" and not twin.ours else 1.0
        option = torch.tensor(start * factor, dtype=torch.float64)
        twin.opt.param_groups[place][name] = option
        twin.gradients(78)
        twin.opt.step()
        option.fill_(end * factor)

    return change


@edit
def _write(rng, program):
    """write into p.data"""
    place = _place(rng, program)
    how = rng.choice(["mul_", "clamp_", "new", "no_grad", "set_"])

    def change(twin):
        p = twin.params[place]
        if how == "mul_":
            p.data.mul_(0.5)
        elif how == "clamp_":
            p.data.clamp_(-0.1, 0.1)
        elif how == "new":
            p.data = p.data.clone() + 1
        elif how == "set_":
            p.data.copy_(torch.full_like(p, 0.3))
        else:
            with torch.no_grad():
                p.add_(1.0)

    return change


@edit
def _new_param(rng, program):
    """a new parameter in the group's list, the state moved over"""
    place = _place(rng, program)

    def change(twin):
        old = twin.params[place]
        new = nn.Parameter(torch.full_like(old, 5.0))
        if old in twin.opt.state:
            twin.opt.state[new] = twin.opt.state.pop(old)
        twin.opt.param_groups[place]["params"][0] = new
        old.grad = None

    return change


@edit
def _reload(rng, program):
    """load its own state_dict"""
    return lambda twin: twin.opt.load_state_dict(twin.opt.state_dict())


@edit
def _file(rng, program):
    """load a state_dict from a file"""

    def change(twin):
        file = io.BytesIO()
        torch.save(twin.opt.state_dict(), file)
        file.seek(0)
        twin.opt.load_state_dict(torch.load(file, weights_only=True))

    return change


@edit
def _fresh(rng, program):
    """go on with a fresh optimizer that loads the state_dict"""

    def change(twin):
        saved = twin.opt.state_dict()
        twin.opt = twin.make()
        twin.opt.load_state_dict(saved)

    return change


@edit
def _deepcopy(rng, program):
    """deepcopy network and optimizer"""

    def change(twin):
        twin.net, twin.opt = copy.deepcopy((twin.net, twin.opt))

    return change


@edit
def _pickle(rng, program):
    """pickle network and optimizer"""

    def change(twin):
        twin.net, twin.opt = pickle.loads(pickle.dumps((twin.net, twin.opt)))

    return change


@edit
def _double(rng, program):
    """net.double()"""
    return lambda twin: [setattr(p, "grad", None) for p in twin.params] and twin.net.double()


@edit
def _channels_last(rng, program):
    """net.to(memory_format=channels_last)"""
    return lambda twin: twin.net.to(memory_format=torch.channels_last)


@edit
def _scaler(rng, program):
    """a step by GradScaler, gradients looked at afterwards"""
    infinite = rng.random() < 0.3

    def change(twin):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        twin.gradients(79)
        for p in twin.params:
            p.grad.mul_(8.0)
        if infinite:
            twin.params[0].grad.fill_(float("inf"))
        scaler.step(twin.opt)
        scaler.update()
        # The gradients of fp16 are unscaled by the kernels, which leave them alone in a step that is skipped.
        skipped = infinite and program.dtype == torch.float16
        return [] if skipped else [p.grad.clone() for p in twin.params]

    return change


@edit
def _closure(rng, program):
    """a step with a closure"""

    def change(twin):
        def closure():
            twin.gradients(80)
            return torch.tensor(3.0)

        return [twin.opt.step(closure)]

    return change


@edit
def _some_without_gradient(rng, program):
    """a step in which some parameters have no gradient"""
    without = tuple(rng.sample(range(program.count), 2))
    return lambda twin: program.step(twin, 81, without)


@edit
def _strided_gradient(rng, program):
    """gradients that are expanded or transposed"""

    def change(twin):
        twin.gradients(82)
        for p in twin.params:
            p.grad = (
                p.grad.mT.contiguous().mT
                if p.dim() > 1
                else torch.ones((), dtype=p.dtype).expand(p.shape)
            )
        twin.opt.step()
        return [p.grad.clone() for p in twin.params]

    return change


@edit
def _add_group(rng, program):
    """add_param_group in the middle"""

    def change(twin):
        torch.manual_seed(3)
        new = nn.Parameter(torch.randn(4, 2).to(program.dtype))
        twin.net.register_parameter(f"new{len(twin.opt.param_groups)}", new)
        twin.opt.add_param_group({"params": [new]})

    return change


@edit
def _own_state(rng, program):
    """state of a wrapper's own, through load_state_dict"""

    def change(twin):
        keep = {"mean": [1, 2]}
        saved = twin.opt.state_dict()
        saved["state"]["wrapper"] = keep
        twin.opt.load_state_dict(saved)
        return [torch.tensor(float(twin.opt.state["wrapper"] is keep))]

    return change


@edit
def _hooks(rng, program):
    """step hooks"""

    def change(twin):
        hook = twin.opt.register_step_pre_hook(
            lambda o, *rest: [g["params"][0].grad.mul_(2) for g in o.param_groups]
        )
        program.step(twin, 83)
        hook.remove()

    return change
