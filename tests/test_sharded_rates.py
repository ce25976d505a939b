"""Protects the rates of sharded parameters (DTensors) without any communication: on every rank of a mesh of four, for
every placement that torch makes, the entries that are there have the rates that their places in the whole have.

- One dimension, several, a vector that repeats (an LSTM's gates), none; uneven and empty shards, replicas, FSDP on top
  of tensor parallelism (strided shards), a local tensor in another memory order.
- Slices are views, so that rates filled in place count; states are placed as their parameter, with its local strides.
- Replicas round with the same bits, other parts with other ones; what is no range of the whole is refused.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from alrao_fast import AlraoSGD, sharding
from alrao_fast.optim.binding import _in_memory
from alrao_fast.optim.layouts import Layout, Vector

tensor = pytest.importorskip("torch.distributed.tensor")
placement_types = pytest.importorskip("torch.distributed.tensor.placement_types")
debug = pytest.importorskip("torch.distributed.tensor.debug")
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
Shard, Replicate, Strided = tensor.Shard, tensor.Replicate, placement_types._StridedShard

LINE, SQUARE = (4,), (2, 2)
PLACEMENTS = {
    "rows": (LINE, (Shard(0),)),
    "columns": (LINE, (Shard(1),)),
    "last": (LINE, (Shard(2),)),
    "replicas": (LINE, (Replicate(),)),
    "replicas of rows": (SQUARE, (Replicate(), Shard(0))),
    "rows and columns": (SQUARE, (Shard(0), Shard(1))),
    "rows twice": (SQUARE, (Shard(0), Shard(0))),
    "fsdp over tensor parallel": (SQUARE, (Strided(0, split_factor=2), Shard(0))),
    "fsdp over columns": (SQUARE, (Strided(1, split_factor=2), Shard(1))),
}
# Shape, the dimensions that the rates run along, how many rates there are.
CASES = {
    "rows": ((8, 4, 4), (0,), 8),
    "uneven rows": ((7, 4, 4), (0,), 7),
    "empty shards": ((2, 4, 4), (0,), 2),
    "columns": ((8, 12, 4), (1,), 12),
    "gates": ((16, 4, 4), (0,), 4),
    "gates across shards": ((12, 4, 4), (0,), 6),
    "one rate": ((8, 4, 4), (), 1),
    "neighbours": ((8, 4, 4), (0, 1), 32),
    "apart": ((8, 4, 4), (0, 2), 32),
    "each entry": ((8, 4, 4), (0, 1, 2), 128),
}


@pytest.fixture(params=range(4))
def rank(request):
    """A rank of four without the others."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=request.param, world_size=4)
    # Of operators on meshes of another rank.
    debug._clear_sharding_prop_cache()
    yield request.param
    dist.destroy_process_group()


def mesh_of(shape):
    return dist.device_mesh.init_device_mesh("cpu", shape)


