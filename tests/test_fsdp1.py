"""Protects training under FullyShardedDataParallel (FSDP1): four processes over gloo, compared with one process.

- With and without original parameters; FULL_SHARD, SHARD_GRAD_OP and NO_SHARD; one wrapper or several within each
  other; the model passed wrapped, as it is within the wrapper, and as bare parameters. Shards begin and end within
  rows, and are empty on some ranks.
- Rates and rounding seeds are the first rank's on every rank; limits of rates are those of the whole weights;
  clones have their rates and the switch its posterior.
- bfloat16 with master weights; averages, also evaluated after forwards without a backward; narrowed rates.
- An optimizer that was made first, also in the middle of a training.
- Checkpoints by FSDP's optim_state_dict: into the same wrappers, others, and one process, and back.
"""

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from sharded_harness import (
    STEPS,
    assert_close,
    evaluate_between,
    gradient,
    made,
    model,
    run,
    train,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    OptimStateKeyType,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import alrao_fast as alrao
from alrao_fast.flat_shards import parts_of

# One start of the processes for all tests.
pytestmark = pytest.mark.xdist_group("fsdp1")

FULL, GRAD, NO = (
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD,
)
WORLD = 4
# Originals, strategy, whether there are several wrappers, the optimizer, what it is given.
AFTER = [
    *itertools.product((True, False), (FULL, GRAD, NO), (True,), ("momentum",), ("wrapped",)),
    *itertools.product((True, False), (FULL,), (False,), ("adam",), ("inner",)),
    *itertools.product((True, False), (FULL,), (True,), ("amsgrad",), ("bare",)),
]


def name_of(case):
    return "-".join(str(getattr(entry, "name", entry)) for entry in case)


def wrapped(net, several=True, originals=True, strategy=FULL):
    wrap = functools.partial(
        FSDP,
        use_orig_params=originals,
        sharding_strategy=strategy,
        device_id=torch.device("cpu"),
    )
    if several:
        net.backbone[2] = wrap(net.backbone[2])
        net.head = wrap(net.head)
    return wrap(net)


def clean(name):
    return name.replace("_fsdp_wrapped_module.", "")


def weights(net):
    with FSDP.summon_full_params(net, writeback=False):
        return {clean(name): p.detach().clone() for name, p in net.named_parameters()}


def full_state(net, opt):
    # Not offloaded: on the CPU torch's copies would be views of one buffer, the last state's.
    config = FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False)
    with FSDP.state_dict_type(net, StateDictType.FULL_STATE_DICT, optim_state_dict_config=config):
        return FSDP.optim_state_dict(net, opt)


def states(net, opt):
    """Of whole parameters, by FSDP."""
    return flat_state(full_state(net, opt))


def of_one_process(net, opt):
    """The same without FSDP: rates for each entry."""
    found = {}
    for name, p in net.named_parameters():
        layout = opt.layout_of(p)
        for key, value in opt.state[p].items():
            if key in ("rate", "drawn_rate", "rate_limit"):
                at = [p.size(d) if d in layout.dims else 1 for d in range(p.dim())]
                value = value.view(at).expand(p.shape)
            found[f"{name}.{key}"] = value.detach().clone()
    return found


def result(net, opt):
    head = net.head
    return {
        "weights": weights(net),
        "states": states(net, opt),
        "posterior": head.switch.logw.clone(),
        "clone_lr": head.clone_lr.clone(),
        "seeds": [group["rounding_seed"] for group in opt.param_groups],
    }


def after(rank):
    found = []
    for originals, strategy, several, kind, given in AFTER:
        inner = model()
        net = wrapped(inner, several, originals, strategy)
        params = {"wrapped": net, "inner": inner, "bare": list(net.parameters())}[given]
        opt = made(kind, params, seed=1 + rank)
        train(net, opt, part=(rank, dist.get_world_size()))
        found.append(result(net, opt))
    return found


def first(rank):
    """The optimizer is made first, by another seed on every rank; also in the middle of a training."""
    found = []
    for begun, strategy, several in FIRST:
        alone = dist.new_subgroups(1)[0]
        net = model(group=alone)
        opt = made("adam", net, seed=1 if begun else 1 + rank)
        train(net, opt, range(begun))
        net.head.switch.process_group = None
        net = wrapped(net, several, strategy=strategy)
        train(net, opt, range(begun, STEPS), part=(rank, dist.get_world_size()))
        found.append(result(net, opt))
    return found


def low_precision(rank):
    """With masters, averages and rates that are narrowed, on gradients that are the same."""
    net = wrapped(model(torch.bfloat16))
    opt = made("adam", net, **LOW)
    steps_alike(net, opt)
    found = {"states": states(net, opt), "weights": weights(net)}
    with opt.averaged():
        found["averages"] = weights(net)
    return found


