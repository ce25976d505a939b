"""Fixed cases: heads that know their rates, a switch that sees the training, and numbers at the edge of their range."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import alrao_fast as alrao
from alrao_fast import functional
from campaign import models, oracles
from campaign.engine import case, refuses
from campaign.modes import MODES, _heard
from campaign.oracles import assert_near
from campaign.values import INF, NAN

BACKENDS = ("cpu", "reference")


def network(kind: str = "ClassifierClones", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return alrao.AlraoModel(models.Plain(), models.heads.make_head(kind, **options))


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator)
    return x, torch.randint(4, (6,), generator=generator)


def spread(low: float, high: float, n: int = 3) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)


def _follows(net: Any, low: float, high: float) -> None:
    rates = spread(low, high)
    assert_near(net.head.clone_lr.double() / rates, torch.ones(3).double(), "clone_lr", 1e-5)
    right = float((net.posterior() * rates.log()).sum().exp())
    assert abs(net.suggested_lr() / right - 1) < 1e-4, f"suggested_lr {net.suggested_lr()}"


@case("A10 clone_lr after load_state_dict of a net of another interval")
def other_interval() -> None:
    net, _opt, *_ = models.trained(_Random())
    other = copy.deepcopy(net)
    alrao.AlraoSGD(other, (1e-6, 1e-4))
    net.load_state_dict(other.state_dict())
    _follows(net, 1e-3, 1.0)


@case("A10 clone_lr of a deep-copied pair that loads another's state")
def copied_pair() -> None:
    net, opt, *_ = models.trained(_Random())
    other, other_opt = copy.deepcopy((net, opt))
    saved = alrao.AlraoSGD(copy.deepcopy(net), (1e-6, 1e-4)).state_dict()
    other_opt.load_state_dict(saved)
    _follows(other, 1e-6, 1e-4)
    _follows(net, 1e-3, 1.0)


class _Random:
    """What models.trained draws its seed from."""

    def getrandbits(self, bits: int) -> int:
        return 5


def _check_clones(net: Any, opt: Any) -> None:
    own = [opt.state[p]["rate"] for p in (net.head.weight, net.head.bias)]
    low, high = opt.defaults["lr_range"]
    right = spread(low, high)
    if isinstance(opt, alrao.AlraoAdam):
        # The triangular law's quantiles 1/6, 1/2 and 5/6.
        first = (1 / 12) ** 0.5
        right = low * (high / low) ** torch.tensor([first, 0.5, 1 - first]).double()
    for rate in own:
        ratio = rate.double() / right
        assert_near(ratio, torch.ones(3).double(), "clone rates over right ones", 1e-5)
    assert_near(net.head.clone_lr, own[0], "clone_lr")
    x, y = data()
    net(x, targets=y).backward()
    opt.step()
    assert low <= net.suggested_lr() <= high


@case("A11 AlraoSGD(net.parameters())")
def bare_parameters() -> None:
    for params in (
        lambda net: net.parameters(),
        lambda net: list(net.parameters()),
        lambda net: net.named_parameters(),
        lambda net: [{"params": net.backbone.parameters()}, {"params": net.head.parameters()}],
        lambda net: [{"params": list(net.parameters())}],
    ):
        net = network()
        _check_clones(net, alrao.AlraoSGD(params(net)))


@case("A11 groups with and without decay")
def decay_groups() -> None:
    net = network()
    decay = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    _check_clones(net, alrao.AlraoSGD(groups))
    net = network()
    matrices = [net.backbone.linear.weight, net.head.weight]
    vectors = [net.backbone.linear.bias, net.head.bias]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
    _check_clones(net, alrao.AlraoAdam(groups))


def _ordinary_loops() -> dict[str, Callable[[Any, Tensor, Tensor], Tensor]]:
    return {
        "F.nll_loss(net(x), y)": lambda net, x, y: F.nll_loss(net(x), y),
        "nn.NLLLoss()": lambda net, x, y: nn.NLLLoss()(net(x), y),
        "F.cross_entropy(net(x), y)": lambda net, x, y: F.cross_entropy(net(x), y),
        "-net(x)[i, y].mean()": lambda net, x, y: -net(x)[torch.arange(len(y)), y].mean(),
    }


def _ordinary(loss: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """Either the switch sees the training, each clone with its own gradient; or it is said, and nothing made up."""
    net, x, y = network(), *data()
    opt = alrao.AlraoSGD(net, (1e-3, 1.0), generator=torch.Generator().manual_seed(0))
    said: list[Any] = []
    right = oracles.mixture(
        net.backbone(x), net.head.weight, net.head.bias, net.head.switch.log_posterior, y
    )
    with _heard(said):
        for k in range(4):
            opt.zero_grad()
            loss(net, x, y).backward()
            if k == 0:
                first = net.head.weight.grad.clone()
            opt.step()
    if int(net.head.switch.t) == 5:
        assert_near(first, right.dweight, "the clones' own gradient")
        return
    assert int(net.head.switch.t) == 1, f"{int(net.head.switch.t) - 1} observations of 4"
    told = [w for w in said if "observ" in str(w.message) or "targets" in str(w.message)]
    assert len(told) == 1, f"{len(told)} warnings of a switch that sees nothing"
    refuses(lambda: net.collapse("best"), "switch", "targets", "observation", "observations")
    refuses(net.suggested_lr, "switch", "targets", "observation", "observations")


for _text, _loss in _ordinary_loops().items():
    case(f"B14 the ordinary loop, {_text}")(lambda loss=_loss: _ordinary(loss))


@case("B14 no warning from a loop with targets")
def no_warning() -> None:
    net, x, y = network(), *data()
    opt = alrao.AlraoSGD(net)
    said: list[Any] = []
    with _heard(said):
        for _ in range(3):
            opt.zero_grad()
            net(x, targets=y).backward()
            opt.step()
    told = [str(w.message) for w in said]
    assert not told, told


@case("B14 collapse('best') and suggested_lr() before any observation")
def before_any() -> None:
    net = network()
    alrao.AlraoSGD(net)
    net.eval()(data()[0])
    names = "switch", "targets", "observation", "observations"
    refuses(lambda: net.collapse("best"), *names)
    refuses(net.suggested_lr, *names)


def _targeted(net: Any, x: Tensor, y: Tensor) -> Tensor:
    return net(x, targets=y)


def _checkpointed_loss(reentrant: bool, kind: str) -> None:
    results = []
    for plain in (True, False):
        net = network(kind)
        x, y = data()
        target = y if kind[0] == "C" else F.one_hot(y, 4).float()
        for k in range(3):
            net.zero_grad()
            x = (x + k).detach().requires_grad_()
            if plain:
                loss = net(x, targets=target)
            else:
                loss = checkpoint(_targeted, net, x, target, use_reentrant=reentrant)
            loss.backward()
        results.append([loss, net.head.switch.t, net.posterior(), x.grad])
        results[-1] += [p.grad for p in net.parameters()]
        results[-1].append(net.head.running)
    for own, right in zip(results[1], results[0], strict=True):
        assert_near(own, right, "under checkpoint", 1e-6)


for _kind in ("ClassifierClones", "RegressorClones"):
    for _reentrant in (False, True):
        case(f"B15 {_kind}, checkpoint{', reentrant' if _reentrant else ''}")(
            lambda kind=_kind, reentrant=_reentrant: _checkpointed_loss(reentrant, kind)
        )


@case("B16 an average of models with their buffers")
def average() -> None:
    net, opt, x, y = models.trained(_Random(), steps=0)
    swa = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    for k in range(10):
        models.step(net, opt, x, y.roll(k))
        swa.update_parameters(net)
    own = swa.module.eval()
    assert_near(own(x).exp().sum(-1), torch.ones(6), "sum of the probabilities", 1e-5)
    assert_near(own.posterior().sum(), 1.0, "sum of the posterior", 1e-9)
    assert 1 <= int(own.head.switch.t) <= int(net.head.switch.t)


def _hessian_of(function: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    right = torch.autograd.functional.hessian(plain, x)
    try:
        own = torch.autograd.functional.hessian(function, x)
    except RuntimeError as problem:
        message = str(problem)
        assert any(word in message for word in MODES) and "setup_context" not in message, message
        return
    assert_near(own, right, "hessian", 1e-7)


for _backend in BACKENDS:
    for _what in ("loss", "loss**2", "log_prob"):

        def _hessian(backend: str = _backend, what: str = _what) -> None:
            torch.manual_seed(0)
            w, b = torch.randn(3, 4, 3).double(), torch.randn(3, 4).double()
            a, y = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([1, 3])

            def plain(x: Tensor) -> Tensor:
                logp = (torch.einsum("bd,ncd->nbc", x, w) + b.unsqueeze(1)).log_softmax(2)
                mixed = torch.logsumexp(a.view(-1, 1, 1) + logp, 0)
                return mixed.sin().sum() if what == "log_prob" else power(F.nll_loss(mixed, y))

            def own(x: Tensor) -> Tensor:
                if what == "log_prob":
                    return functional.switch_mixture_log_prob(x, w, b, a, impl=backend).sin().sum()
                return power(functional.switch_mixture_nll(x, w, b, a, y, impl=backend)[0])

            power = (lambda v: v**2) if what == "loss**2" else (lambda v: v)
            _hessian_of(own, plain)

        case(f"C17 hessian of {_what}, {_backend}")(_hessian)


@case("C18 probabilities at large logits")
def large_logits() -> None:
    for backend in BACKENDS:
        for classes in (2, 60_000):
            head = alrao.ClassifierClones(2, classes, 2).eval()
            with torch.no_grad():
                head.weight.zero_()
                head.bias.fill_(1e8)
            with torch.no_grad(), alrao.use_backend(backend):
                total = head(torch.ones(1, 2)).double().exp().sum(-1)
            assert_near(total, torch.ones(1).double(), f"{classes} classes, {backend}: sum", 1e-4)


@case("C19 a dead clone in the prediction")
def dead_clone() -> None:
    for backend in BACKENDS:
        for kind in ("ClassifierClones", "RegressorClones"):
            head = models.heads.make_head(kind).eval()
            with torch.no_grad():
                head.weight[1] = NAN
                x = torch.randn(5, 3)
                with alrao.use_backend(backend):
                    own = head(x)
                living = head.weight[[0, 2]], head.bias[[0, 2]]
                half = torch.full((2,), 0.5).double().log()
                right = oracles.log_prob if kind[0] == "C" else oracles.mean
                assert_near(own, right(x, *living, half), f"{kind}, {backend}")


def _collapsed(damage: Callable[[Any], None]) -> None:
    for kind in ("ClassifierClones", "RegressorClones"):
        net = network(kind)
        x, _ = data()
        with torch.no_grad():
            damage(net.head)
            right = net.eval()(x)
            assert right.isfinite().all(), f"eval of {kind} is {right.flatten()[:3].tolist()}"
            assert_near(net.collapse("mixture")(x), right, f"collapse('mixture') of {kind}", 1e-4)


@case("C20 collapse('mixture') where a clone overflows")
def overflowing() -> None:
    def damage(head: Any) -> None:
        # Two terms, which overflow for some samples in whatever order they are added.
        head.weight[0].zero_()
        head.weight[0, :, 0] = 3e38
        head.bias[0].fill_(3e38)

    _collapsed(damage)


@case("C20 collapse('mixture') where a clone is NaN or its bias infinite")
def not_finite() -> None:
    _collapsed(lambda head: head.weight[0].fill_(NAN))
    _collapsed(lambda head: head.bias[0].fill_(INF))


@case("C20 num_extras=-1")
def minus_one() -> None:
    net = network()
    refuses(lambda: net.collapse("mixture", num_extras=-1), "num_extras", got=-1)


@case("C21 finite losses whose sum overflows")
def overflowing_sum() -> None:
    x = torch.ones(16, 1)
    weight = torch.tensor([[[0.0]], [[1e19]]])
    a, y = torch.tensor([0.5, 0.5]).double().log(), torch.zeros(16, 1)
    for backend in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        loss, _ = functional.switch_mixture_gaussian_nll(*leaves, None, a, y, impl=backend)
        right = math.log(2) + 0.5 * math.log(2 * math.pi)
        assert_near(loss, torch.tensor(right).float(), f"loss, {backend}", 1e-5)
        loss.backward()
        assert leaves[0].grad.isfinite().all(), f"gradient to x, {backend}"
    head = alrao.RegressorClones(1, 1, 2, bias=False)
    head.weight.data.copy_(weight)
    loss = head.clone_loss(x, lambda out: (out - y).square().sum(-1) / 2)
    assert loss.isfinite(), f"clone_loss is {float(loss)}"


@case("C21 the posterior after losses from 1e12 on")
def huge_losses() -> None:
    for backend in BACKENDS:
        for size in (1e6, 1e12, 1e15, 1e20, 1e300):
            switch = alrao.Switch(4)
            state = oracles.SwitchState(4)
            for k in range(3):
                seen = [-size * (1 + 0.5 * ((n + k) % 4)) for n in range(4)]
                with alrao.use_backend(backend):
                    switch.update(torch.tensor(seen, dtype=torch.float64))
                state.update(seen)
            total = float(switch.posterior().sum())
            assert abs(total - 1) < 1e-9, (
                f"{backend}, losses of {size:g}: probabilities sum to {total}"
            )
            assert_near(switch.posterior(), state.log_posterior.exp(), f"{backend}, {size:g}", 1e-6)


def _told(break_it: Callable[[Any], Any], kind: str, *words: str) -> None:
    net = network(kind)
    opt = alrao.AlraoSGD(net, (1e-3, 1e-1))
    x, y = data()
    target = y if kind[0] == "C" else F.one_hot(y, 4).float()
    said: list[Any] = []
    with _heard(said):
        for k in range(12):
            if k == 3:
                with torch.no_grad():
                    break_it(net)
            opt.zero_grad()
            net(x, targets=target).backward()
            opt.step()
    told = [str(w.message) for w in said if not issubclass(w.category, DeprecationWarning)]
    assert len(told) == 1, f"{len(told)} warnings: {told}"
    assert any(w in told[0].lower() for w in words), f"does not name what died: {told[0]}"
    assert any(character.isdigit() for character in told[0]), f"names no step: {told[0]}"
    refuses(net.suggested_lr)


for _kind in ("ClassifierClones", "RegressorClones"):
    case(f"C22 a backbone that turns NaN, {_kind}")(
        lambda kind=_kind: _told(
            lambda n: n.backbone.linear.bias.fill_(NAN), kind, "backbone", "feature"
        )
    )
    case(f"C22 clones that are all dead, {_kind}")(
        lambda kind=_kind: _told(lambda n: n.head.weight.fill_(NAN), kind, "clone")
    )


@case("C22 one dead clone of three is nobody's warning, and training goes on")
def one_dead() -> None:
    net, opt, x, y = models.trained(_Random())
    with torch.no_grad():
        net.head.weight[2] = INF
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            models.step(net, opt, x, y)
    assert net.backbone.linear.weight.isfinite().all() and net.head.weight[:2].isfinite().all()
    assert net.suggested_lr() > 0
