"""Protects training under FullyShardedDataParallel (FSDP1): four processes over gloo, compared with one process.

- With and without original parameters; FULL_SHARD, SHARD_GRAD_OP and NO_SHARD; one wrapper or several within each
  other; the model passed wrapped, as it is within the wrapper, and as bare parameters. Shards begin and end within
  rows, and are empty on some ranks.
- Rates and rounding seeds are the first rank's on every rank; limits of rates are those of the whole weights;
  clones have their rates and the switch its posterior.
- bfloat16 with master weights; averages; narrowed rates.
- An optimizer that was made first, also in the middle of a training.
- Checkpoints by FSDP's optim_state_dict: into the same wrappers, others, and one process, and back.
"""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from sharded_harness import (
    assert_close,
    made,
    model,
    run,
    train,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

FULL, GRAD, NO = (
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD,
)
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
    found = full_state(net, opt)["state"]
    return {
        f"{name}.{key}": torch.as_tensor(value).clone()
        for name, own in found.items()
        for key, value in own.items()
    }


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


JOBS = (after,)


@pytest.fixture(scope="module")
def results():
    return run(JOBS)


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
