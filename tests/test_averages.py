"""Running averages and warm-up of AlraoSGD and AlraoAdam. Protects, on every backend:

- a step with both is torch's optimizer under a linear LambdaLR, and its average torch's own AveragedModel;
- `averaged()`: what it shows, clones too, and that parameters, masters and BatchNorm come back bit for bit;
- averages that are switched off and on again begin anew;
- checkpoints with averages, older ones without; parameters of low precision, compiled steps, skipped steps;
- momentum that is normalised: torch.optim.SGD at a tenth of the rate.
"""

import copy
import itertools
import warnings

import pytest
import torch
from checkpoint_harness import assert_same_state, build, generator, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from alrao_fast import AlraoAdam, AlraoModel, AlraoMuon, AlraoSGD, ClassifierClones, Constant

OP = "feature_adam"
pytestmark = pytest.mark.usefixtures("used_backend")
KINDS = {
    "sgd": (AlraoSGD, torch.optim.SGD, {"momentum": 0.9}),
    "adam": (AlraoAdam, torch.optim.Adam, {}),
}


def net(device, dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(device, dtype)


def give_gradients(step, *models):
    for k, params in enumerate(zip(*(model.parameters() for model in models))):
        torch.manual_seed(100 * step + k)
        grad = torch.randn(params[0].shape, dtype=torch.float64)
        for param in params:
            param.grad = grad.to(param)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_with_a_scheduler_and_an_averaged_model(backend, device, kind):
    ours_type, theirs_type, options = KINDS[kind]
    ours, theirs = net(device), net(device)
    rate = float(torch.tensor(0.02))
    opt = ours_type(ours, sampler=Constant(rate), warmup_steps=4, averaging=3.0, **options)
    other = theirs_type(theirs.parameters(), lr=rate, foreach=False, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(other, lambda step: min(1, (step + 1) / 4))

    def polynomial(average, value, count):
        return average + 4 / (int(count) + 4) * (value - average)

    expected = AveragedModel(theirs, avg_fn=polynomial)
    for step in range(7):
        give_gradients(step, ours, theirs)
        opt.step()
        other.step()
        scheduler.step()
        expected.update_parameters(theirs)
    close = {"rtol": 1e-11, "atol": 1e-12}
    for mine, yours, mean in zip(ours.parameters(), theirs.parameters(), expected.parameters()):
        torch.testing.assert_close(mine, yours, **close)
        torch.testing.assert_close(opt.state[mine]["average"], mean, **close)
    before = [p.detach().clone() for p in ours.parameters()]
    with opt.averaged():
        for mine, mean in zip(ours.parameters(), expected.parameters()):
            torch.testing.assert_close(mine, mean, **close)
    assert all(map(torch.equal, before, ours.parameters()))


@pytest.mark.parametrize("kind", [AlraoSGD, AlraoAdam, AlraoMuon])
def test_averages_switched_off_and_on_begin_anew(backend, device, kind):
    """As they do where there were none before: what they held then is no average of the steps since."""
    model = net(device)
    opt = kind(model, averaging=3.0)
    for step in range(8):
        for group in opt.param_groups:
            group["averaging"] = None if 3 <= step < 6 else 3.0
        before = [p.detach().clone() for p in model.parameters()]
        give_gradients(step, model)
        opt.step()
        assert all(
            ("average" in opt.state[p]) == (step < 3 or step > 5) for p in model.parameters()
        )
        if step == 6:
            for param, old in zip(model.parameters(), before):
                expected = old + 4 / (6 + 4) * (param - old)
                torch.testing.assert_close(opt.state[param]["average"], expected)


def test_the_average_of_low_precision_is_that_of_float32(backend, device):
    """Masters: the average is that of the masters, and they are what they were after `averaged()`."""
    ours, theirs = net(device, torch.float32).bfloat16(), net(device, torch.float32).bfloat16()
    theirs = theirs.float()
    options = {"averaging": 8.0, "sampler": Constant(0.01)}
    opt, other = AlraoAdam(ours, master_weights=True, **options), AlraoAdam(theirs, **options)
    for step in range(5):
        give_gradients(step, ours, theirs)
        for mine, yours in zip(ours.parameters(), theirs.parameters()):
            yours.grad.copy_(mine.grad)
        opt.step()
        other.step()
        if step == 2:
            with opt.averaged():
                assert all(p.dtype == torch.bfloat16 for p in ours.parameters())
    for mine, yours in zip(ours.parameters(), theirs.parameters()):
        average = opt.state[mine]["average"]
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, other.state[yours]["average"], rtol=1e-5, atol=1e-6)
        with opt.averaged():
            assert torch.equal(mine, average.bfloat16())


def clones(seed=0):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    return AlraoModel(backbone, ClassifierClones(8, 3, num_clones=4))


def data(count):
    drawn = generator(9)
    for _ in range(count):
        yield torch.randn(10, 6, generator=drawn), torch.randint(3, (10,), generator=drawn)


def test_statistics_of_other_weights_are_told_of():
    model, opt = trained(20)
    with (
        pytest.warns(UserWarning, match=r"averaged\(net, loader\) estimates them") as found,
        opt.averaged(),
    ):
        model.eval()(torch.randn(2, 6))
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opt.averaged():
            update_bn(data(10), model)
        with opt.averaged(), torch.no_grad():
            model.train()(torch.randn(20, 6))
        model.backbone[1].requires_grad_(False)
        with opt.averaged():
            model.eval()(torch.randn(2, 6))


def test_statistics_of_batch_normalisation():
    model, opt = trained(20)
    expected = copy.deepcopy(model)
    for p, q in zip(expected.parameters(), model.parameters()):
        p.data.copy_(opt.state[q]["average"])
    update_bn(data(10), expected)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    with opt.averaged(model, itertools.islice(data(30), 10)):
        assert not model.training
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        with pytest.raises(RuntimeError, match=r"step\(\) within averaged"):
            opt.step()
        with pytest.raises(RuntimeError, match="within averaged"), opt.averaged():
            pass
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    opt.step()


def test_an_error_within_restores():
    model, opt = trained()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), opt.averaged():
        assert not all(map(torch.equal, before, model.parameters()))
        raise ZeroDivisionError
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(TypeError), opt.averaged(model, 3):
        pass
    assert all(map(torch.equal, before, model.parameters()))
    opt.step()


