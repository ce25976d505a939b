"""Protects the optimizers of compat: rates of every shape and layout against the rule written out, the last layers'
optimizers stepped together against torch's one by one, checkpoints that resume exactly, and invalid inputs.
"""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alrao_fast.compat as alrao
from alrao_fast.compat._spec import AdamSpec, SGDSpec, compact_rates

SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (5,),
    "rows": (4, 3),
    "image": (4, 3, 2, 2),
    "empty": (0, 3),
}


def written_out_sgd(
    params, rates, grads, steps, momentum, weight_decay, dampening=0.0, nesterov=False
):
    """The authors' rule, entry by entry in full-size tensors."""
    params = [p.detach().clone() for p in params]
    buffers = [None] * len(params)
    for t in range(steps):
        for k, (p, lr) in enumerate(zip(params, rates)):
            d = grads[t][k] + weight_decay * p
            if momentum:
                if buffers[k] is None:
                    buffers[k] = d.clone()
                else:
                    keep = 1 - momentum * lr.sqrt().clamp(max=1 / momentum)
                    buffers[k] = buffers[k] * keep + (1 - dampening) * d
                d = d + momentum * buffers[k] if nesterov else buffers[k]
            p -= lr * d
    return params


def written_out_adam(params, rates, grads, steps, eps, weight_decay, amsgrad):
    params = [p.detach().clone() for p in params]
    m, v, top = ([torch.zeros_like(p) for p in params] for _ in range(3))
    for t in range(1, steps + 1):
        for k, (p, lr) in enumerate(zip(params, rates)):
            d = grads[t - 1][k] + weight_decay * p
            m[k] = 0.9 * m[k] + 0.1 * d
            v[k] = 0.99 * v[k] + 0.01 * d * d
            top[k] = torch.maximum(top[k], v[k])
            root = (top[k] if amsgrad else v[k]).sqrt() + eps
            p -= lr * math.sqrt(1 - 0.99**t) / (1 - 0.9**t) * m[k] / root
    return params


def problem(layout="contiguous"):
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES.values()]
    params.append(torch.randn(3, 4, dtype=torch.float64).t())
    if layout == "channels_last":
        params[4] = params[4].to(memory_format=torch.channels_last)
    params = [nn.Parameter(p) for p in params]
    # By row, by column, one for each entry, all equal.
    rates = [torch.rand(p.shape, dtype=torch.float64) for p in params]
    rates[3] = torch.rand(4, 1).double().expand(4, 3)
    rates[4] = torch.rand(4, 1, 1, 1).double().expand(4, 3, 2, 2).contiguous()
    rates[6] = torch.rand(1, 3).double().expand(4, 3)
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]
    return params, rates, grads


def train(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.3},
    ],
)
def test_sgd_spec(options, layout):
    params, rates, grads = problem(layout)
    expected = written_out_sgd(
        params, rates, grads, 4, **{"momentum": 0.0, "weight_decay": 0.0, **options}
    )
    train(SGDSpec(params, iter(rates), **options), params, grads)
    for p, q in zip(params, expected):
        torch.testing.assert_close(p, q)
    for p, g in zip(params, grads[-1]):
        assert torch.equal(p.grad, g)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_spec(amsgrad):
    params, rates, grads = problem()
    expected = written_out_adam(params, rates, grads, 4, 1e-3, 0.1, amsgrad)
    optimizer = AdamSpec(
        params, rates, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1, amsgrad=amsgrad
    )
    train(optimizer, params, grads)
    for p, q in zip(params, expected):
        torch.testing.assert_close(p, q)


def test_sgd_spec_by_hand():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SGDSpec([p], [torch.tensor([0.25, 1.0])], momentum=0.5)
    for _ in range(2):
        p.grad = torch.tensor([1.0, 1.0])
        optimizer.step()
    # buf = 1, then 1 (1 - 0.5 sqrt(lr)) + 1 = 1.75 and 1.5.
    torch.testing.assert_close(p.detach(), torch.tensor([1 - 0.25 * 2.75, 2 - 2.5]))


def test_rates_are_kept_short():
    p = torch.empty(4, 3, 2, 2)
    full = torch.rand(4, 1, 1, 1).expand(4, 3, 2, 2)
    for given in (full, full[:, 0, 0, 0], full.contiguous()):
        vector, dim = compact_rates(given, p)
        assert vector.shape == (4,) and dim == 0
    vector, dim = compact_rates(torch.rand(3).expand(5, 3).contiguous(), torch.empty(5, 3))
    assert vector.shape == (3,) and dim == 1
    assert compact_rates(0.5, p)[0].tolist() == [0.5]
    full, dim = compact_rates(torch.rand(5, 3), torch.empty(5, 3))
    assert full.shape == (5, 3) and dim is None
    assert compact_rates(full, torch.empty(5, 3, dtype=torch.bfloat16))[0].dtype == torch.float32