def expanded(rate, shape, dims):
    """The rate of every entry, from the definition."""
    places = torch.zeros(shape, dtype=torch.int64)
    for dim in dims:
        index = torch.arange(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
        places = places * shape[dim] + index
    return rate[places % rate.numel()]


def placed(whole, mesh, placements):
    return tensor.distribute_tensor(whole, mesh, placements, src_data_rank=None)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_entries_have_the_rates_of_their_places(rank, placement):
    shape_of_mesh, placements = PLACEMENTS[placement]
    mesh = mesh_of(shape_of_mesh)
    for name, (shape, dims, count) in CASES.items():
        if placement.startswith("fsdp") and shape[0] % 4:
            # Here distribute_tensor itself places other entries than fully_shard does.
            continue
        rate = torch.rand(count)
        expected = placed(expanded(rate, shape, dims), mesh, placements)
        param = placed(torch.zeros(shape), mesh, placements)
        layout = Layout(name, "", "", dims, Vector(name, count, "feature"))
        rates, inner = _in_memory(rate, param, layout)
        here = sharding.local(expected)
        entries = torch.arange(here.numel())
        own = rates[(entries // inner) % rates.numel()]
        assert torch.equal(own, here.flatten()), name
        spans = sharding.spans(param)
        assert [stop - start for start, stop in spans] == list(here.shape) or not here.numel(), name


def test_uneven_strided_shards_are_cut_as_fully_shard_cuts(rank):
    """Seven rows: tensor parallelism has 4 and 3 of them, FSDP half of each."""
    mesh = mesh_of(SQUARE)
    rows = [(0, 2), (4, 6), (2, 4), (6, 7)][rank]
    part = torch.zeros(rows[1] - rows[0], 3)
    param = tensor.DTensor.from_local(
        part,
        mesh,
        (Strided(0, split_factor=2), Shard(0)),
        run_check=False,
        shape=(7, 3),
        stride=(3, 1),
    )
    assert sharding.spans(param) == [rows, (0, 3)]


def test_other_memory_orders(rank):
    mesh = mesh_of(LINE)
    rate, whole = torch.rand(3), torch.zeros(8, 3, 2, 2)
    part = placed(whole, mesh, (Shard(0),)).to_local().to(memory_format=torch.channels_last)
    param = tensor.DTensor.from_local(part, mesh, (Shard(0),), run_check=False)
    layout = Layout("map", "", "", (1,), Vector("map", 3, "feature"))
    rates, inner = _in_memory(rate, param, layout)
    assert (rates.tolist(), inner) == (rate.tolist(), 1)
    state = sharding.like(None, param, torch.float32)
    assert sharding.local(state).stride() == part.stride() != torch.zeros(2, 3, 2, 2).stride()


def test_slices_are_views(rank):
    mesh = mesh_of(LINE)
    param = placed(torch.zeros(8, 4), mesh, (Shard(0),))
    rate = torch.rand(8)
    own = sharding.local_rates(rate, param, (0,))
    rate.fill_(0.5)
    assert own.tolist() == [0.5, 0.5]


def test_states_are_placed_as_their_parameter(rank):
    mesh = mesh_of(SQUARE)
    placements = (Strided(0, split_factor=2), Shard(0))
    whole = torch.arange(24.0).view(8, 3)
    param = placed(whole, mesh, placements)
    for stored in (whole, param.detach()):
        state = sharding.like(stored, param, torch.bfloat16)
        assert (state.device_mesh, state.placements) == (mesh, placements)
        assert (state.shape, state.dtype) == (param.shape, torch.bfloat16)
        assert torch.equal(sharding.local(state), sharding.local(param).bfloat16())
        assert sharding.like(state, param, torch.bfloat16) is state


def test_seeds_of_rounding(rank):
    """Replicas have the same, parts another each, the first part that of the whole."""
    seeds = {}
    for placement, (shape, placements) in PLACEMENTS.items():
        param = placed(torch.zeros(8, 8, 8), mesh_of(shape), placements)
        starts = tuple(start for start, _ in sharding.spans(param))
        seeds[placement] = sharding.local_seed(5, param), starts
    assert seeds["replicas"][0] == 5
    assert len({seed for seed, _ in seeds.values()}) == len(
        {starts for _, starts in seeds.values()}
    )
    for seed, starts in seeds.values():
        assert (seed == 5) == (starts == (0, 0, 0))
        assert 0 <= seed < 2**63


def test_what_is_no_range_is_refused(rank):
    mesh = mesh_of(SQUARE)
    layer = nn.Linear(4, 8)
    partial = tensor.DTensor.from_local(
        torch.zeros(8, 4), mesh, (tensor.Partial(), Replicate()), run_check=False
    )
    strided = placed(torch.zeros(8, 4), mesh, (Strided(0, split_factor=4), Replicate()))
    for placed_param, named in ((partial, "Partial"), (strided, "_StridedShard")):
        layer.weight = nn.Parameter(placed_param)
        with pytest.raises(
            ValueError, match=rf"parameter 'weight' is placed as {named}.*expected Shard or"
        ):
            AlraoSGD(layer)
