"""Protects training by two processes, over gloo, whose batches differ. Compared with one process with all samples:

- `join`: other numbers and sizes of batches, also none at all; weights, states, posterior and statistics, the same bits
  on both; classifiers and regressors, both kinds of evidence, two heads in an order of their own, MixtureLoss, no_sync;
  what ranks that have run out could not follow is an error on all, as is torch's own join.
- A batch without samples on one rank; gradient accumulation without synchronisation.
- A clone, a loss or a gradient that is not finite on one rank alone, under DistributedDataParallel, fully_shard with a
  GradScaler and ClonesParallel: no drift, and every rank says what has happened.
- Evaluation by parts.
"""

import contextlib
import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from sharded_harness import run, weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from uneven_harness import (
    CASES,
    EPOCHS,
    WORLD,
    accumulation,
    build,
    evaluation,
    items_of,
    optimizer,
    samples,
    state,
    together,
    told,
)

import alrao_fast as alrao
from alrao_fast.distributed import ClonesParallel, join

# One start of the processes for all tests.
pytestmark = pytest.mark.xdist_group("uneven")


def joined(rank):
    found = {}
    for case in CASES:
        net, loss_of = build(case)
        model = DistributedDataParallel(net)
        opt, loss = optimizer(net, seed=rank), loss_of(model)
        driven = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        schedule = torch.optim.lr_scheduler.StepLR(driven, 2)
        for epoch, sizes in enumerate(EPOCHS):
            with join(model, opt, schedule):
                for k in range(len(sizes[rank])):
                    opt.zero_grad()
                    loss(*samples(epoch, rank, k), items_of(epoch, k)).backward()
                    opt.step()
                    driven.step()
                    schedule.step()
        assert schedule.last_epoch == sum(max(map(len, sizes)) for sizes in EPOCHS)
        found[case] = state(net, opt)
    return found


def alone(case):
    net, loss_of = build(case)
    opt, loss = optimizer(net), loss_of(net)
    for epoch, sizes in enumerate(EPOCHS):
        for k in range(max(map(len, sizes))):
            opt.zero_grad()
            x, y = together(epoch, k)
            loss(x, y, len(y)).backward()
            opt.step()
    return state(net, opt)


def refused(rank):
    """Errors on both ranks, the second of which has one batch more."""
    net, _ = build("mean")
    model = DistributedDataParallel(net)
    x, y = samples(0, 1, 0)
    opt = optimizer(net)

    def torchs_own(loss):
        with model.join():
            for _ in range(1 + rank):
                loss(x, y).backward()

    def with_join(step, other=None, **options):
        with join(other or model, opt, **options):
            for _ in range(2 + rank):
                step()

    def early():
        with_join(lambda: model(x, targets=y).backward(), throw_on_early_termination=True)

    criterion = alrao.MixtureLoss(net)
    found = {
        "torch": told(RuntimeError, lambda: torchs_own(lambda x, y: model(x, targets=y))),
        "torch, criterion": told(
            RuntimeError, lambda: torchs_own(lambda x, y: criterion(model(x), y))
        ),
        "nothing": told(RuntimeError, lambda: with_join(lambda: model(x).sum().backward())),
        "outside": told(RuntimeError, lambda: with_join(lambda: net(x, targets=y).backward())),
        "early": told(RuntimeError, early),
    }

    def twice():
        prediction = model(x)
        (criterion(prediction, y) + net(x, targets=y)).backward()

    found["twice"] = told(RuntimeError, lambda: with_join(twice))
    net.eval()
    found["eval"] = told(RuntimeError, lambda: with_join(lambda: model(x, targets=y)))
    net.train()
    other, _ = build("mean")
    wrapped = DistributedDataParallel(other)
    zero = ZeroRedundancyOptimizer(other.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)
    found["zero"] = told(TypeError, lambda: join(wrapped, zero).__enter__())
    found["no DDP"] = told(TypeError, lambda: join(other).__enter__())
    own = dist.get_process_group_ranks
    dist.get_process_group_ranks = lambda group: own(group) if group is not None else [0, 1, 2]
    found["group"] = told(ValueError, lambda: join(wrapped).__enter__())
    dist.get_process_group_ranks = own
    other.backbone[1] = nn.SyncBatchNorm(8)
    found["norm"] = told(ValueError, lambda: join(wrapped).__enter__())
    # What was refused has left no trace.
    for _ in range(2):
        model(x, targets=y).backward()
    return found


def accumulated(rank):
    """Three batches a step, of which the last is synchronised, and on the second rank of no samples in the middle."""
    found = {}
    for place in ("replicas", "shards"):
        net, _ = build("mean")
        if place == "replicas":
            model = DistributedDataParallel(net)
        else:
            model = fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
        opt = optimizer(net)
        for step in range(2):
            opt.zero_grad()
            for k in range(3):
                x, y = accumulation(step, k)[rank]
                synchronised = contextlib.nullcontext()
                if place == "shards":
                    model.set_requires_gradient_sync(k == 2)
                elif k < 2:
                    synchronised = model.no_sync()
                with synchronised:
                    model(x, targets=y, num_items_in_batch=18 / WORLD).backward()
            opt.step()
        found[place] = {
            "weights": weights(net),
            "logw": net.head.switch.logw,
            "t": net.head.switch.t,
        }
    return found