def averages(rank):
    """The wrapper at the top keeps whole weights after a forward, under SHARD_GRAD_OP those within do so, too."""
    found = []
    for originals, strategy in AVERAGED:
        net = wrapped(model(), originals=originals, strategy=strategy)
        opt = made("adam", net, averaging=3.0)
        # Before the first forward nothing has been gathered.
        with opt.averaged():
            pass
        found.append(evaluate_between(net, opt, part=(rank, dist.get_world_size())))
    return found


def steps_alike(net, opt):
    """Steps on the same gradients, of which every shard has its entries."""
    shapes = {name: p.shape for name, p in model().named_parameters()}
    for step in range(STEPS):
        for name, p in net.named_parameters():
            whole = gradient(clean(name), torch.empty(shapes[clean(name)], dtype=p.dtype), step)
            for part in parts_of(p) or ():
                whole = whole.flatten()[part.start : part.stop]
            p.grad = whole if p.numel() else None
        opt.step()


def moved(rank):
    """A checkpoint goes from wrappers to others, and into one process and back; `full` is the state in between."""
    found = []
    for originals, kind in MOVED:
        net = wrapped(model(), True, originals)
        opt = made(kind, net, seed=1)
        train(net, opt, range(2), part=(rank, dist.get_world_size()))
        full, whole = full_state(net, opt), weights(net)
        by_id = FSDP.rekey_optim_state_dict(full, OptimStateKeyType.PARAM_ID, model())
        alone = model(group=dist.new_subgroups(1)[0], seed=3)
        alone.load_state_dict(whole, strict=False)
        alone_opt = made(kind, alone, seed=7)
        alone_opt.load_state_dict(by_id)
        own = {"alone": of_one_process(alone, alone_opt), "full": flat_state(full)}
        for again in (True, False):
            plain = model(seed=3)
            plain.load_state_dict(whole, strict=False)
            plain.head.switch.load_state_dict(net.head.switch.state_dict())
            other = wrapped(plain, not again, again, GRAD)
            opt = made(kind, other, seed=9 + rank)
            opt.load_state_dict(FSDP.optim_state_dict_to_load(other, opt, copy.deepcopy(full)))
            train(other, opt, range(2, STEPS), part=(rank, dist.get_world_size()))
            own[f"wrapped {again}"] = {"weights": weights(other), "states": states(other, opt)}
        found.append(own)
    return found


def sharded_checkpoint(rank):
    """As torch.distributed.checkpoint and trainers take it, of shards."""
    net = wrapped(model())
    opt = made("momentum", net, seed=1)
    train(net, opt, range(2), part=(rank, dist.get_world_size()))
    with FSDP.state_dict_type(net, StateDictType.SHARDED_STATE_DICT):
        saved = copy.deepcopy(FSDP.optim_state_dict(net, opt))
        again = made("momentum", net, seed=5 + rank)
        again.load_state_dict(FSDP.optim_state_dict_to_load(net, again, saved))
    return states(net, opt), states(net, again)


def frozen(rank):
    """A frozen parameter beside trained ones: where a checkpoint is loaded it has the rates of its layer."""
    net = model()
    net.backbone[0].weight.requires_grad_(False)
    net = wrapped(net)
    opt = made("momentum", net, seed=1)
    train(net, opt, range(2), part=(rank, dist.get_world_size()))
    full = full_state(net, opt)
    again = made("momentum", net, seed=5)
    again.load_state_dict(FSDP.optim_state_dict_to_load(net, again, copy.deepcopy(full)))
    train(net, again, range(2, STEPS), part=(rank, dist.get_world_size()))
    rates = [
        {clean(n): o.state[p]["rate"].clone() for n, p in net.named_parameters()}
        for o in (opt, again)
    ]
    return {"saved": sorted(full["state"]), "weights": weights(net), "rates": rates}


def tools(rank):
    """What else there is to ask."""
    found = {}
    for originals in (True, False):
        net = wrapped(model(), False, originals)
        opt = made("momentum", net, seed=1)
        train(net, opt, range(2), part=(rank, dist.get_world_size()))
        opt.anneal_rates(0.5)
        own = {"clone_lr": net.head.clone_lr.clone(), "metrics": alrao.metrics(net, opt)}
        own["rows"] = [row.parameter for row in alrao.describe_rates(opt, file=None)]
        refused = {
            "clip": lambda net=net: alrao.clip_grad_norm_(net, 1.0),
            "collapse": lambda net=net: net.module.collapse("mixture"),
            "finite": lambda net=net: net.head.finite_clones(),
        }
        for name, call in refused.items():
            try:
                call()
            except RuntimeError as error:
                own[name] = str(error)
        with FSDP.summon_full_params(net):
            own["suggested_lr"] = net.suggested_lr()
        found[str(originals)] = own
    # Flattened into other tensors, of which an optimizer that was made before knows nothing.
    net = model()
    opt = made("momentum", net)
    net = wrapped(net, False, False)
    try:
        train(net, opt, range(1))
    except ValueError as error:
        found["late"] = str(error)
    return found


