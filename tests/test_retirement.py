"""Protects `retire_clones`: clones that are dropped in the middle of a training.

- A training goes on as that of a network made with the clones that are left, given their values: bit for bit, for
  every kind of state, with gradients in between, one head or several.
- Which clones are dropped, by hand; what becomes of the switch's mass.
- A checkpoint loads into a network made with all clones, to the same bits; what does not fit raises, with nothing
  changed.
- What cannot follow is refused, with nothing changed; all that looks at clones knows.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from clones_harness import concentrate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import alrao_fast as alrao

N, LEFT = 5, [0, 1, 3]


def adaptive(features, classes, clones):
    return alrao.AdaptiveClassifierClones(features, classes, [1, 2], clones, head_bias=True)


OPTIMIZERS = {
    "sgd": lambda net: alrao.AlraoSGD(net, generator=seeded(1)),
    "momentum": lambda net: alrao.AlraoSGD(net, (1e-3, 1.0), momentum=0.9, generator=seeded(1)),
    "adam": lambda net: alrao.AlraoAdam(net, generator=seeded(1)),
    "amsgrad": lambda net: alrao.AlraoAdam(net, amsgrad=True, generator=seeded(1)),
    "run": lambda net: alrao.AlraoAdam(net, total_steps=24, generator=seeded(1)),
    "groups": lambda net: alrao.AlraoAdam(
        [{"params": net.head.weight}, {"params": [*net.backbone.parameters(), net.head.bias]}],
        generator=seeded(1),
    ),
}
STATES = {
    **{name: (torch.float32, make) for name, make in OPTIMIZERS.items()},
    "stochastic": (torch.bfloat16, OPTIMIZERS["run"]),
    "masters": (
        torch.bfloat16,
        lambda net: alrao.AlraoAdam(net, master_weights=True, averaging=8.0, generator=seeded(1)),
    ),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def build(dtype=torch.float32, clones=N, kind=alrao.ClassifierClones):
    torch.manual_seed(0)
    return alrao.AlraoModel(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), kind(8, 4, clones)).to(dtype)


def train(net, opt, steps):
    for step in steps:
        generator = seeded(step)
        x = torch.randn(7, 6, generator=generator).to(next(net.parameters()).dtype)
        y = torch.randint(4, (7,), generator=generator)
        if isinstance(net.head, alrao.RegressorClones):
            y = torch.randn(7, 4, generator=generator)
        opt.zero_grad()
        net(x, targets=y).backward()
        opt.step()


def prefer(head, *numbers):
    """Have the switch trust these clones, each less than the one before."""
    evidence = [-9.0] * head.num_clones
    for place, number in enumerate(numbers):
        evidence[number] = -0.1 * place
    concentrate(head, *evidence)


def everything(net, opt):
    found = {**net.state_dict(), "running": net.head.running}
    found.pop("head.kept", None)
    for number, own in opt.state_dict()["state"].items():
        found |= {f"{number}.{key}": value for key, value in own.items()}
    found |= {f"grad.{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in found.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name].nan_to_num(nan=0.5), value.nan_to_num(nan=0.5)), name


def cut(net, opt, make, dtype, kind=alrao.ClassifierClones):
    """A network made with fewer clones and its optimizer, with the values of another network's clones."""
    small = build(dtype, len(LEFT), kind)
    smaller = make(small)
    whole = net.state_dict()
    logw = whole["head.switch.logw"][:, LEFT]
    logw = logw - logw.exp().sum().log()
    own = {
        **whole,
        "head.switch.logw": logw,
        "head.switch.log_posterior": whole["head.switch.log_posterior"][LEFT].log_softmax(0),
        **{f"head.{name}": p[LEFT] for name, p in net.head.named_parameters()},
        "head.clone_lr": whole["head.clone_lr"][LEFT],
    }
    small.load_state_dict(own)
    small.head.running.copy_(net.head.running[:, LEFT])
    state = copy.deepcopy(opt.state_dict())
    numbers = {p: k for k, p in enumerate(p for g in opt.param_groups for p in g["params"])}
    for param in net.head.parameters():
        entries = state["state"][numbers[param]]
        for key, value in entries.items():
            if key != "step":
                entries[key] = value[LEFT]
    smaller.load_state_dict(state)
    for param, other in zip(small.parameters(), net.parameters()):
        rows = other.grad if param.shape == other.shape else other.grad[LEFT]
        param.grad = rows.clone()
    return small, smaller


