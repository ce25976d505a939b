"""Fixed cases: what stands in the optimizer is what runs. Names begin with a letter and number for the subject."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import alrao_fast as alrao
from campaign.engine import case, refuses
from campaign.oracles import assert_near
from campaign.values import INF, NAN

TENTH = alrao.Constant(0.1)


def ones(n: int = 3, value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((n,), value))


def sgd(params: Any, **options: Any) -> alrao.AlraoSGD:
    return alrao.AlraoSGD(params, sampler=TENTH, **options)


def step(opt: torch.optim.Optimizer, gradient: float = 1.0) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, gradient)
    opt.step()


def both(program: Callable[[Callable[..., Any]], Any]) -> None:
    """The same program with AlraoSGD of rates 0.1 and with torch.optim.SGD gives the same tensors."""
    own = program(lambda params, **options: sgd(params, **options))
    right = program(lambda params, **options: torch.optim.SGD(params, lr=0.1, **options))
    for number, (a, b) in enumerate(zip(own, right, strict=True)):
        assert_near(a, b, f"result {number}", 1e-6)


@case("A1 a parameter exchanged in the list")
def exchanged() -> None:
    old, new = ones(), ones(value=5.0)
    opt = sgd([old])
    step(opt)
    opt.state[new] = opt.state.pop(old)
    opt.param_groups[0]["params"][0] = new
    new.grad = torch.ones(3)
    opt.step()
    assert_near(new, torch.full((3,), 4.9), "new")
    assert_near(old, torch.full((3,), 0.9), "old")


def _edited(change: Callable[[Any, Any], Any], **options: Any) -> Callable[[Any], list[Tensor]]:
    def program(make: Any) -> list[Tensor]:
        p = ones()
        opt = make([p], momentum=0.9, **options)
        for k in range(4):
            if k == 2:
                change(opt, p)
            step(opt)
        return [p, opt.state[p]["momentum_buffer"], opt.state_dict()["state"][0]["momentum_buffer"]]

    return program


@case("A2 a state tensor replaced by a clone")
def replaced() -> None:
    program = _edited(
        lambda opt, p: opt.state[p].update(
            {"momentum_buffer": opt.state[p]["momentum_buffer"].clone()}
        )
    )
    both(program)
    saved = program(lambda params, **options: sgd(params, **options))[2]
    assert_near(saved, torch.full((3,), 3.439), "saved buffer", 1e-5)


@case("A2 momentum_buffer popped")
def popped() -> None:
    both(_edited(lambda opt, p: opt.state[p].pop("momentum_buffer")))
    both(_edited(lambda opt, p: opt.state[p].pop("momentum_buffer"), dampening=0.5))


@case("A2 the dict of a state replaced")
def new_dict() -> None:
    def change(opt: Any, p: Tensor) -> None:
        own = {k: v.clone() if torch.is_tensor(v) else v for k, v in opt.state[p].items()}
        own["momentum_buffer"].mul_(2)
        opt.state[p] = own

    both(_edited(change))


@case("A2 a state reset")
def reset() -> None:
    both(_edited(lambda opt, p: opt.state[p]["momentum_buffer"].zero_(), dampening=0.5))
    both(_edited(lambda opt, p: opt.state.clear(), dampening=0.5))
    both(_edited(lambda opt, p: opt.state[p].clear(), dampening=0.5))


@case("A2 offloaded and brought back")
def offloaded() -> None:
    def program(make: Any) -> list[Tensor]:
        p = ones()
        opt = make([p], momentum=0.9)
        kept: dict[str, Tensor] = {}
        for _ in range(4):
            opt.state[p].update({k: v.clone() for k, v in kept.items()})
            step(opt)
            kept = {k: v.clone() for k, v in opt.state[p].items() if torch.is_tensor(v)}
            for key in kept:
                opt.state[p][key] = torch.empty(0)
        return [p, kept["momentum_buffer"]]

    both(program)


def _with_rate(change: Callable[[dict[str, Any]], None]) -> None:
    weight = nn.ConvTranspose2d(2, 3, 2, bias=False)
    for layout in (torch.contiguous_format, torch.channels_last):
        net = copy.deepcopy(weight).to(memory_format=layout)
        opt = sgd(net)
        before = net.weight.detach().clone()
        step(opt)
        change(opt.state[net.weight])
        step(opt)
        assert_near(net.weight, before - 0.1 - 0.5, f"weight in {layout}", 1e-5)


@case("A2 state['rate'] replaced")
def rate_replaced() -> None:
    _with_rate(lambda own: own.update({"rate": torch.full_like(own["rate"], 0.5)}))


@case("A2 state['rate'] filled")
def rate_filled() -> None:
    _with_rate(lambda own: own["rate"].fill_(0.5))


@case("A2 state['rate'] of a grouped transposed convolution in channels_last")
def rate_of_groups() -> None:
    for replace in (False, True):
        net = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False).to(
            memory_format=torch.channels_last
        )
        opt = sgd(net)
        before = net.weight.detach().clone()
        step(opt)
        own = opt.state[net.weight]
        if replace:
            own["rate"] = torch.full_like(own["rate"], 0.5)
        else:
            own["rate"].fill_(0.5)
        step(opt)
        assert_near(net.weight, before - 0.6, "weight", 1e-5)


def _checkpointed(make: Callable[..., Any], flat: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    options = sd.StateDictOptions(flatten_optimizer_state_dict=flat)

    def fresh() -> tuple[nn.Module, Any]:
        torch.manual_seed(4)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return net, make(net)

    def train(net: nn.Module, opt: Any, steps: range) -> None:
        for k in steps:
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            opt.step()

    net, opt = fresh()
    train(net, opt, range(3))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.zero_grad()
        model_state, opt_state = sd.get_state_dict(net, opt, options=options)
        dcp.save({"model": model_state, "opt": opt_state}, checkpoint_id=folder, no_dist=True)
        other, other_opt = fresh()
        model_state, opt_state = sd.get_state_dict(other, other_opt, options=options)
        loaded = {"model": model_state, "opt": opt_state}
        dcp.load(loaded, checkpoint_id=folder, no_dist=True)
        sd.set_state_dict(
            other,
            other_opt,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["opt"],
            options=options,
        )
    for key, value in opt.state_dict()["state"].items():
        for name, tensor in value.items():
            found = other_opt.state_dict()["state"][key].get(name)
            assert found is not None, f"{name} of parameter {key} is lost"
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(tensor)), f"{name} differs"
    for n, o in ((net, opt), (other, other_opt)):
        train(n, o, range(3, 6))
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q), f"weights differ by {float((p - q).abs().max())}"


_MAKERS = {
    "SGD with momentum": lambda net: alrao.AlraoSGD(net, (1e-3, 1.0), momentum=0.9),
    "Adam": lambda net: alrao.AlraoAdam(net, (1e-3, 1e-1), amsgrad=True),
}
for _name, _make in _MAKERS.items():
    for _flat in (False, True):
        case(f"A3 torch.distributed.checkpoint, {_name}{', flattened' if _flat else ''}")(
            lambda make=_make, flat=_flat: _checkpointed(make, flat)
        )


def _moved(name: str, start: float, end: float, **options: Any) -> None:
    def program(make: Any) -> list[Tensor]:
        p = ones()
        value = torch.tensor(start)
        opt = make([p], **{**options, name: value})
        step(opt)
        step(opt)
        value.fill_(end)
        step(opt, 0.5)
        step(opt, -0.25)
        return [p]

    both(program)


@case("A4 weight_decay as a tensor")
def weight_decay_moved() -> None:
    _moved("weight_decay", 0.5, 0.25)


@case("A4 momentum as a tensor")
def momentum_moved() -> None:
    _moved("momentum", 0.5, 0.25)


@case("A4 betas as tensors")
def betas_moved() -> None:
    results = []
    for make in (
        lambda ps, **o: alrao.AlraoAdam(ps, sampler=TENTH, **o),
        lambda ps, **o: torch.optim.Adam(ps, lr=torch.tensor(0.1), capturable=False, **o),
    ):
        p = ones()
        first = torch.tensor(0.5)
        second = torch.tensor(0.9)
        opt = make([p], betas=(first, second))
        step(opt)
        first.fill_(0.25)
        second.fill_(0.5)
        step(opt, 0.5)
        step(opt, -0.25)
        results.append(p)
    assert_near(results[0], results[1], "parameter", 1e-5)


def _assigned(make: Any, name: str, value: Any) -> None:
    p = ones()
    opt = make([p], sampler=TENTH)
    step(opt)
    opt.param_groups[0][name] = value
    p.grad = torch.ones(3)
    refuses(opt.step, name, got=value, watched=[opt])


for _make, _option, _value in (
    (alrao.AlraoSGD, "momentum_rule", "mine"),
    (alrao.AlraoAdam, "eps_rule", "mine"),
    (alrao.AlraoSGD, "rounding", "up"),
    (alrao.AlraoAdam, "eps", -1.0),
    (alrao.AlraoAdam, "eps", "0.1"),
    (alrao.AlraoSGD, "momentum", NAN),
    (alrao.AlraoSGD, "momentum", "0.9"),
    (alrao.AlraoAdam, "betas", (0.9, NAN)),
    (alrao.AlraoSGD, "lr", INF),
):
    case(f"A4 {_make.__name__}, {_option} = {_value!r} assigned")(
        lambda make=_make, name=_option, value=_value: _assigned(make, name, value)
    )


@case("A5 momentum switched on after a step")
def momentum_on() -> None:
    def program(make: Any) -> list[Tensor]:
        p = ones(value=0.0)
        opt = make([p], dampening=0.5)
        step(opt)
        opt.param_groups[0]["momentum"] = 0.9
        step(opt)
        return [p]

    both(program)
    assert_near(program(lambda ps, **o: sgd(ps, **o))[0], torch.full((3,), -0.2), "p", 1e-6)