def dead_on_one(rank):
    """The second rank's features are so large that the first clone overflows; its loss is finite all the same."""
    net, _ = build("mean")
    net.backbone[1] = nn.Identity()
    net.backbone[2] = nn.Identity()
    with torch.no_grad():
        net.head.weight[0] *= 1e30
    model = DistributedDataParallel(net)
    opt = alrao.AlraoSGD(net, lr_range=(1e-6, 1e-3), generator=torch.Generator().manual_seed(0))
    x, y = samples(0, 0, 1)
    losses = []
    for _ in range(3):
        opt.zero_grad()
        loss = model(x * (1e10 if rank else 1e-3), targets=y)
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return {**state(net, opt), "losses": torch.stack(losses)}


def broken_on_one(rank):
    """The second rank's second batch has a NaN, or only its gradients have."""
    found = {}
    for what in ("input", "gradient"):
        net, _ = build("mean")
        model = DistributedDataParallel(net)
        opt = optimizer(net)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            for step in range(3):
                x, y = samples(0, rank, 0)
                if rank and step == 1 and what == "input":
                    x[0, 0] = math.nan
                opt.zero_grad()
                loss = model(x, targets=y)
                if rank and step == 1 and what == "gradient":
                    loss = loss * math.inf
                loss.backward()
                opt.step()
        messages = [str(w.message) for w in heard if w.category is RuntimeWarning]
        found[what] = {"state": state(net, opt), "told": messages}
    return found


def broken_in_a_shard(rank):
    """A gradient is NaN in an entry of the second rank alone: with a GradScaler under fully_shard, where the step is
    left out, and without where the clones lie over the ranks, where one clone dies."""
    found = {}
    for place in ("shards", "clones"):
        net, mesh = build("mean")[0], init_device_mesh("cpu", (WORLD,))
        if place == "shards":
            fully_shard(net, mesh=mesh)
        else:
            parallelize_module(net, mesh, {"head": ClonesParallel()})
        opt, scaler = optimizer(net), torch.amp.GradScaler("cpu", init_scale=4.0)
        before = weights(net)
        for step in range(3):
            x, y = samples(0, rank if place == "shards" else 0, 0)
            opt.zero_grad()
            loss = net(x, targets=y)
            (scaler.scale(loss) if place == "shards" else loss).backward()
            if rank and step == 0:
                net.head.weight.grad.to_local()[0, 0] = math.nan
            if place == "shards":
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
            if step == 0:
                kept = all(torch.equal(before[name], value) for name, value in weights(net).items())
        found[place] = {
            "weights": weights(net),
            "posterior": net.posterior(),
            "scale": scaler.get_scale(),
            "kept": kept,
        }
    return found


def evaluated(rank):
    """Each rank evaluates its part of 11 samples; at last the second has none."""
    net, _ = build("sum")
    opt = optimizer(net)
    x, y = together(1, 0)
    net(x, targets=y).backward()
    opt.step()
    before = state(net, opt)
    net.eval()
    found = {}
    for first in (4, 11):
        x, y = torch.arange(66.0).view(11, 6).sin(), torch.arange(11) % 5
        part = slice(0, first) if rank == 0 else slice(first, 11)
        sums = evaluation(net, x[part], y[part])
        dist.all_reduce(sums)
        found[str(first)] = sums
    after = state(net, opt)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return {**found, "state": before}


JOBS = (
    joined,
    refused,
    accumulated,
    dead_on_one,
    broken_on_one,
    broken_in_a_shard,
    evaluated,
)


@pytest.fixture(scope="module")
def results():
    return run(JOBS, world=WORLD)


def assert_same_bits(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=0, equal_nan=True, msg=name)


def assert_close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            value.double(),
            rtol=1e-5,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("case", CASES)
def test_joined_ranks_train_as_one_process_does(results, case):
    one, two = (r["joined"][case] for r in results)
    assert_same_bits(one, two)
    assert_close(one, alone(case))


def test_what_join_cannot_follow_is_told(results):
    expected = {
        "torch": r"Write `with alrao_fast.distributed.join\(model, opt\):`",
        "torch, criterion": r"Write `with alrao_fast.distributed.join\(model, opt\):`",
        "nothing": "ClassifierClones.* observed nothing",
        "outside": "more than once .* or outside",
        "twice": "more than once",
        "eval": "is in evaluation mode: .* evaluate model.module",
        "zero": "got ZeroRedundancyOptimizer",
        "no DDP": "got AlraoModel, expected DistributedDataParallel",
        "group": r"got ranks \[0, 1, 2\] in that of the head .* expected those of the model's, \[0, 1\]",
        "norm": "throw_on_early_termination: got False for a network with SyncBatchNorm",
    }
    for r in results:
        for name, message in expected.items():
            with pytest.raises(RuntimeError, match=message):
                raise RuntimeError(r["refused"][name])
    assert "Throwing across all ranks" in results[1]["refused"]["early"]
    assert "Rank 0 exhausted all inputs" in results[0]["refused"]["early"]


