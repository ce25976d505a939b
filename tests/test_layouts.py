"""Feature layouts: which entries share a rate. Protects:

- every row of the design's table, entry by entry, for every dense order of the dimensions in memory (contiguous,
  channels_last, transposed): the features that the kernels would read against those written out by hand;
- which parameters of a module share one vector: weight and bias, an LSTM's matrices and biases, tied parameters;
- modules registered by the user, found through the base class, and the messages when a rule does not fit;
- no parameter without a rate or with one of the wrong shape, for random module trees (hypothesis);
- lazy modules and non-dense parameters are refused with the cure.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from layout_harness import features, table, trees
from torch import nn

from alrao_fast.optim import Feature, register_feature_layout
from alrao_fast.optim.layouts import memory_rates, resolve_all


def memory_orders(param: torch.Tensor):
    """The parameter's shape with every order of the dimensions in memory."""
    for order in itertools.permutations(range(param.dim())):
        inverse = [order.index(d) for d in range(param.dim())]
        yield torch.empty([param.size(d) for d in order]).permute(inverse)


def along(shape, dim: int, period: int | None = None) -> torch.Tensor:
    """Entry [.., k, ..] has the feature k (modulo the period)."""
    index = torch.arange(shape[dim]) % (period or shape[dim])
    return index.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def by_row(shape):
    return along(shape, 0)


def grouped(shape, groups: int) -> torch.Tensor:
    """The output channel of a transposed convolution's weight [I, O/groups, ...], entry by entry."""
    out = torch.empty(shape, dtype=torch.int64)
    for i in range(shape[0]):
        for j in range(shape[1]):
            out[i, j] = i // (shape[0] // groups) * shape[1] + j
    return out


# module, {parameter: features by hand}, {vector: parameters that share it}
TABLE = {
    "linear": (nn.Linear(3, 4), {"weight": by_row, "bias": by_row}),
    "conv1d": (nn.Conv1d(2, 3, 2), {"weight": by_row, "bias": by_row}),
    "conv2d": (nn.Conv2d(2, 3, (2, 4)), {"weight": by_row, "bias": by_row}),
    "conv3d": (nn.Conv3d(2, 3, 2, bias=False), {"weight": by_row}),
    "grouped conv": (nn.Conv2d(4, 6, 3, groups=2), {"weight": by_row, "bias": by_row}),
    "depthwise conv": (nn.Conv2d(4, 4, 3, groups=4), {"weight": by_row, "bias": by_row}),
    "transposed conv1d": (
        nn.ConvTranspose1d(2, 3, 2),
        {"weight": lambda s: along(s, 1), "bias": by_row},
    ),
    "transposed conv2d": (
        nn.ConvTranspose2d(2, 3, 2),
        {"weight": lambda s: along(s, 1), "bias": by_row},
    ),
    "transposed conv3d": (
        nn.ConvTranspose3d(3, 2, 2),
        {"weight": lambda s: along(s, 1), "bias": by_row},
    ),
    "grouped transposed conv": (
        nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
        {"weight": lambda s: grouped(s, 2), "bias": by_row},
    ),
    "depthwise transposed conv": (
        nn.ConvTranspose1d(4, 4, 3, groups=4),
        {"weight": lambda s: grouped(s, 4), "bias": by_row},
    ),
    "embedding": (nn.Embedding(5, 3), {"weight": lambda s: along(s, 1)}),
    "embedding bag": (nn.EmbeddingBag(5, 3), {"weight": lambda s: along(s, 1)}),
    "lstm cell": (
        nn.LSTMCell(2, 3),
        {n: lambda s: along(s, 0, 3) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    ),
    "gru": (
        nn.GRU(2, 3, bias=False),
        {n: lambda s: along(s, 0, 3) for n in ("weight_ih_l0", "weight_hh_l0")},
    ),
    "projected lstm": (
        nn.LSTM(2, 4, proj_size=3),
        {
            **{
                f"{n}_l0": lambda s: along(s, 0, 4)
                for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            },
            "weight_hr_l0": by_row,
        },
    ),
    "attention": (
        nn.MultiheadAttention(4, 2),
        {
            "in_proj_weight": by_row,
            "in_proj_bias": by_row,
            "out_proj.weight": by_row,
            "out_proj.bias": by_row,
        },
    ),
    "attention, own key and value sizes": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        {
            "q_proj_weight": by_row,
            "k_proj_weight": lambda s: by_row(s) + 4,
            "v_proj_weight": lambda s: by_row(s) + 8,
            "in_proj_bias": by_row,
            "bias_k": lambda s: along(s, 2) + 4,
            "bias_v": lambda s: along(s, 2) + 8,
            "out_proj.weight": by_row,
            "out_proj.bias": by_row,
        },
    ),
    "batch norm": (nn.BatchNorm2d(3), {"weight": by_row, "bias": by_row}),
    "group norm": (nn.GroupNorm(2, 4), {"weight": by_row, "bias": by_row}),
    "instance norm": (
        nn.InstanceNorm1d(3, affine=True),
        {"weight": by_row, "bias": by_row},
    ),
    "layer norm": (nn.LayerNorm(3), {"weight": by_row, "bias": by_row}),
    "layer norm over two dimensions": (
        nn.LayerNorm([2, 3]),
        dict.fromkeys(("weight", "bias"), lambda s: torch.arange(6).view(s)),
    ),
    "rms norm": (nn.RMSNorm(3), {"weight": by_row}),
    "norm without affine": (nn.BatchNorm1d(3, affine=False), {}),
    "bilinear": (nn.Bilinear(2, 3, 4), {"weight": by_row, "bias": by_row}),
    "prelu": (nn.PReLU(3), {"weight": by_row}),
    "one slope": (nn.PReLU(), {"weight": by_row}),
    "one feature": (nn.Linear(3, 1), {"weight": by_row, "bias": by_row}),
    "one input": (nn.Conv2d(1, 3, 1), {"weight": by_row, "bias": by_row}),
}


