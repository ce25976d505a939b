"""Protects training by several processes (two, over gloo, on this machine).

- The switch observes the mean over all processes' counted samples, equal to one process with the whole batch, and
  every process ends with the same bits; a process group of one keeps to itself.
- The second run of an activation checkpoint communicates nothing and observes nothing.
- DistributedDataParallel around an AlraoModel: gradients of the whole batch, equal models after some steps, whatever
  the ranks' seeds: they take over the first one's rates. Networks of one process keep theirs; without a switch ranks
  that drift apart are told so. Clones are retired on all ranks, between two wrappings.
"""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from sharded_harness import start
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from alrao_fast.nn import AdaptiveClassifierClones, AlraoModel, ClassifierClones, Switch
from alrao_fast.optim import AlraoSGD
from alrao_fast.retirement import retire_clones

# One start of the processes for all tests.
pytestmark = pytest.mark.xdist_group("distributed")

WORLD = 2


def make_model(**arguments):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
    return AlraoModel(backbone, ClassifierClones(8, 5, 3, **arguments))


def data(ignored=True):
    """Four batches of 8, half for each process; the processes count a different number of samples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, 6, generator=generator)
    y = torch.randint(5, (4, 8), generator=generator)
    if ignored:
        y[0, :3] = y[2, :4] = y[3] = -100
    return x, y


def state(net):
    return {k: v.clone() for k, v in (*net.state_dict().items(), ("running", net.head.running))}


def switch_alone(rank):
    switch = Switch(3)
    # A clone that is dead on one process is dead for all.
    for observation in ([-1.0, -2.0, -3.0], [-2.0, -1.0, -math.inf]):
        switch.update(torch.tensor(observation) * (rank + 1))
    return switch.state_dict()


def heads(rank):
    """Only the forward: what the switch sees. The head alone, because BatchNorm is per process."""
    result = {}
    for evidence in ("mean", "sum"):
        net = make_model(evidence=evidence)
        for x, y in zip(*data()):
            part = slice(4 * rank, 4 * rank + 4)
            net.head(net.backbone[0](x[part]), y[part])
        result[evidence] = state(net)
    return result


def alone(rank):
    """A group of one process each: nothing is shared."""
    groups = [dist.new_group([r]) for r in range(WORLD)]
    switch = Switch(3, process_group=groups[rank])
    switch.update(torch.tensor([-1.0, -2.0, -3.0]) * (rank + 1))
    return switch.state_dict()


def data_parallel(rank):
    net = make_model()
    torch.manual_seed(rank)
    wrapped = DistributedDataParallel(net)
    opt = AlraoSGD(net, generator=torch.Generator().manual_seed(0), momentum=0.9)
    for x, y in zip(*data(ignored=False)):
        part = slice(4 * rank, 4 * rank + 4)
        opt.zero_grad()
        wrapped(x[part], targets=y[part]).backward()
        opt.step()
    return {"state": state(net), "gradient": net.head.weight.grad}


def gradients(rank):
    net = make_model()
    net.backbone = net.backbone[0]
    wrapped = DistributedDataParallel(net)
    x, y = (values[0] for values in data(ignored=False))
    part = slice(4 * rank, 4 * rank + 4)
    wrapped(x[part], targets=y[part]).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def checkpointed(rank):
    """The second process runs its forwards again, the first does not: there is nothing to wait for."""
    result = {}
    for reentrant in (False, True):
        net = make_model()
        for x, y in zip(*data()):
            part = slice(4 * rank, 4 * rank + 4)
            features = net.backbone[0](x[part])
            if rank == 0:
                loss = net.head(features, y[part])
            else:
                loss = checkpoint(net.head, features, y[part], use_reentrant=reentrant)
            loss.backward()
        result[str(reentrant)] = state(net)
    return result


def broken(rank):
    """The second process gets an input that is not finite."""
    net, (x, y) = make_model(), (values[0] for values in data(ignored=False))
    if rank == 1:
        x[5] = math.nan
    part = slice(4 * rank, 4 * rank + 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        net.head(net.backbone[0](x[part]), y[part])
    messages = [str(w.message) for w in told if w.category is RuntimeWarning]
    return {"told": messages, "t": net.head.switch.t}


def own_seeds(rank):
    """Every rank draws its rates, and what it rounds by, with a seed of its own, also anew in the middle."""
    net = make_model().bfloat16()
    wrapped = DistributedDataParallel(net)
    result = {}
    for draw in range(2):
        opt = AlraoSGD(net, generator=torch.Generator().manual_seed(7 + rank + 10 * draw))
        for x, y in zip(*data(ignored=False)):
            part = slice(4 * rank, 4 * rank + 4)
            opt.zero_grad()
            wrapped(x[part].bfloat16(), targets=y[part]).backward()
            opt.step()
        rates = [opt.state[p]["rate"].clone() for p in net.parameters()]
        result[draw] = {"rates": rates, "seed": opt.param_groups[0]["rounding_seed"]}
    return {**result, "weights": {name: p.detach().clone() for name, p in net.named_parameters()}}


def train_and_retire(net, part, wrap):
    """Two steps, the retirement of a clone, two steps."""
    opt = AlraoSGD(net, (0.1, 10.0), generator=torch.Generator().manual_seed(0), momentum=0.9)
    refused = []
    wrapped = wrap(net)
    for step, (x, y) in enumerate(zip(*data(ignored=False))):
        if step == 2:
            try:
                retire_clones(net, below=1, keep=2)
            except ValueError as error:
                refused.append(str(error))
                del wrapped
                retire_clones(net, below=1, keep=2)
            wrapped = wrap(net)
        opt.zero_grad()
        wrapped(x[part], targets=y[part]).backward()
        opt.step()
    return refused


def retired(rank):
    net = make_model()
    net.backbone = net.backbone[0]
    refused = train_and_retire(net, slice(4 * rank, 4 * rank + 4), DistributedDataParallel)
    return {"state": state(net), "refused": refused}


def parts_of_the_optimizer(rank):
    """Each rank updates some of the parameters, with rates of its own, and sends them to the other."""
    net = make_model()
    wrapped = DistributedDataParallel(net)
    generator = torch.Generator().manual_seed(rank)
    opt = ZeroRedundancyOptimizer(
        net.parameters(), optimizer_class=AlraoSGD, momentum=0.9, generator=generator
    )
    for x, y in zip(*data(ignored=False)):
        part = slice(4 * rank, 4 * rank + 4)
        opt.zero_grad()
        wrapped(x[part], targets=y[part]).backward()
        opt.step()
    own = sum(len(group["params"]) for group in opt.optim.param_groups)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    return {"own": own, "weights": weights, "clone_lr": net.head.clone_lr.clone()}


def drawn_on_one(rank):
    """Only the first rank makes a new optimizer; the second has none that is new."""
    net = make_model()
    opt = AlraoSGD(net, generator=torch.Generator().manual_seed(0))
    x, y = (values[0] for values in data(ignored=False))
    net(x, targets=y)
    if rank == 0:
        opt = AlraoSGD(net, generator=torch.Generator().manual_seed(1))
    try:
        net(x, targets=y)
    except RuntimeError as error:
        return str(error)
    return "" if opt.param_groups else "no parameters"


def others(rank):
    """Optimizers of other networks on each rank: two processes that share no network, in groups of their own."""
    groups = [dist.new_group([r]) for r in range(WORLD)]
    net = make_model(process_group=groups[rank])
    opt = AlraoSGD(net, generator=torch.Generator().manual_seed(rank))
    x, y = (values[0] for values in data(ignored=False))
    weight = net.backbone[0].weight
    before = opt.state[weight]["rate"].clone(), opt.param_groups[0]["rounding_seed"]
    net(x, targets=y).backward()
    opt.step()
    same = torch.equal(before[0], opt.state[weight]["rate"])
    return same and before[1] == opt.param_groups[0]["rounding_seed"]


def without_switch(rank):
    """A network without clones, whose ranks exchange nothing but gradients: what is told."""
    result = {}
    for kind in ("one network", "one seed", "networks apart"):
        apart = kind == "networks apart"
        torch.manual_seed(rank if apart else 0)
        net = nn.Linear(6, 5)
        wrapped = net if apart else DistributedDataParallel(net)
        seed = 0 if kind == "one seed" else rank
        opt = AlraoSGD(net, generator=torch.Generator().manual_seed(seed))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for x in data(ignored=False)[0]:
                opt.zero_grad()
                wrapped(x[4 * rank : 4 * rank + 4]).square().sum().backward()
                opt.step()
                dist.barrier()
        result[kind] = [str(w.message) for w in told if "ranks" in str(w.message)]
    return result


def make_adaptive():
    torch.manual_seed(0)
    head = AdaptiveClassifierClones(8, 20, [4, 9], 3, div_value=2.0)
    return AlraoModel(nn.Linear(6, 8), head)


def adaptive_data():
    """The second process has no sample of the last cluster."""
    x, _ = data()
    y = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(2))
    y[:, 4:] %= 9
    return x, y


def adaptive(rank):
    net = make_adaptive()
    wrapped = DistributedDataParallel(net)
    x, y = adaptive_data()
    part = slice(4 * rank, 4 * rank + 4)
    for k in range(4):
        net.zero_grad()
        wrapped(x[k, part], targets=y[k, part]).backward()
    return {"state": state(net), "gradients": {name: p.grad for name, p in net.named_parameters()}}


JOBS = (
    adaptive,
    switch_alone,
    heads,
    alone,
    data_parallel,
    gradients,
    checkpointed,
    broken,
    own_seeds,
    retired,
    parts_of_the_optimizer,
    drawn_on_one,
    others,
    without_switch,
)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    torch.save({job.__name__: job(rank) for job in JOBS}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the jobs returned, per process: one start of the processes for all tests."""
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    start(work, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_switch_takes_the_mean_over_processes(results):
    one, two = (r["switch_alone"] for r in results)
    assert_same_bits(one, two)
    switch = Switch(3)
    switch.update(torch.tensor([-1.5, -3.0, -4.5]))
    switch.update(torch.tensor([-3.0, -1.5, -math.inf]))
    assert_same_bits(one, switch.state_dict())


@pytest.mark.parametrize("evidence", ["mean", "sum"])
def test_heads_see_the_whole_batch(results, evidence):
    one, two = (r["heads"][evidence] for r in results)
    assert_same_bits(one, two)
    net = make_model(evidence=evidence)
    for x, y in zip(*data()):
        net.head(net.backbone[0](x), y)
    expected = state(net)
    for name, value in one.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-6, atol=1e-6, equal_nan=True, msg=name
        )
    # Nobody counted a sample of the last batch: it is no observation.
    assert one["head.switch.t"].item() == 4
    assert one["running"][2].tolist() == [17] * 3