def align_switches(net, other):
    """Compare, and give to `net`, what is by another formula here: the last bit may differ."""
    for name in ("head.switch.logw", "head.switch.log_posterior"):
        own = net.get_buffer(name)
        torch.testing.assert_close(own, other.get_buffer(name), rtol=1e-12, atol=0)
        own.copy_(other.get_buffer(name))


@pytest.mark.parametrize("name", STATES)
def test_a_training_goes_on_as_one_of_the_clones_left(name):
    dtype, make = STATES[name]
    net = build(dtype)
    opt = make(net)
    train(net, opt, range(8))
    prefer(net.head, 1, 3)
    small, smaller = cut(net, opt, make, dtype)
    assert alrao.retire_clones(net, below=1, keep=2) == N - 3
    assert net.head.num_clones == net.head.switch.num_clones == 3
    align_switches(small, net)
    assert_same(everything(net, opt), everything(small, smaller))
    train(net, opt, range(8, 20))
    train(small, smaller, range(8, 20))
    assert_same(everything(net, opt), everything(small, smaller))


@pytest.mark.filterwarnings("ignore:.*is trained without any observation")
@pytest.mark.parametrize("kind", [alrao.RegressorClones, adaptive])
def test_other_heads_and_a_gradient_that_waits_for_its_step(kind):
    net = build(kind=kind)
    opt = OPTIMIZERS["run"](net)
    train(net, opt, range(8))
    prefer(net.head, 1, 3)
    small, smaller = cut(net, opt, OPTIMIZERS["run"], torch.float32, kind)
    alrao.retire_clones(net, below=1, keep=2)
    align_switches(small, net)
    opt.step()
    smaller.step()
    assert_same(everything(net, opt), everything(small, smaller))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"below": 1, "keep": 3}, (0, 2, 3, 4)),
        # The slowest, the first, has little.
        ({"below": 0.1, "keep": 1}, (0, 2, 4)),
        ({"below": 0.015, "keep": 1}, (0, 2, 3, 4)),
        ({"below": 0.1, "keep": 4}, (0, 1, 2, 3, 4)),
        ({"below": 1, "keep": 9}, (0, 1, 2, 3, 4)),
        ({"below": 1, "keep": 1}, (0, 2)),
        ({}, (0, 2, 3, 4)),
    ],
)
def test_which_clones_are_left_and_what_becomes_of_the_mass(options, left):
    net = build()
    opt = OPTIMIZERS["sgd"](net)
    posterior = torch.tensor([0.005, 0.006, 0.7, 0.089, 0.2], dtype=torch.float64)
    joint = posterior * torch.tensor([[0.9], [0.1]], dtype=torch.float64)
    switch = net.head.switch
    switch.logw.copy_(joint.log())
    switch.log_posterior.copy_(posterior.log())
    assert alrao.retire_clones(net, **options) == N - len(left)
    assert net.head.clone_numbers == left
    assert opt.state[net.head.bias]["rate"].shape == (len(left),)
    share = posterior[list(left)] / posterior[list(left)].sum()
    torch.testing.assert_close(net.posterior(), share, rtol=1e-12, atol=0)
    torch.testing.assert_close(switch.logw.exp().sum(0), share, rtol=1e-12, atol=0)


def test_nothing_is_retired_of_what_is_not_known():
    net = build()
    opt = OPTIMIZERS["sgd"](net)
    assert alrao.retire_clones(net) == 0
    assert "head.kept" not in net.state_dict()
    assert opt.state[net.head.weight]["rate"].shape == (N,)


def retired(make="run", steps=8):
    net = build()
    opt = OPTIMIZERS[make](net)
    train(net, opt, range(steps))
    prefer(net.head, 1, 3)
    alrao.retire_clones(net, below=1, keep=2)
    return net, opt