def frozen_norm(model):
    """As detectors freeze it: in evaluation mode whatever the model's."""
    norm = model.backbone[1]
    norm.running_mean.fill_(0.25)

    def train(mode=True):
        nn.Sequential.train(model.backbone, mode)
        norm.training = False
        return model.backbone

    model.backbone.train = train
    return norm


def trained(steps=3):
    model = clones()
    opt = AlraoSGD(model, averaging=8.0, generator=generator(0))
    for x, y in data(steps):
        opt.zero_grad()
        model(x, targets=y).backward()
        opt.step()
    return model, opt


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_frozen_statistics_stay(mode):
    model, opt = trained()
    norm = frozen_norm(model)
    model.train(mode)
    with opt.averaged(model, data(3)):
        assert norm.running_mean.unique().tolist() == [0.25]
        assert model.training is mode
    model, opt = trained()
    norm = model.backbone[1].eval()
    before = norm.running_mean.clone()
    with opt.averaged(model, data(3)):
        assert torch.equal(norm.running_mean, before)
    assert not norm.training and model.training


def test_what_else_training_passes_change_comes_back():
    """The vectors of spectral normalisation, both kinds, and the state of the random numbers."""
    model, opt = trained()
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    second = nn.utils.spectral_norm(nn.Linear(6, 6))
    whole = nn.Sequential(first, second, nn.Dropout(), model)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(5)
    torch.manual_seed(4)
    loader = torch.utils.data.DataLoader(torch.randn(20, 6), batch_size=5, shuffle=True)
    torch.manual_seed(4)
    with opt.averaged(whole, loader):
        changed = [
            n for n, value in whole.state_dict().items() if not torch.equal(value, before[n])
        ]
        assert any(name.endswith("_u") for name in changed)
        assert any(name.endswith("weight_u") for name in changed)
        model.head.running.fill_(7)
    assert torch.equal(torch.rand(5), expected)
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    assert model.head.running.unique().tolist() == [7]