@pytest.mark.parametrize("reentrant", ["False", "True"])
def test_activation_checkpoints_communicate_once(results, reentrant):
    for r in results:
        assert_same_bits(r["checkpointed"][reentrant], results[0]["heads"]["mean"])


def test_what_is_not_finite_is_told_where_it_is(results):
    (message,) = results[0]["broken"]["told"]
    assert (
        "nothing is observed at observation 1: every clone was dead for a sample of ranks [1]"
        in message
    )
    (message,) = results[1]["broken"]["told"]
    assert "1 of 4 samples have features that are not finite, but the 2 parameters" in message
    # What one process cannot explain by any clone is no observation for all.
    assert [r["broken"]["t"].item() for r in results] == [1, 1]


def test_group_of_one(results):
    for rank in range(WORLD):
        switch = Switch(3)
        switch.update(torch.tensor([-1.0, -2.0, -3.0]) * (rank + 1))
        assert_same_bits(results[rank]["alone"], switch.state_dict())


def test_data_parallel_models_stay_equal(results):
    one, two = (r["data_parallel"]["state"] for r in results)
    # BatchNorm's statistics are each process's own between two broadcasts.
    own = [name for name in one if "running_" in name]
    assert own
    assert_same_bits(*({k: v for k, v in s.items() if k not in own} for s in (one, two)))
    assert one["head.switch.t"].item() == 5
    assert one["running"][2].tolist() == [32] * 3