@pytest.mark.parametrize("case", TABLE)
def test_table(case):
    module, expected = TABLE[case]
    layouts, params = table(module), dict(module.named_parameters())
    assert set(layouts) == set(expected) == set(params)
    for name, by_hand in expected.items():
        assert layouts[name].rule == "built-in"
        for stand_in in memory_orders(params[name]):
            actual = features(stand_in, layouts[name])
            assert torch.equal(actual, by_hand(tuple(stand_in.shape))), (name, stand_in.stride())


def test_by_hand_channels_last():
    conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    layout = table(conv)["weight"]
    rates, inner = memory_rates(torch.tensor([0.1, 0.2, 0.3]), conv.weight, layout.dims)
    # Strides (8, 1, 4, 2): a filter is 8 entries in a row. A transposed one would have inner 1.
    assert inner == 8 and rates.tolist() == pytest.approx([0.1, 0.2, 0.3])
    transposed = torch.empty(2, 2, 2, 3).permute(3, 0, 1, 2)
    assert memory_rates(rates, transposed, layout.dims)[1] == 1


def test_compact_rates_are_not_copied():
    for module in (nn.Linear(3, 4), nn.Conv2d(2, 3, 3), nn.Embedding(4, 3), nn.LayerNorm([2, 3])):
        for param, layout in resolve_all([module]).items():
            vector = torch.ones(layout.vector.length)
            assert memory_rates(vector, param, layout.dims)[0].data_ptr() == vector.data_ptr()


def test_shared_vectors():
    lstm = table(nn.LSTM(2, 3, num_layers=2, bidirectional=True, proj_size=2))
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        shared = {
            lstm[f"{n}_{suffix}"].vector for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        assert len(shared) == 1
    assert len({layout.vector for layout in lstm.values()}) == 8
    for module in (
        nn.Linear(3, 4),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.BatchNorm1d(3),
        nn.LayerNorm(3),
    ):
        layouts = table(module)
        assert layouts["weight"].vector is layouts["bias"].vector
    attention = table(nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True))
    assert attention["k_proj_weight"].vector is attention["in_proj_bias"].vector
    assert attention["out_proj.weight"].vector is not attention["in_proj_bias"].vector


def test_subclass_of_linear():
    # MultiheadAttention's out_proj is one.
    class Special(nn.Linear):
        def __init__(self):
            super().__init__(3, 4)
            self.scale = nn.Parameter(torch.ones(7, 2))

    layouts = table(Special())
    assert layouts["weight"].vector is layouts["bias"].vector
    assert layouts["scale"].rule == "default" and layouts["scale"].vector.length == 7


def test_subclass_with_another_shape():
    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(3, 4)
            self.weight = nn.Parameter(torch.zeros(12))
            self.bias = nn.Parameter(torch.zeros(4))

    layouts = table(Packed())
    assert layouts["weight"].vector.length == 12
    assert layouts["bias"].rule == "default" and layouts["bias"].vector.length == 4


def test_tied_parameters():
    class Tied(nn.Module):
        def __init__(self, encoder_first):
            super().__init__()
            encoder, decoder = nn.Embedding(5, 3), nn.Linear(3, 5)
            decoder.weight = encoder.weight
            first, second = (encoder, decoder) if encoder_first else (decoder, encoder)
            self.first, self.again, self.second = first, first, second

    for encoder_first, length in ((True, 3), (False, 5)):
        model = Tied(encoder_first)
        layouts = resolve_all([model])
        weight = model.first.weight
        assert len(layouts) == len(list(model.parameters())) == 2
        assert layouts[weight].vector.length == length
        assert layouts[weight].name == "first.weight"
        reverse = {p: layouts[p] for p in reversed(list(model.parameters()))}
        assert features(weight, reverse[weight]).equal(along((5, 3), int(encoder_first)))


class Dense(nn.Module):
    def __init__(self, *, bias=True):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(3, 4))
        self.bias = nn.Parameter(torch.zeros(4)) if bias else None
        self.temperature = nn.Parameter(torch.zeros(()))


@pytest.fixture
def dense_rule():
    def register(rule):
        register_feature_layout(Dense, rule)

    yield register
    register_feature_layout(Dense, None)