def test_parameters_without_gradient_are_skipped():
    params, rates, grads = problem()
    optimizer = SGDSpec(params, rates, momentum=0.9)
    before = params[3].detach().clone()
    for step in grads[:2]:
        for p, g in zip(params, step):
            p.grad = None if p is params[3] else g
        optimizer.step()
    assert torch.equal(params[3], before)
    expected = written_out_sgd(params[3:4], rates[3:4], [[g[3]] for g in grads[2:]], 2, 0.9, 0.0)
    for step in grads[2:]:
        params[3].grad = step[3]
        optimizer.step()
    torch.testing.assert_close(params[3].detach(), expected[0])


def model(n=4):
    torch.manual_seed(0)
    internal = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    return alrao.AlraoModel(
        "classification", nn.NLLLoss(), internal, n, alrao.LinearClassifier, 6, 3
    ).double()


def optimizer_of(net, cls=alrao.SGDAlrao, **options):
    rates = [torch.full((6, 5), 0.1), torch.rand(6, generator=torch.Generator().manual_seed(3))]
    lrs = [0.2 / (k + 1) for k in range(net.n_last_layers)]
    return cls(
        net.parameters_internal_nn(), rates, net.last_layers_parameters_list(), lrs, **options
    )


def steps(net, optimizer, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        F.nll_loss(net(x), y).backward()
        alrao.alrao_step(net, optimizer, nn.NLLLoss(), y)


CONFIGURATIONS = [
    (alrao.SGDAlrao, {}),
    (alrao.SGDAlrao, {"momentum": 0.9, "weight_decay": 0.01}),
    (alrao.AdamAlrao, {"weight_decay": 0.01}),
    (alrao.AdamAlrao, {"amsgrad": True, "betas": (0.8, 0.9), "eps": 1e-3}),
]


@pytest.mark.parametrize(("cls", "options"), CONFIGURATIONS)
def test_last_layers_together_are_last_layers_one_by_one(cls, options, monkeypatch):
    together, apart = model(), model()
    steps(together, first := optimizer_of(together, cls, **options), 5)
    alone = optimizer_of(apart, cls, **options)
    stepped = []
    for opt in alone.opt_last_layers:
        opt.register_step_pre_hook(lambda *args: stepped.append(1))
    steps(apart, alone, 5)
    # A hook makes them step one by one.
    assert len(stepped) == 5 * 4
    for p, q in zip(together.parameters(), apart.parameters()):
        torch.testing.assert_close(p, q)
    for a, b in zip(first.opt_last_layers, alone.opt_last_layers):
        for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"]):
            assert set(a.state[p]) >= {k for k, v in b.state[q].items() if v is not None}
            for key, value in b.state[q].items():
                if value is not None:
                    torch.testing.assert_close(a.state[p][key], value)


@pytest.mark.parametrize("cls", [alrao.SGDAlrao, alrao.AdamAlrao])
def test_no_torch_optimizer_steps_in_the_usual_case(cls, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a last layer's optimizer stepped alone")

    monkeypatch.setattr(torch.optim.SGD, "step", refuse)
    monkeypatch.setattr(torch.optim.Adam, "step", refuse)
    net = model()
    steps(net, optimizer_of(net, cls), 2)


def test_rates_and_options_of_the_last_layers_can_be_edited():
    together, apart = model(), model()
    for net, hook in ((together, False), (apart, True)):
        optimizer = optimizer_of(net, momentum=0.5)
        if hook:
            optimizer.opt_last_layers[0].register_step_pre_hook(lambda *args: None)
        steps(net, optimizer, 2)
        for opt in optimizer.opt_last_layers:
            opt.param_groups[0]["lr"] *= 0.5
        steps(net, optimizer, 2, seed=2)
        optimizer.opt_last_layers[1].param_groups[0]["momentum"] = 0.0
        steps(net, optimizer, 2, seed=3)
        optimizer.opt_last_layers[1].param_groups[0]["momentum"] = 0.5
        steps(net, optimizer, 2, seed=4)
    for p, q in zip(together.parameters(), apart.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("cls", "options"), CONFIGURATIONS)
def test_a_resumed_run_is_the_same_run(cls, options):
    net = model()
    optimizer = optimizer_of(net, cls, **options)
    steps(net, optimizer, 3)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(net, optimizer, 3, seed=2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = model()
    torch.manual_seed(9)
    resumed = cls(
        other.parameters_internal_nn(),
        [0.3, 0.3],
        other.last_layers_parameters_list(),
        [0.0] * 4,
        **options,
    )
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.last_layers_lr == optimizer.last_layers_lr
    steps(other, resumed, 3, seed=2)
    for p, q in zip(net.state_dict().values(), other.state_dict().values()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copying(how):
    net = model()
    optimizer = optimizer_of(net, momentum=0.9)
    steps(net, optimizer, 2)
    if how == "deepcopy":
        other, copied = copy.deepcopy((net, optimizer))
    else:
        file = io.BytesIO()
        torch.save((net, optimizer), file)
        file.seek(0)
        other, copied = torch.load(file, weights_only=False)
    early = copied.state_dict()
    early = copy.deepcopy(early)
    steps(net, optimizer, 2, seed=2)
    steps(other, copied, 2, seed=2)
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)
    # The copy notices that its last layers' states are loaded.
    for opt, state in zip(copied.opt_last_layers, early["opt_last_layers"]):
        opt.load_state_dict(state)
    buffers = [s["momentum_buffer"].clone() for s in early["opt_last_layers"][1]["state"].values()]
    F.nll_loss(other(torch.randn(8, 5).double()), torch.zeros(8, dtype=torch.long)).backward()
    for opt in copied.opt_last_layers:
        for p in opt.param_groups[0]["params"]:
            p.grad.zero_()
    copied.step()
    for p, old in zip(copied.opt_last_layers[1].param_groups[0]["params"], buffers):
        torch.testing.assert_close(copied.opt_last_layers[1].state[p]["momentum_buffer"], 0.9 * old)


def test_moving():
    net = model()
    optimizer = optimizer_of(net, momentum=0.9)
    steps(net, optimizer, 1)
    net.float()
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    F.nll_loss(net(x), y).backward()
    alrao.alrao_step(net, optimizer, nn.NLLLoss(), y)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in net.parameters())


def test_zero_grad_and_posterior():
    net = model()
    optimizer = optimizer_of(net)
    F.nll_loss(net(torch.randn(8, 5).double()), torch.randint(3, (8,))).backward()
    optimizer.last_layers_zero_grad()
    assert all(p.grad is None for layer in net.last_layers() for p in layer.parameters())
    assert all(p.grad is not None for p in net.parameters_internal_nn())
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    optimizer.update_posterior("p")
    assert optimizer.posterior == "p" and len(optimizer.param_groups) == 5


def test_older_keywords():
    net = model()
    optimizer = alrao.SGDAlrao(
        parameters_preclassifier=net.parameters_preclassifier(),
        lr_preclassifier=[0.1, 0.1],
        classifiers_parameters_list=net.classifiers_parameters_list(),
        classifiers_lr=[0.1] * 4,
        momentum=0.9,
    )
    assert optimizer.classifiers_lr == [0.1] * 4
    assert optimizer.opt_preclassifier is optimizer.opt_internal_nn
    assert optimizer.opt_classifiers is optimizer.opt_last_layers
    optimizer.classifiers_zero_grad()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_init_alrao_optimizer(name, capsys):
    net = model()
    optimizer = alrao.init_alrao_optimizer(net, 4, 1e-3, 1.0, optim_name=name, weight_decay=0.1)
    assert capsys.readouterr().out == "Classifiers LR:1.0e-03, 1.0e-02, 1.0e-01, 1.0e+00\n"
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    weight, bias = net.parameters_internal_nn()
    state = optimizer.opt_internal_nn.state
    assert torch.equal(state[weight]["rate"], state[bias]["rate"])
    single = alrao.init_alrao_optimizer(model(1), 1, 1e-3, 1.0)
    assert single.last_layers_lr == [1e-3]


def test_sample_best_candidate():
    outs = torch.randn(5, 2, 3)
    best = alrao.sample_best_candidate((outs, torch.tensor([0.2, 0.5, 0.3])))
    assert torch.equal(best, outs[:, :, 1])


def test_invalid_inputs():
    net, p = model(), nn.Parameter(torch.zeros(4, 3))
    for rates, message in (
        ([], "lr_params has 0 entries; expected 1"),
        ([torch.ones(5)], r"shape \[5\] for a parameter of shape \[4, 3\]"),
        ([-torch.ones(4, 3)], "negative"),
        ([torch.full((4,), math.nan)], "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            SGDSpec([p], rates)
    for options, message in (
        ({"momentum": -1}, "momentum: got -1"),
        ({"weight_decay": -1}, "weight_decay: got -1"),
        ({"nesterov": True}, "nesterov: got True"),
    ):
        with pytest.raises(ValueError, match=message):
            SGDSpec([p], [0.1], **options)
    with pytest.raises(ValueError, match=r"betas\[1\]: got 1.0"):
        AdamSpec([p], [0.1], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="eps: got -1"):
        AdamSpec([p], [0.1], eps=-1)
    with pytest.raises(ValueError, match="3 entries for 4 last layers"):
        alrao.SGDAlrao(
            net.parameters_internal_nn(), [0.1, 0.1], net.last_layers_parameters_list(), [0.1] * 3
        )
    for rate in (math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match=rf"last_layers_lr\[1\]: got {rate}"):
            alrao.SGDAlrao(
                net.parameters_internal_nn(),
                [0.1, 0.1],
                net.last_layers_parameters_list(),
                [0.1, rate, 0.1, 0.1],
            )
    with pytest.raises(TypeError, match="'lr_internal_nn' is missing"):
        alrao.SGDAlrao(net.parameters_internal_nn())
    with pytest.raises(TypeError, match="positional arguments"):
        alrao.AdamAlrao(1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="optim_name is 'LBFGS'"):
        alrao.init_alrao_optimizer(net, 4, 1e-3, 1.0, optim_name="LBFGS")
    optimizer = optimizer_of(net)
    state = optimizer.state_dict()
    state["opt_last_layers"].pop()
    with pytest.raises(ValueError, match="3 last layers; expected 4"):
        optimizer.load_state_dict(state)