@pytest.mark.parametrize(
    "loader, error, message",
    [
        ([], ValueError, "loader: got no batches"),
        ([{"x": torch.zeros(2, 6)}], TypeError, "loader: got a batch of dict"),
        ([torch.zeros(1, 6)], ValueError, "Expected more than 1 value per channel"),
    ],
    ids=["empty", "dict", "one sample"],
)
def test_a_loader_that_fails_leaves_no_trace(loader, error, message):
    model, opt = trained()
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message), opt.averaged(model, loader):
        pass
    assert not any(module.training for module in model.modules())
    assert model.backbone[1].momentum == 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_before_the_first_step_and_compiled():
    model = clones()
    opt = AlraoSGD(model, averaging=8.0)
    with opt.averaged(model, data(3)):
        assert model.backbone[1].running_mean.abs().sum() > 0
    with opt.averaged(torch.compile(model, backend="eager"), data(3)):
        pass
    assert model.backbone[1].running_mean.abs().sum() == 0
    with pytest.raises(TypeError, match="model: got"), opt.averaged(list(data(1)), model):
        pass


def test_false_is_no_average():
    for optimizer_type in (AlraoSGD, AlraoAdam, AlraoMuon):
        opt = optimizer_type(clones(), averaging=False)
        assert opt.param_groups[0]["averaging"] is None
        opt.add_param_group({"params": nn.Linear(2, 2), "averaging": False})
        assert opt.param_groups[1]["averaging"] is None
        with pytest.raises(TypeError, match="averaging: got True"):
            optimizer_type(clones(), averaging=True)


