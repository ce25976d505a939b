"""Protects the numbers of the authors' implementation: trajectories recorded from it, followed step by step.

tests/data/compat_golden.npz holds, for a perceptron with 10 last layers and a convolutional network with 4, initial
values, rates and batches, and what their code made of them in 20 steps of float64: SGD without and with momentum and
weight decay, and Adam. Parameters at steps 0, 1, 2, 5, 10, 15, 20; losses and posterior at every step.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alrao_fast.compat as alrao
from alrao_fast import backends

OP = "switch_mixture"
GOLDEN = np.load(Path(__file__).with_name("data") / "compat_golden.npz")
MANIFEST = json.loads(GOLDEN["manifest"].tobytes())
RUNS = {run["name"]: run for run in MANIFEST["runs"]}


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 7)

    def forward(self, x):
        return torch.tanh(self.fc2(F.relu(self.fc1(x))))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 6)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return torch.tanh(self.fc(x.mean((2, 3))))


class Hooked(alrao.LinearClassifier):
    """A last layer that only the loop evaluates."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_forward_hook(lambda module, args, output: None)


class Dense(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Foreign(nn.Module):
    """A last layer without any nn.Linear, for the batched path."""

    def __init__(self, in_features, n_classes):
        super().__init__()
        self.fc = Dense(in_features, n_classes)

    def forward(self, x):
        return F.log_softmax(self.fc(x), dim=1)


def golden(run, key):
    return GOLDEN[f"{run['name']}/{key}"]


def build(run, layer_class=alrao.LinearClassifier):
    net_info = MANIFEST["nets"][run["net"]]

    def data(key):
        return torch.from_numpy(GOLDEN[f"{run['net']}/{key}"])

    internal = Perceptron() if run["net"] == "mlp" else Convolutional()
    net = alrao.AlraoModel(
        "classification",
        nn.NLLLoss(),
        internal,
        net_info["n_clones"],
        layer_class,
        net_info["z"],
        net_info["out"],
    ).double()
    values, params = data("params0"), dict(net.named_parameters())
    with torch.no_grad():
        for name, _, offset in net_info["layout"]:
            p = params[name]
            p.copy_(values[offset : offset + p.numel()].view_as(p))
    sizes = [p.numel() for p in net.parameters_internal_nn()]
    flat = data(f"lr_{run['family']}").split(sizes)
    rates = (lr.view_as(p) for lr, p in zip(flat, net.parameters_internal_nn()))
    cls = alrao.SGDAlrao if run["family"] == "sgd" else alrao.AdamAlrao
    options = {"weight_decay": run["weight_decay"]}
    if run["momentum"]:
        options["momentum"] = run["momentum"]
    optimizer = cls(
        net.parameters_internal_nn(),
        rates,
        net.last_layers_parameters_list(),
        data(f"clone_lr_{run['family']}").tolist(),
        **options,
    )
    return net, optimizer, data("x"), data("y")


def flat_parameters(net, run):
    params = dict(net.named_parameters())
    names = [name for name, _, _ in MANIFEST["nets"][run["net"]]["layout"]]
    return torch.cat([params[name].detach().flatten() for name in names])


def follow(run, layer_class=alrao.LinearClassifier, steps=20, tolerance=1e-10):
    net, optimizer, x, y = build(run, layer_class)

    def check(actual, key, index):
        expected = torch.from_numpy(np.asarray(golden(run, key)[index]))
        torch.testing.assert_close(
            actual.to(expected.dtype),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m: f"{key}: {m}",
        )

    for step in range(steps + 1):
        if step in MANIFEST["kept"]:
            check(flat_parameters(net, run), "params", MANIFEST["kept"].index(step))
        check(net.switch.logposterior, "logposterior", step)
        assert net.switch.t == golden(run, "t")[step]
        if step == steps:
            break
        optimizer.zero_grad()
        loss = F.nll_loss(net(x[step]), y[step])
        loss.backward()
        check(loss.detach(), "mix_loss", step)
        alrao.alrao_step(net, optimizer, nn.NLLLoss(), y[step])
        check(-torch.stack(net.last_lst_logpx), "clone_loss", step)
    return net


@pytest.mark.interpreted(name=[name for name in RUNS if name.startswith("mlp")])
@pytest.mark.parametrize("name", RUNS)
def test_trajectory(name, backend):
    if backend == "cuda" or (backend == "triton" and not backends.INTERPRETED):
        pytest.skip("the recording is followed on CPU tensors")
    with backends.use_backend(backend):
        # A prefix on the interpreter, which is slow.
        follow(RUNS[name], steps=3 if backend == "triton" else 20)


@pytest.mark.parametrize("layer_class", [Hooked, Foreign])
@pytest.mark.parametrize("name", ["mlp/sgd_m0.9_wd1e-4/f64", "conv/adam_wd0/f64"])
def test_trajectory_of_other_last_layers(name, layer_class):
    follow(RUNS[name], layer_class)


def test_batch_norm_statistics():
    run = RUNS["conv/sgd_m0_wd0/f64"]
    net = follow(run)
    buffers = dict(net.named_buffers())
    names = [name for name, _, _ in MANIFEST["nets"]["conv"]["buffers"]]
    actual = torch.cat([buffers[name] for name in names])
    torch.testing.assert_close(actual, torch.from_numpy(golden(run, "buffers")[-1]))


@pytest.mark.parametrize("case", MANIFEST["switch"], ids=lambda case: case["name"])
def test_switch(case):
    evidence = torch.from_numpy(golden(case, "logpx"))
    switch = alrao.Switch(case["n"], theta=case["theta"])
    for step, logpx in enumerate(evidence):
        # One sample of two classes, so that the negative log-likelihood is -logpx.
        outputs = [torch.stack([value, torch.zeros_like(value)])[None] for value in logpx]
        switch.Supdate(outputs, torch.tensor([0]))
        expected = torch.from_numpy(golden(case, "logposterior")[step + 1])
        torch.testing.assert_close(switch.logposterior, expected, rtol=1e-10, atol=1e-10)
        assert switch.t == golden(case, "t")[step + 1]


def test_switch_by_hand():
    # Two models, theta 1/2, one observation with likelihoods 1/2 and 1/4: weights 1/8, 1/8 and 1/16, 1/16; half of
    # the unstable ones, 3/32, is handed out again, an eighth of 3/16 to each of the four.
    switch = alrao.Switch(2, theta=0.5)
    outputs = [torch.tensor([[p, 1 - p]]).double().log() for p in (0.5, 0.25)]
    switch.Supdate(outputs, torch.tensor([0]))
    unstable = torch.tensor([1 / 16, 1 / 32]) + 3 / 128
    stable = torch.tensor([1 / 8, 1 / 16]) + 3 / 128
    expected = torch.stack([unstable, stable]).double() / (3 / 8)
    torch.testing.assert_close(switch.logw.exp(), expected)
    torch.testing.assert_close(switch.posterior(), expected.sum(0))
