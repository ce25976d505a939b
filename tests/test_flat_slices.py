"""Protects what optimizers do with vectors that hold slices of parameters, as ZeRO and Megatron leave them.

- A slice that begins and ends anywhere is cut into runs whose entries have the rates that they have in the parameter.
- A partition with padding, over two parameters that share rates, in every layout, is updated as the whole parameters
  are: SGD, Adam, masters, averages, narrowed rates; padding is never written; states have the partition's shape.
- The optimizer is made before or after the flattening; momentum goes on; checkpoints are the partition's.
- Step counts are those of the state, also where that was written in place; a moved vector is bound anew.
- Stochastic rounding is unbiased, reproducible, and differs from run to run of entries.
- What does not fit is refused, and nothing is registered or written.
"""

import copy
import itertools

import pytest
import torch
from sharded_harness import made, model
from torch import nn

import alrao_fast as alrao
from alrao_fast.distributed import FlatSlice, register_flat_slices
from alrao_fast.optim.flat_layouts import runs

PADDING = 7.0


@pytest.mark.parametrize("inner", [1, 2, 3])
@pytest.mark.parametrize("period", [1, 2, 4])
@pytest.mark.parametrize("outer", [1, 3])
def test_runs(inner, period, outer):
    size = inner * period * outer
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        found, count = [], 0
        for run in runs(start, stop, inner, period):
            assert run.begin == start + len(found) < run.end
            own = [
                run.low + i // run.inner % (run.high - run.low) for i in range(run.end - run.begin)
            ]
            found += own
            count += 1
        assert found == [i // inner % period for i in range(start, stop)]
        assert count <= 5


class Layers(nn.Module):
    """A layer of every kind of layout: rows, columns, gates that share rates, a dimension in the middle."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.lstm = nn.LSTM(5, 3)
        self.convolution = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.linear = nn.Linear(4, 3)


def layers(dtype=torch.float32):
    torch.manual_seed(0)
    return Layers().to(dtype)


def partition(params, number, of, dtype=torch.float32):
    """One of equal parts of the parameters, flattened one after the other, with padding behind each and at the end."""
    filled = []
    for p in params:
        filled += [p.detach().flatten().to(dtype), torch.full((3,), PADDING, dtype=dtype)]
    whole = torch.cat(filled)
    size = -(-whole.numel() // of)
    whole = torch.cat([whole, torch.full((size * of - whole.numel(),), PADDING, dtype=dtype)])
    begin, flat = number * size, nn.Parameter(whole[number * size : (number + 1) * size].clone())
    slices, at = [], 0
    for p in params:
        start, stop = (min(max(k - at, 0), p.numel()) for k in (begin, begin + size))
        slices.append(FlatSlice(p, start, stop, max(at - begin, 0) if stop > start else 0))
        at += p.numel() + 3
    return flat, slices


def entries(flat, slices, value=None):
    """What a vector, or a state of it, has of each parameter."""
    value = flat if value is None else value
    return [value.detach()[s.at : s.at + s.stop - s.start] for s in slices]


def give(params, step, scale=1.0):
    for number, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + number)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * scale


def give_flat(flat, slices, step, garbage=5.0):
    """The same gradients, and any in the padding."""
    flat.grad = torch.full_like(flat, garbage)
    whole = [nn.Parameter(torch.empty(s.param.shape)) for s in slices]
    give(whole, step)
    for s, p in zip(slices, whole):
        flat.grad[s.at : s.at + s.stop - s.start] = p.grad.flatten()[s.start : s.stop].to(
            flat.dtype
        )


OPTIONS = {
    "momentum": {"averaging": 8.0},
    "amsgrad": {},
    "nesterov": {"sampler": alrao.PerWeight(1e-3, 0.1)},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("first", [True, False], ids=["optimizer first", "vectors first"])
def test_partitions(kind, first):
    whole = layers()
    expected = made(kind, whole, **OPTIONS[kind])
    params = list(whole.parameters())
    for number in range(3):
        net = layers()
        own = list(net.parameters())
        opt = made(kind, net, **OPTIONS[kind]) if first else None
        if first:
            give(own, 0)
            opt.step()
        flat, slices = partition(own, number, 3)
        if opt is None:
            register_flat_slices(flat, slices)
            opt = made(kind, [flat], model=net, **OPTIONS[kind])
        else:
            register_flat_slices(flat, [s for s in slices if s.stop > s.start])
            opt.param_groups[0]["params"] = [flat]
        for step in range(int(first), 4):
            give_flat(flat, slices, step)
            opt.step()
        if number == 0:
            for step in range(4):
                give(params, step)
                expected.step()
        state = opt.state[flat]
        for key, value in (("weight", flat), *state.items()):
            if value.shape != flat.shape or key in ("rate", "drawn_rate", "rate_limit"):
                continue
            of_whole = [p if key == "weight" else expected.state[p][key] for p in params]
            for found, p, s in zip(entries(flat, slices, value), of_whole, slices):
                at = p.detach().flatten()[s.start : s.stop]
                torch.testing.assert_close(found, at, rtol=0, atol=1e-6)
        assert int(state["step"]) == 4
        assert {k for k, v in state.items() if v.shape == flat.shape} >= set(opt._op.states[:1])
        padding = torch.ones(flat.shape, dtype=torch.bool)
        for s in slices:
            padding[s.at : s.at + s.stop - s.start] = False
        assert padding.any() and (flat.detach()[padding] == PADDING).all()


@pytest.mark.filterwarnings("ignore:ClassifierClones is trained without any observation")
def test_masters_and_narrowed_rates():
    whole, net = model(torch.bfloat16), model(torch.bfloat16)
    options = {"master_weights": True, "total_steps": 20}
    expected = made("adam", whole, **options)
    params = list(whole.parameters())
    flat, slices = partition(list(net.parameters()), 1, 2, torch.bfloat16)
    register_flat_slices(flat, slices)
    opt = made("adam", [flat], model=net, **options)
    assert torch.equal(net.head.clone_lr, whole.head.clone_lr)
    for step in range(4):
        give(params, step)
        expected.step()
        give_flat(flat, slices, step)
        opt.step()
        for o, n in ((expected, whole), (opt, net)):
            n.head.switch.update(torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0]))
            o.anneal_rates(step / 4)
    for key in ("master", "exp_avg", "average"):
        for found, p, s in zip(entries(flat, slices, opt.state[flat][key]), params, slices):
            torch.testing.assert_close(
                found, expected.state[p][key].flatten()[s.start : s.stop], rtol=0, atol=1e-6
            )
    with opt.averaged():
        for found, p, s in zip(entries(flat, slices), params, slices):
            average = expected.state[p]["average"].flatten()[s.start : s.stop]
            assert torch.equal(found, average.bfloat16())
    assert torch.equal(net.head.clone_lr, whole.head.clone_lr)


def test_checkpoints():
    net = model()
    flat, slices = partition(list(net.parameters()), 1, 2)
    register_flat_slices(flat, slices)
    opt = made("amsgrad", [flat], model=net)
    give_flat(flat, slices, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    begun = flat.detach().clone()
    found = []
    for seed in (1, 2):
        own = nn.Parameter(begun.clone())
        register_flat_slices(own, slices)
        again = made("amsgrad", [own], model=net, seed=seed)
        again.load_state_dict(saved)
        for step in (1, 2):
            give_flat(own, slices, step)
            again.step()
        found.append(own.detach())
    assert torch.equal(*found)


def test_counts_and_memory():
    net = model()
    flat, slices = partition(list(net.parameters()), 1, 2)
    register_flat_slices(flat, slices)
    opt = made("adam", [flat], model=net, warmup_steps=10)
    for step in range(2):
        give_flat(flat, slices, step)
        opt.step()
    other, copied = copy.deepcopy(flat), copy.deepcopy(opt.state_dict())
    register_flat_slices(other, slices)
    again = made("adam", [other], model=net, warmup_steps=10)
    copied["state"][0]["step"] = torch.tensor(7)
    again.load_state_dict(copied)
    # In place, and into other memory.
    opt.state[flat]["step"].fill_(7)
    flat.data = flat.detach().clone()
    for o, p in ((opt, flat), (again, other)):
        give_flat(p, slices, 2)
        o.step()
    assert torch.equal(flat, other)
    assert int(opt.state[flat]["step"]) == 8


def test_stochastic_rounding():
    torch.manual_seed(0)
    param = nn.Parameter(torch.empty(4, 1000))
    found = []
    for _ in range(2):
        flat = nn.Parameter(torch.ones(3500, dtype=torch.bfloat16))
        register_flat_slices(flat, [FlatSlice(param, 250, 3750)])
        with pytest.warns(UserWarning, match="bare tensors"):
            opt = alrao.AlraoSGD(
                [flat], sampler=alrao.Constant(1e-3), generator=torch.Generator().manual_seed(0)
            )
        flat.grad = torch.ones_like(flat)
        opt.step()
        found.append(flat.detach())
    assert torch.equal(*found)
    moved = (found[0] < 1).float()
    # 1 - 1e-3 lies a quarter of the way to the next number.
    assert 0.2 < moved.mean() < 0.31
    assert not torch.equal(moved[750:1750], moved[1750:2750])
    assert not torch.equal(moved[:750], moved[750:1500])


def test_what_slices_may_be():
    param, flat = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(10))
    refused = [
        (
            (nn.Parameter(torch.zeros(2, 5)), []),
            ValueError,
            r"flat: got a tensor of shape \[2, 5\]",
        ),
        (
            (torch.zeros(20)[::2], []),
            ValueError,
            r"flat: got a tensor .* strides \[2\], expected a cont",
        ),
        (("flat", []), TypeError, r"flat: got 'flat', expected a tensor"),
        ((flat, FlatSlice(param)), TypeError, r"slices: got .* expected an iterable of FlatSlice"),
        ((flat, [(param, 0, 3)]), TypeError, r"slices\[0\]: got .* expected FlatSlice"),
        (
            (flat, [FlatSlice(param)]),
            ValueError,
            r"slices\[0\]: got 12 entries at 0, .* vector's 10",
        ),
        ((flat, [FlatSlice(param, 5, 13)]), ValueError, r"entries 5 to 13 .*\[3, 4\].* <= 12"),
        ((flat, [FlatSlice(param, 5, 4)]), ValueError, r"entries 5 to 4"),
        ((flat, [FlatSlice(param, 0, 2.0)]), TypeError, r"slices\[0\]\.stop: got 2\.0"),
        ((flat, [FlatSlice(param, 0, 4, 7)]), ValueError, r"got 4 entries at 7"),
        ((flat, [FlatSlice(flat, 0, 4)]), ValueError, r"got the vector itself"),
        (
            (flat, [FlatSlice(param, 0, 4), FlatSlice(param, 4, 6, 3)]),
            ValueError,
            r"slices\[1\]: got entries at 3, which slices\[0\] reaches up to 4",
        ),
        ((flat, [], "group"), TypeError, r"process_group: got 'group', expected a process group"),
    ]
    for arguments, error, message in refused:
        with pytest.raises(error, match=message):
            register_flat_slices(*arguments)
    net = nn.Linear(4, 3)
    opt = made("momentum", net)
    opt.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    with pytest.raises(ValueError, match="register_flat_slices has been told what they hold"):
        opt.step()
    assert not flat.any()


def test_what_optimizers_refuse():
    net = model()
    params = list(net.parameters())
    flat, slices = partition(params, 0, 1)
    register_flat_slices(flat, slices)
    with pytest.raises(ValueError, match="clones and other parameters in one flat vector"):
        alrao.AlraoSGD([flat], model=net, momentum=0.9, momentum_rule="authors")
    opt = made("momentum", [flat], model=net)
    give_flat(flat, slices, 0)
    for call in (alrao.clip_grad_norm_, alrao.grad_norms):
        with pytest.raises(RuntimeError, match="is that of a flat shard, whose norm other ranks"):
            call([flat]) if call is alrao.grad_norms else call([flat], 1.0)
    before = flat.detach().clone()
    flat.grad = None
    flat.data = torch.zeros(5)
    flat.grad = torch.zeros(5)
    with pytest.raises(RuntimeError, match="which its learning rates and states were not made"):
        opt.step()
    flat.data = before
    # Of other ages.
    net = nn.Linear(4, 3)
    opt = made("momentum", net)
    net.weight.grad = torch.ones_like(net.weight)
    opt.step()
    flat, slices = partition(list(net.parameters()), 0, 1)
    register_flat_slices(flat, slices)
    opt.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="have taken other numbers of steps"):
        opt.refresh()


def test_what_is_told_of_vectors():
    net = model()
    whole = made("momentum", net)
    rows = alrao.describe_rates(whole, file=None)
    flat, slices = partition(list(net.parameters()), 1, 2)
    register_flat_slices(flat, slices)
    opt = made("momentum", [flat], model=net)
    assert alrao.describe_rates(opt, file=None) == rows