def test_unknown_module():
    layouts = table(Dense())
    assert all(layout.rule == "default" for layout in layouts.values())
    assert layouts["kernel"].vector.length == 3 and layouts["temperature"].vector.length == 1
    assert layouts["kernel"].vector is not layouts["bias"].vector


def test_registered_rule(dense_rule):
    class Derived(Dense):
        pass

    dense_rule(lambda m: {"kernel": Feature(dim=-1), "bias": Feature()})
    for module in (Dense(), Derived(), nn.Sequential(Derived(bias=False))[0]):
        layouts = table(module)
        assert layouts["kernel"].rule == "registered" and layouts["kernel"].dims == (1,)
        assert layouts["temperature"].rule == "default"
        if module.bias is not None:
            assert layouts["kernel"].vector is layouts["bias"].vector
    register_feature_layout(Derived, lambda m: {"kernel": Feature(dim=())})
    assert table(Derived())["kernel"].vector.length == 1
    register_feature_layout(Derived, None)
    assert table(Derived())["kernel"].vector.length == 4


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"kernel": Feature(dim=2)}, "kernel' of shape .3, 4.: dim 2 is out of range"),
        ({"kernel": Feature(dim=(1, 0))}, "not ascending"),
        ({"kernel": Feature(num_features=2)}, "2 features do not divide the size 3"),
        ({"kernel": Feature(), "bias": Feature()}, "'out' has 3 feature rates, this needs 4"),
        ({"kernel": Feature(feature_of=torch.arange(3))}, "needs num_features"),
        (
            {"kernel": Feature(num_features=2, feature_of=torch.arange(3))},
            r"must lie in \[0, 2\)",
        ),
        ({"kernel": Feature(num_features=3, feature_of=torch.arange(2))}, r"int64 of shape \[3\]"),
        ({"kernal": Feature()}, "names the parameter 'kernal', which the module does not have"),
    ],
)
def test_rule_that_does_not_fit(dense_rule, rule, message):
    dense_rule(lambda m: rule)
    with pytest.raises(ValueError, match=message):
        resolve_all([nn.Sequential(Dense())])


def test_invalid_registration():
    with pytest.raises(TypeError, match=r"expected a subclass of torch\.nn\.Module"):
        register_feature_layout(torch.Tensor, lambda m: {})
    with pytest.raises(TypeError, match="expected a function of the module"):
        register_feature_layout(Dense, 3)


def test_lazy_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"'0.weight' of LazyLinear is uninitialized: run one batch"
    ):
        resolve_all([model])
    model(torch.zeros(2, 3))
    assert table(model)["0.weight"].vector.length == 4


@pytest.mark.parametrize(
    "param", [torch.empty(10)[::2], torch.empty(3, 1).expand(3, 4), torch.empty(4, 4)[:, :2]]
)
def test_memory_with_gaps_or_overlap(param):
    with pytest.raises(ValueError, match="expected dense, non-overlapping memory"):
        memory_rates(torch.ones(param.size(0)), param, (0,), "p")


def test_draw_order():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 5)))
    names = [layout.name for layout in resolve_all([model]).values()]
    assert names == [name for name, _ in model.named_parameters()]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees())
def test_every_parameter_has_a_rate_of_the_right_shape(model):
    layouts = resolve_all([model])
    assert set(layouts) == set(model.parameters())
    vectors = {}
    for param, layout in layouts.items():
        vectors.setdefault(layout.vector.name, layout.vector)
        assert vectors[layout.vector.name] is layout.vector
        rate = layout.rates(torch.rand(layout.vector.length))
        assert rate.shape == (layout.length(param),)
        rates, inner = memory_rates(rate, param, layout.dims)
        assert inner >= 1 and rates.dim() == 1 and rates.is_contiguous()
        assert param.numel() % (inner * rates.numel()) == 0 or rates.numel() == 1
        by_entry = features(param, layout)
        # Every rate of the vector that this parameter holds is used, equally often.
        counts = torch.bincount(by_entry.flatten(), minlength=layout.vector.length)
        assert set(counts[counts > 0].tolist()) == {param.numel() // int((counts > 0).sum())}
        single = layout.per_entry(param)
        assert features(param, single).equal(torch.arange(param.numel()).view(param.shape))


@pytest.mark.parametrize(
    ("shape", "dim", "rule"),
    [
        ((1, 1, 5), 2, "shape"),
        ((1, 7, 5), 2, "shape"),
        ((1, 5, 1, 1), 1, "shape"),
        ((1, 3, 4, 4), 1, "shape"),
        ((1, 4, 4, 3), 3, "shape"),
        ((1, 2, 3, 5), 3, "shape"),
        ((1, 1), 0, "shape"),
        ((5, 1, 1), 0, "default"),
        ((5, 3), 0, "default"),
        ((5,), 0, "default"),
    ],
    ids=str,
)
def test_a_parameter_that_is_broadcast(shape, dim, rule):
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(shape))

    layout = table(Scales())["scale"]
    assert (layout.rule, layout.dims, layout.vector.length) == (rule, (dim,), shape[dim])