FIRST = [(0, FULL, True), (2, FULL, False), (0, NO, False)]
LOW = {"master_weights": True, "averaging": 8.0, "total_steps": 2 * STEPS, "warmup_steps": 0}
MOVED = [(True, "adam"), (False, "momentum")]
AVERAGED = [*itertools.product((True, False), (FULL, GRAD, NO))]
JOBS = (after, averages, first, low_precision, moved, sharded_checkpoint, frozen, tools)


def flat_state(state):
    return {
        f"{name}.{key}": torch.as_tensor(value).clone()
        for name, own in state["state"].items()
        for key, value in own.items()
    }


@pytest.fixture(scope="module")
def results():
    return run(JOBS, world=WORLD)


@functools.cache
def expected(kind="momentum"):
    net = model()
    opt = made(kind, net)
    train(net, opt)
    return {
        "weights": {n: p.detach() for n, p in net.named_parameters()},
        "states": of_one_process(net, opt),
        "posterior": net.head.switch.logw,
        "clone_lr": net.head.clone_lr,
        "seeds": [group["rounding_seed"] for group in opt.param_groups],
    }


def check(found, kind):
    """All ranks alike, and as one process."""
    one = expected(kind)
    for own in found:
        assert torch.equal(own["posterior"], found[0]["posterior"])
        assert torch.equal(own["clone_lr"], one["clone_lr"])
        assert_close({"": own["posterior"]}, {"": one["posterior"]})
        assert own["seeds"] == one["seeds"]
        assert_close(own["weights"], one["weights"])
        # Of clones FSDP's have a limit, too, that none reaches: it expects the same states of all parameters.
        assert_close({key: own["states"][key] for key in one["states"]}, one["states"])


@pytest.mark.parametrize("number", range(len(AFTER)), ids=lambda k: name_of(AFTER[k]))
def test_the_optimizer_made_after(results, number):
    check([r["after"][number] for r in results], AFTER[number][3])


@pytest.mark.parametrize("number", range(len(FIRST)), ids=lambda k: name_of(FIRST[k]))
def test_the_optimizer_made_first(results, number):
    check([r["first"][number] for r in results], "adam")


@pytest.mark.filterwarnings("ignore:ClassifierClones is trained without any observation")
def test_low_precision(results):
    net = model(torch.bfloat16)
    opt = made("adam", net, **LOW)
    steps_alike(net, opt)
    expected = of_one_process(net, opt)
    for r in results:
        found = r["low_precision"]
        assert_close({key: found["states"][key] for key in expected}, expected)
        for name, p in net.named_parameters():
            assert torch.equal(found["weights"][name], p)
            assert torch.equal(found["averages"][name], opt.state[p]["average"].bfloat16())


@pytest.mark.parametrize("number", range(len(AVERAGED)), ids=lambda k: name_of(AVERAGED[k]))
def test_averages(results, number):
    net = model()
    expected = evaluate_between(net, made("adam", net, averaging=3.0))
    for r in results:
        assert_close(r["averages"][number], expected, atol=2e-6)


@pytest.mark.parametrize("number", range(len(MOVED)), ids=lambda k: name_of(MOVED[k]))
def test_checkpoints(results, number):
    one = expected(MOVED[number][1])
    for r in results:
        found = r["moved"][number]
        for key, value in found["alone"].items():
            assert torch.equal(value, found["full"][key].reshape(value.shape)), key
        for again in (True, False):
            own = found[f"wrapped {again}"]
            assert_close(own["weights"], one["weights"])
            assert_close({key: own["states"][key] for key in one["states"]}, one["states"])


def test_frozen_parameters(results):
    net = model()
    net.backbone[0].weight.requires_grad_(False)
    train(net, made("momentum", net))
    expected = {name: p.detach() for name, p in net.named_parameters()}
    for r in results:
        found = r["frozen"]
        assert found["saved"] == sorted(set(expected) - {"backbone.0.weight"})
        before, after = found["rates"]
        assert all(torch.equal(after[name], rate) for name, rate in before.items())
        assert_close(found["weights"], expected)


def test_sharded_checkpoint(results):
    for r in results:
        before, after = r["sharded_checkpoint"]
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_tools(results):
    net = model()
    opt = made("momentum", net)
    train(net, opt, range(2))
    opt.anneal_rates(0.5)
    for r in results:
        for originals in ("True", "False"):
            own = r["tools"][originals]
            torch.testing.assert_close(own["clone_lr"], net.head.clone_lr, rtol=1e-6, atol=0)
            assert own["metrics"]["alrao/best_lr"] == pytest.approx(
                alrao.metrics(net, opt)["alrao/best_lr"], rel=1e-5
            )
            assert own["rows"] == [n for n, _ in net.named_parameters()]
            assert own["suggested_lr"] == pytest.approx(net.suggested_lr(), rel=1e-5)
            assert "use clip_grad_norm_ of the FullyShardedDataParallel wrapper" in own["clip"]
            assert "expected a whole one: load its full state" in own["collapse"]
            assert "ask within FullyShardedDataParallel.summon_full_params(net)" in own["finite"]
        assert "after the optimizer, expected the optimizer to be made after" in r["tools"]["late"]
