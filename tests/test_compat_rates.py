"""Protects the small parts of compat: samplers and the grouping of rates, tied and wrapped parameters among them, the
functions of gen_hyper, layers and losses, early stopping, utilities.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alrao_fast.compat as alrao

SAMPLER = alrao.lr_sampler_generic(1e-5, 10.0)


def rates_of(module, generator=alrao.generator_randomlr_neurons):
    rates = list(generator(module, SAMPLER))
    params = list(module.parameters())
    assert [r.shape for r in rates] == [p.shape for p in params]
    return dict(zip(params, rates))


def by_row(rate):
    rows = rate.flatten(1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and rows[:, 0].unique().numel() == len(
        rows
    )
    return rows[:, 0]


def test_sampler():
    rates = SAMPLER(torch.empty(0, dtype=torch.float64), (20000,))
    assert rates.dtype == torch.float64 and 1e-5 <= rates.min() and rates.max() <= 10
    log = rates.log10()
    # Uniform on [-5, 1]: mean -2, standard deviation 6 / sqrt(12).
    assert abs(log.mean() + 2) < 0.06 and abs(log.std() - 3**0.5) < 0.03
    for bounds in ((0.0, 1.0), (1.0, 0.1), (1.0, math.inf)):
        with pytest.raises(ValueError, match="expected 0 < lo <= hi"):
            alrao.lr_sampler_generic(*bounds)


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(3, 4, 2)])
def test_rows_share_with_the_bias(layer):
    rates = rates_of(layer)
    assert torch.equal(by_row(rates[layer.weight]), rates[layer.bias])


def test_embedding_has_one_per_column():
    layer = nn.Embedding(7, 5)
    by_row(rates_of(layer)[layer.weight].t())


def test_lstm_has_one_per_row_of_each_matrix():
    layer = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    rates = rates_of(layer)
    vectors = set()
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        for part in ("ih", "hh"):
            row = by_row(rates[getattr(layer, f"weight_{part}_{suffix}")])
            assert torch.equal(row, rates[getattr(layer, f"bias_{part}_{suffix}")])
            vectors.add(row[0].item())
        vectors.add(by_row(rates[getattr(layer, f"weight_hr_{suffix}")])[0].item())
    assert len(vectors) == 12


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(6), nn.Conv1d(2, 3, 2), nn.GRU(2, 3)])
def test_every_other_parameter_has_one_per_entry(layer):
    rates = torch.cat([rate.flatten() for rate in rates_of(layer).values()])
    assert rates.unique().numel() == rates.numel()


def test_by_weight():
    net = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 2))
    rates = rates_of(net, alrao.generator_randomlr_weights)
    flat = torch.cat([rate.flatten() for rate in rates.values()])
    assert flat.unique().numel() == flat.numel()


def test_tied_and_shared_parameters():
    net = nn.Module()
    net.decoder, net.encoder = nn.Linear(5, 7), nn.Embedding(7, 5)
    net.shared = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3))
    net.shared[1] = net.shared[0]
    net.again = net.shared
    net.encoder.weight = net.decoder.weight
    rates = rates_of(net)
    assert len(rates) == 4
    assert torch.equal(by_row(rates[net.decoder.weight]), rates[net.decoder.bias])
    assert torch.equal(by_row(rates[net.shared[0].weight]), rates[net.shared[0].bias])


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore")
def test_weight_norm(wrap):
    layer = wrap(nn.Linear(3, 4))
    rates = rates_of(nn.Sequential(nn.Linear(2, 3), layer))
    own = [rates[p] for p in layer.parameters()]
    assert len(own) == 3 and all(
        torch.equal(by_row(r.view(4, -1)), own[0].view(4, -1)[:, 0]) for r in own
    )


def test_memo():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    memo = set(a.parameters())
    assert len(list(alrao.generator_randomlr_neurons(nn.Sequential(a, b), SAMPLER, memo))) == 2
    assert memo == {*a.parameters(), *b.parameters()}
    assert list(alrao.generator_randomlr_weights(b, SAMPLER, memo)) == []


def test_gen_hyper():
    like = torch.empty(3, 2, dtype=torch.float64)
    spread = alrao.fdet_lr_log(-3, 1)(like)
    torch.testing.assert_close(spread, torch.tensor([[1e-3] * 2, [1e-1] * 2, [10.0] * 2]).double())
    assert alrao.fdet_lr_log(-3, 1)(torch.empty(())).item() == pytest.approx(1e-3)
    assert alrao.fdet_lr_unif(0.5)(like).eq(0.5).all()
    value = alrao.frand_lr_log(-2, -1)(like)
    assert value.unique().numel() == 1 and 1e-2 <= value[0, 0] <= 1e-1
    assert alrao.fdet_mom_unif(0.9)(like).eq(0.9).all()
    assert alrao.fdet_mom_id(spread) is spread and alrao.fdet_mom_id()(spread) is spread


def test_layers():
    x = torch.randn(5, 4)
    layer = alrao.LinearClassifier(4, 3)
    torch.testing.assert_close(layer(x), F.log_softmax(x @ layer.fc.weight.t() + layer.fc.bias, 1))
    rnn = alrao.LinearClassifierRNN(4, 3)
    assert rnn(torch.randn(6, 2, 4)).shape == (12, 3)
    assert rnn.decoder.weight.abs().max() <= 0.1 and not rnn.decoder.bias.any()
    regressor = alrao.LinearRegressor(4, 2)
    assert regressor(x).shape == (5, 2)
    with pytest.raises(ValueError, match="LinearRegressor is not finite"):
        regressor(x * math.inf)


def test_losses_by_hand():
    out, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    # Squared errors 5 and 9.
    expected = 7 / (2 * 4) + 0.5 * math.log(2 * math.pi * 4)
    assert alrao.L2LossLog(sigma2=4.0)(out, target).item() == pytest.approx(expected)
    means, ps = torch.stack([out, target], -1), torch.tensor([0.25, 0.75])
    constant = math.sqrt(1 / (2 * math.pi))
    expected = -sum(math.log(constant * (0.25 * math.exp(-s / 2) + 0.75)) for s in (5.0, 9.0)) / 2
    loss = alrao.L2LossAdditional()((means, ps), target)
    assert loss.item() == pytest.approx(expected)
    assert alrao.L2LossAdditional()((means, torch.tensor([0.0, 1.0])), target).isfinite()
    for cls in (alrao.L2LossLog, alrao.L2LossAdditional):
        with pytest.raises(ValueError, match="sigma2: got 0"):
            cls(sigma2=0.0)


@pytest.mark.parametrize(
    ("options", "metrics", "stop"),
    [
        ({"patience": 1}, [1.0, 0.5, 0.6], False),
        ({"patience": 1}, [1.0, 0.5, 0.6, 0.55], True),
        ({"patience": 0, "threshold": 0.1}, [1.0, 0.95], True),
        ({"patience": 0, "threshold": 0.1}, [1.0, 0.85], False),
        ({"patience": 0, "threshold": 0.1, "threshold_mode": "abs"}, [10.0, 9.95], True),
        ({"patience": 0, "threshold": 0.1, "threshold_mode": "abs"}, [10.0, 9.85], False),
        ({"patience": 0, "mode": "max"}, [0.5, 0.6], False),
        ({"patience": 0, "mode": "max"}, [0.5, 0.4], True),
        ({"patience": 0}, [-1.0, -2.0], False),
        ({"patience": 0}, [math.nan], True),
    ],
)
def test_early_stopping(options, metrics, stop):
    first = alrao.EarlyStopping(**options)
    for metric in metrics[:-1]:
        first.step(metric)
    stopping = alrao.EarlyStopping()
    stopping.load_state_dict(first.state_dict())
    stopping.step(torch.tensor(metrics[-1]))
    assert stopping.stop is stop


def test_early_stopping_refuses_unknown_modes():
    with pytest.raises(ValueError, match="mode: got 'best'"):
        alrao.EarlyStopping(mode="best")
    with pytest.raises(ValueError, match="threshold_mode: got 'x'"):
        alrao.EarlyStopping(threshold_mode="x")


def test_utils(capsys):
    layer = nn.Linear(1, 2)
    nn.init.constant_(layer.weight, 3.0)
    nn.init.constant_(layer.bias, 0.0)
    alrao.utils.l2params(layer)
    assert capsys.readouterr().out.split() == ["weight:", "4.2426e+00", "bias:", "0.0000e+00"]
    subset = alrao.utils.Subset("abcdef", [4, 0])
    assert len(subset) == 2 and subset[0] + subset[1] == "ea"


def test_log_sum_exp():
    tensor = torch.randn(3, 4)
    torch.testing.assert_close(alrao.switch.log_sum_exp(tensor), tensor.exp().sum().log())
    torch.testing.assert_close(alrao.switch.log_sum_exp(tensor, 1), tensor.exp().sum(1).log())