@pytest.mark.parametrize("place", ["replicas", "shards"])
def test_accumulation_without_synchronisation_and_a_rank_without_samples(results, place):
    one, two = (r["accumulated"][place] for r in results)
    assert_same_bits(one["weights"], two["weights"])
    assert torch.equal(one["logw"], two["logw"])
    net, _ = build("mean")
    opt = optimizer(net)
    for step in range(2):
        opt.zero_grad()
        for k in range(3):
            x, y = (torch.cat(parts) for parts in zip(*accumulation(step, k)))
            net(x, targets=y, num_items_in_batch=18).backward()
        opt.step()
    assert one["t"].item() == 7
    torch.testing.assert_close(one["logw"], net.head.switch.logw, rtol=1e-5, atol=1e-6)
    assert_close(one["weights"], weights(net))


def test_a_clone_that_is_dead_on_one_rank_is_for_all(results):
    one, two = (dict(r["dead_on_one"]) for r in results)
    assert one.pop("losses").isfinite().all() and two.pop("losses").isfinite().all()
    assert_same_bits(one, two)
    assert one["head.switch.log_posterior"].argmin() == 0
    assert one["head.switch.t"].item() == 4
    assert one["running 0"][0].isfinite().tolist() == [False, True, True]


def test_what_is_not_finite_on_one_rank_reaches_all_alike_and_is_told(results):
    for what in ("input", "gradient"):
        one, two = (r["broken_on_one"][what] for r in results)
        assert_same_bits(one["state"], two["state"])
        assert one["state"]["backbone.0.weight"].isnan().any()
    here, there = (r["broken_on_one"]["input"]["told"] for r in results)
    assert (
        "nothing is observed at observation 2: every clone was dead for a sample of ranks [1]"
        in here[0]
    )
    assert "1 of 4 samples have features that are not finite" in there[0]
    for heard in (here, there):
        assert "at observation 2: the backbone has diverged" in heard[1] and len(heard) == 2
    for r in results:
        (message,) = r["broken_on_one"]["gradient"]["told"]
        assert "at observation 3: the backbone has diverged" in message


def test_what_is_not_finite_in_a_shard_is_so_for_all(results):
    one, two = (r["broken_in_a_shard"] for r in results)
    for place in ("shards", "clones"):
        assert_same_bits(one[place]["weights"], two[place]["weights"])
        assert torch.equal(one[place]["posterior"], two[place]["posterior"])
        assert one[place]["kept"] == two[place]["kept"] == (place == "shards")
    # All ranks have halved the scale, and gone on.
    assert one["shards"]["scale"] == two["shards"]["scale"] == 2.0
    # The second rank has the last clone, the first of its own.
    alive = one["clones"]["weights"]["head.weight"].isfinite().all((1, 2))
    assert alive.tolist() == [True, True, False]
    assert one["clones"]["posterior"].argmin() == 2
    assert one["clones"]["weights"]["backbone.0.weight"].isfinite().all()


def test_evaluation_by_parts(results):
    x, y = torch.arange(66.0).view(11, 6).sin(), torch.arange(11) % 5
    net, _ = build("sum")
    net.load_state_dict({name: results[0]["evaluated"]["state"][name] for name in net.state_dict()})
    expected = evaluation(net.eval(), x, y)
    for r in results:
        for first in ("4", "11"):
            torch.testing.assert_close(r["evaluated"][first], expected)
        assert_same_bits(r["evaluated"]["state"], results[0]["evaluated"]["state"])


def test_synchronised_batch_normalisation():
    """It is BatchNorm to layouts, rates and `averaged`; on the CPU it trains in one process only."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    net = alrao.AlraoModel(backbone, alrao.ClassifierClones(16, 5, 3))
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert isinstance(twin.backbone[1], nn.SyncBatchNorm)
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(6, 3, 4, 4, generator=generator), torch.arange(6) % 5) for _ in range(4)
    ]
    states = []
    for own in (net, twin):
        opt = optimizer(own)
        for x, y in batches:
            opt.zero_grad()
            own(x, targets=y).backward()
            opt.step()
        found = state(own, opt)
        with opt.averaged(own, batches):
            shown = state(own, opt)
        assert not torch.equal(shown["backbone.1.running_var"], found["backbone.1.running_var"])
        assert_same_bits(state(own, opt), found)
        states.append({**found, **{f"shown {name}": value for name, value in shown.items()}})
    assert_same_bits(*states)