def test_data_parallel_gradients_are_those_of_the_whole_batch(results):
    one, two = (r["gradients"] for r in results)
    assert_same_bits(one, two)
    net = make_model()
    net.backbone = net.backbone[0]
    x, y = (values[0] for values in data(ignored=False))
    net(x, targets=y).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(one[name], p.grad, msg=name)


def test_clones_are_retired_on_all_ranks(results):
    one, two = (r["retired"] for r in results)
    assert len(one["refused"]) == len(two["refused"]) == 1
    assert "DistributedDataParallel" in one["refused"][0]
    assert_same_bits(one["state"], two["state"])
    net = make_model()
    net.backbone = net.backbone[0]
    assert not train_and_retire(net, slice(None), lambda net: net)
    for name, value in state(net).items():
        torch.testing.assert_close(one["state"][name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert one["state"]["head.kept"].sum() == 2


def test_tails_that_a_process_does_not_need(results):
    """An adaptive softmax: every parameter has a gradient on every process."""
    one, two = (r["adaptive"] for r in results)
    for part in ("state", "gradients"):
        assert_same_bits(one[part], two[part])
    net = make_adaptive()
    for x, y in zip(*adaptive_data()):
        net.zero_grad()
        net(x, targets=y).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(one["gradients"][name], p.grad, msg=name)
    torch.testing.assert_close(one["state"]["head.switch.logw"], net.head.switch.logw)


def test_ranks_with_seeds_of_their_own_have_the_first_ones_rates(results):
    one, two = (r["own_seeds"] for r in results)
    for draw in range(2):
        net = make_model().bfloat16()
        opt = AlraoSGD(net, generator=torch.Generator().manual_seed(7 + 10 * draw))
        for own in (one[draw], two[draw]):
            assert own["seed"] == opt.param_groups[0]["rounding_seed"]
            for rate, p in zip(own["rates"], net.parameters()):
                assert torch.equal(rate, opt.state[p]["rate"])
    # Rounded by the same bits, too.
    assert_same_bits(one["weights"], two["weights"])


def test_zero_redundancy_optimizer(results):
    one, two = (r["parts_of_the_optimizer"] for r in results)
    assert one["own"] and two["own"] and one["own"] + two["own"] == len(one["weights"])
    assert_same_bits(one["weights"], two["weights"])
    assert torch.equal(one["clone_lr"], two["clone_lr"])


def test_rates_that_only_one_rank_has_drawn_are_refused(results):
    one, two = (r["drawn_on_one"] for r in results)
    assert "only those of ranks [0] of the switch's group were drawn or loaded" in one
    assert two == ""


def test_networks_of_one_process_keep_their_rates(results):
    assert all(r["others"] for r in results)


def test_drift_without_a_switch_is_told(results):
    one, two = (r["without_switch"] for r in results)
    assert not any(one.values())
    (message,) = two["one network"]
    assert "ranks 0 and 1 have the same gradients and different learning rates" in message
    assert not two["one seed"] and not two["networks apart"]
