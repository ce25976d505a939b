"""Fixed cases: master weights, gradient scaling, converted modules, loaded states, devices and threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import alrao_fast as alrao
from alrao_fast import backends
from campaign.cases_optimizer import TENTH, both, ones, sgd, step
from campaign.engine import case, refuses, right_or_refused
from campaign.oracles import assert_near
from campaign.values import INF, NAN


def _masters(write: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 9).to(dtype))
    right = nn.Parameter(p.detach().float())
    opt, twin = sgd([p], master_weights=True), torch.optim.SGD([right], lr=0.1)
    for k in range(4):
        if k == 2:
            write(p.data)
            # What was written is there; what was not keeps its master's bits.
            before = right.detach().to(dtype)
            right.data = torch.where(p.detach() == before, right, p.detach().float()).detach()
        step(opt, 0.25)
        step(twin, 0.25)
    assert_near(p, right.to(dtype), "parameter")
    assert_near(opt.state[p]["master"], right, "master", 1e-3)


_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "clamp_": lambda t: t.clamp_(-0.3, 0.3),
    "mul_": lambda t: t.mul_(0.5),
    "copy_": lambda t: t.copy_(torch.full_like(t, 2.0)),
    "zero_": lambda t: t.zero_(),
    "an entry": lambda t: t[0].fill_(3.0),
}
for _text, _write in _WRITES.items():
    for _dtype in (torch.bfloat16, torch.float16):
        case(f"A6 p.data.{_text} with master weights, {str(_dtype)[6:]}")(
            lambda write=_write, dtype=_dtype: _masters(write, dtype)
        )


@case("A7 gradients after scaler.step")
def unscaled() -> None:
    def program(make: Any) -> list[Tensor]:
        p = ones()
        opt = make([p])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale((p * torch.arange(3.0)).sum()).backward()
        scaler.step(opt)
        return [p, p.grad]

    both(program)


def _clipped(**options: Any) -> None:
    """As a trainer does that cannot clip where an optimizer unscales by itself."""
    results = []
    for make in (lambda ps: sgd(ps, **options), lambda ps: torch.optim.SGD(ps, lr=0.1)):
        p = ones()
        opt = make([p])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(3):
            opt.zero_grad()
            scaler.scale((p * torch.arange(3.0)).sum()).backward()
            assert not getattr(opt, "_step_supports_amp_scaling", False), (
                "the trainer refuses to clip"
            )
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_([p], 0.5)
            scaler.step(opt)
            scaler.update()
        results.append(p)
    assert_near(results[0], results[1], "parameter", 1e-6)


@case("A7 gradient clipping by a trainer under mixed precision")
def clipped() -> None:
    _clipped()


@case("A7 gradient clipping by a trainer under mixed precision, fused=False")
def clipped_unfused() -> None:
    _clipped(fused=False)


@case("A8 net.double() by swapping tensors")
def swapped() -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        results = []
        for make in (lambda net: sgd(net), lambda net: torch.optim.SGD(net.parameters(), lr=0.1)):
            torch.manual_seed(0)
            net = nn.Linear(3, 2)
            opt = make(net)
            step(opt)
            opt.zero_grad()
            net.double()
            step(opt)
            results.append(net.weight)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert results[0].dtype == torch.float64
    assert_near(results[0], results[1], "weight", 1e-6)


@case("A8 state emptied, then its own state_dict loaded")
def emptied() -> None:
    def program(make: Any) -> list[Tensor]:
        p = ones()
        opt = make([p], momentum=0.9)
        step(opt)
        opt.state.clear()
        opt.load_state_dict(opt.state_dict())
        step(opt)
        step(opt)
        return [p]

    both(program)


@case("A8 state that is no parameter's")
def wrapped() -> None:
    p = ones()
    for opt in (sgd([p]), torch.optim.SGD([p], lr=0.1)):
        mine: dict[Any, Any] = {p: 3}
        saved = opt.state_dict()
        saved["state"]["mine"] = mine
        opt.load_state_dict(saved)
        assert opt.state["mine"] is mine, f"{type(opt).__name__} copied it"
        assert p in opt.state["mine"]


def _broken(key: str, value: Any) -> None:
    p, q = ones(), ones(2)
    opt = sgd([p, q], momentum=0.9)
    step(opt)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1][key] = value
    refuses(lambda: opt.load_state_dict(saved), key, watched=[opt])
    # It goes on as if nothing had been.
    step(opt)
    assert_near(p, torch.full((3,), 0.9 - 0.19), "p", 1e-6)


for _key, _value in (
    ("rate", None),
    ("rate", "0.1"),
    ("rate", [0.1, 0.1]),
    ("rate", 0.1),
    ("rate", torch.full((2,), NAN)),
    ("rate", torch.full((2,), INF)),
    ("rate", torch.full((2,), -1.0)),
    ("rate", torch.ones(3)),
    ("rate", torch.ones(2, dtype=torch.complex64)),
    ("rate", torch.ones(2).to_sparse()),
    ("rate", torch.ones(2, device="meta")),
    ("step", "one"),
    ("step", None),
    ("step", torch.ones(2)),
    ("step", torch.tensor(-1)),
    ("step", torch.tensor(NAN)),
    ("step", [1]),
    ("momentum_buffer", "buffer"),
    ("momentum_buffer", [1.0, 2.0]),
    ("momentum_buffer", 1.0),
    ("momentum_buffer", torch.ones(3)),
    ("momentum_buffer", torch.ones(2, dtype=torch.complex64)),
    ("momentum_buffer", torch.ones(2).to_sparse()),
):
    case(f"A9 load_state_dict with {_key} = {' '.join(repr(_value).split())}")(
        lambda key=_key, value=_value: _broken(key, value)
    )


@case("A12 a default device")
def default_device() -> None:
    with torch.device("meta"):
        opt = alrao.AlraoSGD([nn.Parameter(torch.ones(3, device="cpu"))])
        head = alrao.ClassifierClones(3, 2, device="cpu")
        regressor = alrao.RegressorClones(3, 2, device="cpu")
        switch = alrao.Switch(3, device="cpu")
        net = alrao.AlraoModel(nn.Linear(3, 3, device="cpu"), head)
        made = [opt, alrao.AlraoAdam(net), alrao.AlraoSGD(net, sampler=alrao.PerWeight())]
        rates = [alrao.LogUniform()(5, None), alrao.Fraction(0.5, 1.0)(5, None), TENTH(5, None)]
    assert all(r.device.type == "cpu" for r in rates), "a sampler drew on the default device"
    assert all(v["rate"].device.type == "cpu" for o in made for v in o.state.values())
    for module in (head, regressor, switch):
        assert all(t.device.type == "cpu" for t in module.state_dict().values())
    loss = head(torch.ones(2, 3), torch.tensor([0, 1]))
    assert loss.isfinite()


@case("A13 use_backend in two threads")
def threads() -> None:
    cpu = torch.device("cpu")
    before = backends.select("switch_update", cpu)
    entered, nested, left = (threading.Event() for _ in range(3))
    seen: dict[str, str] = {}

    def other() -> None:
        with alrao.use_backend("reference"):
            entered.set()
            nested.wait(5)
            seen["first"] = backends.select("switch_update", cpu)
        seen["first, afterwards"] = backends.select("switch_update", cpu)
        left.set()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(5)
    with alrao.use_backend("cpu"):
        nested.set()
        left.wait(5)
        seen["second"] = backends.select("switch_update", cpu)
    thread.join()
    seen["at last"] = backends.select("switch_update", cpu)
    right = {"first": "reference", "first, afterwards": before, "second": "cpu", "at last": before}
    assert seen == right, f"{seen}, right is {right}"


@case("A13 one meta tensor among CPU tensors")
def one_meta() -> None:
    head = alrao.ClassifierClones(3, 2)
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    for backend in ("cpu", "reference", "auto"):
        with alrao.use_backend(backend):
            refuses(lambda: head(x.to("meta"), y), "x", "features", "impl", watched=[head])
            refuses(lambda: head(x, y.to("meta")), "target", "targets", watched=[head])
            values = torch.ones(10, device="meta").double()
            refuses(lambda v=values: head.switch.update(v), "log_likelihood", watched=[head])
    p, q = ones(), nn.Parameter(torch.ones(3, device="meta"))
    opt = sgd([p, q])
    p.grad, q.grad = torch.ones(3), torch.ones(3, device="meta")
    right_or_refused(
        opt.step, lambda r: assert_near(p, torch.full((3,), 0.9)), "device", "meta", "params[1]"
    )