@pytest.mark.parametrize("order", ["optimizer first", "network first"])
def test_a_checkpoint_resumes_to_the_same_bits(order, tmp_path):
    net, opt = retired()
    train(net, opt, range(8, 10))
    torch.save([net.state_dict(), opt.state_dict()], tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt")
    train(net, opt, range(10, 20))
    again = build()
    other = OPTIMIZERS["run"](again) if order == "optimizer first" else None
    again.load_state_dict(saved[0])
    assert again.head.clone_numbers == net.head.clone_numbers == tuple(LEFT)
    other = other or OPTIMIZERS["run"](again)
    other.load_state_dict(saved[1])
    train(again, other, range(10, 20))
    found, expected = everything(again, other), everything(net, opt)
    # The statistics are not saved.
    del found["running"], expected["running"]
    assert_same(found, expected)
    # A second retirement, and its checkpoint in a network that has had the first.
    alrao.retire_clones(net, below=1, keep=1)
    again.load_state_dict(net.state_dict())
    assert again.head.clone_numbers == net.head.clone_numbers
    assert torch.equal(again.head.weight, net.head.weight)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_new_optimizer_has_the_rates_among_all(loaded):
    net = build()
    opt = OPTIMIZERS["sgd"](net)
    train(net, opt, range(8))
    prefer(net.head, 1, 3)
    twin = copy.deepcopy(net)
    rates = alrao.AlraoAdam(twin, lr_range=(1e-4, 1.0)).state[twin.head.weight]["rate"]
    alrao.retire_clones(net, below=1, keep=2)
    if loaded:
        saved = net.state_dict()
        net = build()
        net.load_state_dict(saved)
    new = alrao.AlraoAdam(net, lr_range=(1e-4, 1.0))
    assert torch.equal(new.state[net.head.weight]["rate"], rates[LEFT])
    assert torch.equal(net.head.clone_lr, rates[LEFT])
    train(net, new, range(8, 10))


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    net, opt = retired()
    saved = copy.deepcopy([net.state_dict(), opt.state_dict()])
    other = build(clones=2)
    with pytest.raises(RuntimeError, match=r"head.kept: got 3 of 5 clones, expected some of the 2"):
        other.load_state_dict(saved[0])
    other = build()
    its = OPTIMIZERS["run"](other)
    before = everything(other, its)
    with pytest.raises(ValueError, match=r"has shape \[3\]; expected \[5\]"):
        its.load_state_dict(saved[1])
    assert_same(everything(other, its), before)
    prefer(other.head, 4, 1)
    alrao.retire_clones(other, below=1, keep=2)
    before = everything(other, its)["head.weight"]
    with pytest.raises(RuntimeError, match=r"\[0, 1, 3\], of which this head has retired \[3\]"):
        other.load_state_dict(saved[0])
    assert torch.equal(everything(other, its)["head.weight"], before)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(build().state_dict())


def test_all_that_looks_at_clones_knows():
    net = build()
    opt = OPTIMIZERS["run"](net)
    history = alrao.History(net)
    train(net, opt, range(4))
    history.record()
    rates = net.head.clone_lr.clone()
    prefer(net.head, 1, 3)
    alrao.retire_clones(net, below=1, keep=2)
    train(net, opt, range(4, 6))
    history.record()
    assert torch.equal(net.head.clone_lr, opt.state[net.head.bias]["rate"])
    assert opt.state[net.head.bias]["rate"] is opt.state[net.head.weight]["rate"]
    expected = torch.zeros(N, dtype=torch.float64)
    expected[LEFT] = net.posterior()
    assert torch.equal(history.posterior[1], expected)
    assert torch.equal(history.clone_lr[[2, 4]], rates[[2, 4]])
    assert torch.equal(history.clone_lr[LEFT], net.head.clone_lr)
    values = alrao.metrics(net, opt)
    shown = {name for name in values if name.startswith("alrao/posterior/")}
    assert shown == {f"alrao/posterior/{n}" for n in LEFT}
    assert values["alrao/best_clone"] in LEFT
    x = torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(net.collapse("mixture")(x), net.eval()(x))
    best = net.posterior().argmax()
    assert torch.equal(net.collapse("best").head.weight, net.head.weight[best])
    again = copy.deepcopy(net)
    assert again.head.clone_numbers == tuple(LEFT)
    mean = (net.posterior() * net.head.clone_lr.double().log()).sum().exp()
    assert net.suggested_lr() == pytest.approx(mean.item())


def test_several_heads_and_their_optimizers():
    net = nn.ModuleDict({"a": build(), "b": build(clones=3)})
    first, second = OPTIMIZERS["momentum"](net["a"]), OPTIMIZERS["adam"](net["b"])
    prefer(net["a"].head, 4)
    prefer(net["b"].head, 2)
    assert alrao.retire_clones(net, below=1, keep=1) == 3 + 1
    assert net["a"].head.clone_numbers == (0, 4)
    train(net["a"], first, range(3))
    train(net["b"], second, range(3))
    assert first.state[net["a"].head.weight]["momentum_buffer"].shape == (2, 4, 8)


def test_a_compiled_network_and_step_follow():
    net, other = build(), build()
    opt, its = OPTIMIZERS["momentum"](net), OPTIMIZERS["momentum"](other)
    compiled = torch.compile(net, backend="eager")
    x, y = torch.randn(7, 6), torch.randint(4, (7,))

    def steps(run):
        for model, optimizer in ((run, opt), (other, its)):
            optimizer.zero_grad()
            model(x, targets=y).backward()
            optimizer.step()

    steps(compiled)
    for model in (net, other):
        prefer(model.head, 1, 3)
    for model in (compiled, other):
        assert alrao.retire_clones(model, below=1, keep=2) == N - 3
    steps(compiled)
    assert_same(everything(net, opt), everything(other, its))


class Sharing(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.also = build(), nn.Module()
        self.also.weight = self.net.head.weight


def hooked():
    net = build()
    net.head.weight.register_post_accumulate_grad_hook(lambda param: None)
    return net


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), ValueError, "without clones"),
        (Sharing, ValueError, "whose weight is another module's, too"),
        (hooked, ValueError, "hooks on its weight"),
    ],
)
def test_refusals(make, error, message):
    net = make()
    opt = alrao.AlraoSGD(net, generator=seeded(1))
    with pytest.raises(error, match=message):
        alrao.retire_clones(net, below=1, keep=1)
    assert all(group["params"] for group in opt.param_groups)