def test_refusals():
    model = clones()
    with pytest.raises(ValueError, match="averaging: got None in every param group"):
        with AlraoSGD(model).averaged():
            pass
    opt = AlraoSGD(model, averaging=0)
    for arguments, message in (((model,), "loader: got None"), ((None, []), "model: got None")):
        with pytest.raises(ValueError, match=message), opt.averaged(*arguments):
            pass
    for wrong in ({"averaging": -1}, {"warmup_steps": -1}, {"averaging": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AlraoSGD(model, **wrong)
    with pytest.raises(TypeError, match=r"warmup_steps: got 1\.5"):
        AlraoSGD(model, warmup_steps=1.5)


def test_what_no_step_has_updated_stays():
    """Weights that were loaded into a model after its optimizer was made are not exchanged for older ones."""
    model = clones()
    opt = AlraoSGD(model, averaging=8.0, generator=generator(0))
    model.load_state_dict(clones(seed=5).state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    with opt.averaged():
        assert all(map(torch.equal, before, model.parameters()))
    [(x, y)] = data(1)
    model(x, targets=y).backward()
    opt.step()
    # The first value takes the place of what was there.
    assert all(torch.equal(opt.state[p]["average"], p) for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints(backend, kind):
    optimizer_type, _, options = KINDS[kind]
    options |= {"averaging": 8.0, "warmup_steps": 6}
    model = build()
    opt = optimizer_type(model, generator=generator(0), **options)
    train(model, opt, range(4))
    again = build(seed=7)
    again.load_state_dict(model.state_dict())
    other = optimizer_type(again, generator=generator(1), averaging=1.0)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, range(4, 8))
    train(again, other, range(4, 8))
    assert_same_state(opt, other)
    frozen = model.backbone[1].bias
    assert "average" not in opt.state[frozen]
    copied, copied_opt = copy.deepcopy((model, opt))
    train(copied, copied_opt, range(8, 9))
    train(model, opt, range(8, 9))
    assert_same_state(opt, copied_opt)


def test_an_older_checkpoint_has_neither():
    """It gets averages from now on, and its momentum stays as it was."""
    model = build()
    opt = AlraoSGD(model, momentum=0.9, generator=generator(0), normalized_momentum=False)
    train(model, opt, range(3))
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        for name in ("normalized_momentum", "averaging", "warmup_steps"):
            del group[name]
    again = build(seed=7)
    again.load_state_dict(model.state_dict())
    other = AlraoSGD(again, momentum=0.9, averaging=8.0, generator=generator(1))
    other.load_state_dict(saved)
    assert other.param_groups[0]["normalized_momentum"] is False
    train(model, opt, range(3, 5))
    train(again, other, range(3, 5))
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)
        if q.requires_grad:
            assert not torch.equal(other.state[q]["average"], q)


def test_normalized_momentum(backend, device):
    rate = float(torch.tensor(0.01))
    for options in ({"momentum": 0.9}, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1}):
        ours, theirs, tensor = net(device), net(device), net(device)
        scale = 1 - options["momentum"]
        kind = {"sampler": Constant(rate), "normalized_momentum": True, **options}
        lr = torch.tensor(1.0, dtype=torch.float64)
        optimizers = AlraoSGD(ours, **kind), AlraoSGD(tensor, lr=lr, **kind)
        other = torch.optim.SGD(theirs.parameters(), lr=rate * scale, foreach=False, **options)
        for step in range(4):
            give_gradients(step, ours, theirs, tensor)
            for opt in (*optimizers, other):
                opt.step()
        for p, q, r in zip(ours.parameters(), theirs.parameters(), tensor.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(p, r, rtol=1e-12, atol=1e-13)


def test_where_momentum_is_normalized_by_default():
    def normalized(**options):
        return AlraoSGD(clones(), momentum=0.9, **options).param_groups[0]["normalized_momentum"]

    assert normalized() and normalized(sampler=lambda n, generator: torch.ones(n))
    assert not normalized(momentum_rule="authors") and not normalized(sampler=Constant(0.1))
    assert not normalized(normalized_momentum=False)
    net = clones()
    groups = [{"params": net.backbone, "sampler": Constant(0.1)}, {"params": net.head}]
    opt = AlraoSGD(groups, momentum=0.9)
    assert [group["normalized_momentum"] for group in opt.param_groups] == [False, True]
    groups = [{"params": net.backbone, "lr_range": (1e-3, 1.0)}, {"params": net.head}]
    opt = AlraoSGD(groups, momentum=0.9, sampler=Constant(0.1))
    assert [group["normalized_momentum"] for group in opt.param_groups] == [True, False]


def test_a_momentum_of_one_or_more_is_not_normalized():
    for momentum in (1.0, 1.5):
        layer = nn.Linear(2, 2)
        opt = AlraoSGD(layer, (0.5, 0.5), momentum=momentum)
        before = layer.bias.detach().clone()
        layer.bias.grad = torch.ones(2)
        opt.step()
        torch.testing.assert_close(layer.bias.detach(), before - 0.5)


def test_a_compiled_step(backend, device):
    models = [net(device, torch.float32) for _ in range(2)]
    options = {"averaging": 8.0, "warmup_steps": 3}
    optimizers = [AlraoAdam(m, generator=generator(0), **options) for m in models]
    compiled = torch.compile(optimizers[0].step, backend="aot_eager")
    for step in range(4):
        give_gradients(step, *models)
        compiled()
        optimizers[1].step()
    for p, q in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(p, q)
        average, other = (o.state[x]["average"] for o, x in zip(optimizers, (p, q)))
        torch.testing.assert_close(average, other)
        assert not torch.equal(average, p)
