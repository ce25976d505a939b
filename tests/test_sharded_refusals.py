"""Protects what is refused, with the cure and before anything is written, because rates would go to wrong entries:

- flat parameters and shards: those of DeepSpeed's ZeRO-3; vectors in the place of a group's parameters, as ZeRO-1 and
  ZeRO-2 and Megatron leave them, of which nobody has told what they hold (tests/test_flat_slices.py);
- wrappers of other tensors; DTensors in ops, losses and collapse that need a whole tensor.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from sharded_harness import made, model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor

import alrao_fast as alrao

fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
debug = pytest.importorskip("torch.distributed.tensor.debug")


@pytest.fixture
def two_ranks():
    """The first rank of two, without the other."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=2)
    debug._clear_sharding_prop_cache()
    yield
    dist.destroy_process_group()


def test_zero3():
    layer = nn.Linear(4, 3)
    layer.weight.ds_tensor = torch.zeros(6)
    with pytest.raises(
        ValueError, match=r"parameter 'weight' is partitioned by DeepSpeed's ZeRO-3"
    ):
        alrao.AlraoSGD(layer)


def test_vectors_in_the_place_of_parameters():
    net = model()
    opt = made("momentum", net)
    (group,) = opt.param_groups
    whole, before = list(group["params"]), copy.deepcopy(opt.state_dict())
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in whole]))
    flat.grad = torch.ones_like(flat)
    group["params"] = [flat]
    for call in (opt.step, opt.state_dict):
        with pytest.raises(ValueError, match=r"the 8 parameters of param group 0 were replaced by"):
            call()
    # Undone it goes on.
    group["params"] = whole
    after = opt.state_dict()["state"]
    for number, state in before["state"].items():
        assert all(torch.equal(value, after[number][key]) for key, value in state.items())
    for p in whole:
        p.grad = torch.ones_like(p)
    opt.step()


def test_one_vector_for_another_is_no_partition():
    """A bias, or a parameter that was exchanged by hand, may be a vector."""
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4))]
    with pytest.warns(UserWarning, match="bare tensors"):
        opt = alrao.AlraoSGD(params, sampler=alrao.Constant(0.5))
    new = nn.Parameter(torch.zeros(4))
    opt.param_groups[0]["params"] = [new]
    new.grad = torch.ones(4)
    opt.step()
    assert new.tolist() == [-0.5] * 4


def test_wrappers_of_tensors():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(TwoTensor(torch.zeros(3, 4), torch.ones(3, 4)))
    with pytest.raises(TypeError, match=r"parameter 'weight' is a TwoTensor, a wrapper of other"):
        alrao.AlraoSGD(layer)
    layer.weight.requires_grad_(False)
    opt = alrao.AlraoSGD(layer)
    layer.weight.requires_grad_(True)
    layer.weight.grad = TwoTensor(torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"parameter 'weight' is a TwoTensor"):
        opt.step()
    assert not layer.weight.a.any()


def test_what_needs_whole_tensors(two_ranks):
    net = model()
    fully_shard(net)
    features, targets = torch.randn(4, 24), torch.zeros(4, dtype=torch.int64)
    head = net.head
    whole = {
        "clone_loss": lambda: head.clone_loss(features, lambda out: out.sum(-1)),
        "log_likelihood": lambda: head.log_likelihood(features, targets),
        "clone_outputs": lambda: head.clone_outputs(features),
        "loss": lambda: head(features, targets),
    }
    for call in whole.values():
        with pytest.raises(RuntimeError, match=r"weight: got a DTensor.*register_fsdp_forward"):
            call()
    for which in ("mixture", "best"):
        head.switch.t += 1
        with pytest.raises(
            RuntimeError, match=r"collapse: got a model that is sharded.*full_state"
        ):
            net.collapse(which, num_extras=0)
    bias = net.backbone[0].bias
    with pytest.raises(RuntimeError, match=r"feature_sgd_: params\[0\] is a DTensor"):
        alrao.functional.feature_sgd_([bias], [torch.zeros_like(bias)], [torch.ones(33)])