def test_refused_without_an_optimizer_of_ours_and_within_averages():
    net = build()
    torch.optim.SGD(net.parameters())
    with pytest.raises(RuntimeError, match="no Alrao optimizer has the weight"):
        alrao.retire_clones(net, below=1)
    opt = OPTIMIZERS["run"](net)
    train(net, opt, range(2))
    before = everything(net, opt)
    with opt.averaged(), pytest.raises(RuntimeError, match="within averaged"):
        alrao.retire_clones(net, below=1)
    for options, message in (
        ({"below": 0}, "below: got 0"),
        ({"below": 1.5}, "below: got 1.5"),
        ({"keep": 0}, "keep: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            alrao.retire_clones(net, **options)
    assert_same(everything(net, opt), before)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_comes_off_first(one_rank):
    net = build()
    opt = OPTIMIZERS["momentum"](net)
    wrapped = DistributedDataParallel(net)
    for given in (wrapped, net, net.head):
        with pytest.raises(ValueError, match="parameters that a DistributedDataParallel has"):
            alrao.retire_clones(given, below=1, keep=2)
    assert net.head.num_clones == N
    del wrapped, given
    assert alrao.retire_clones(net, below=1, keep=2) > 1
    DistributedDataParallel(net)(torch.randn(7, 6), targets=torch.zeros(7).long()).backward()
    opt.step()


def test_heads_over_ranks_are_refused(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    from alrao_fast.distributed import ClonesParallel

    mesh = init_device_mesh("cpu", (1,))
    for shard in (
        lambda net: fully_shard(net, mesh=mesh),
        lambda net: parallelize_module(net, mesh, {"head": ClonesParallel()}),
    ):
        net = build()
        shard(net)
        OPTIMIZERS["sgd"](net)
        with pytest.raises(ValueError, match="a weight that lies over ranks"):
            alrao.retire_clones(net, below=1, keep=2)


@pytest.mark.parametrize("originals", [True, False])
def test_flattened_heads_are_refused_by_the_ranks_that_have_them_whole(one_rank, originals):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardingStrategy

    net = build()
    wrapped = FSDP(
        net,
        sharding_strategy=ShardingStrategy.NO_SHARD,
        use_orig_params=originals,
        device_id=torch.device("cpu"),
    )
    opt = OPTIMIZERS["momentum"](wrapped)
    train(wrapped, opt, range(2))
    with pytest.raises(ValueError, match="a weight that lies over ranks"):
        alrao.retire_clones(net, below=1, keep=2)
    assert net.head.num_clones == len(net.posterior()) == len(net.head.clone_lr) == N
    train(wrapped, opt, range(2, 4))
