"""`python benchmarks compat`: a training step of `alrao_fast.compat` against the loop over the last layers.

The loop is the plain way to train this model: every last layer is called for the mixture and again for its own loss,
each has a backward pass, a torch optimizer, and its loss and accuracy for the switch; every parameter of the network
below has its own update with a tensor of rates. Both take the same initial values, rates and batches, and must agree
before they are timed, in turns.
"""

import argparse
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alrao_fast.compat as alrao
from benchmarks.timing import interleave

Batch = tuple[Tensor, Tensor]


def make_model(features: int, width: int, classes: int, clones: int) -> alrao.AlraoModel:
    """A perceptron with one hidden layer below `clones` last layers."""
    torch.manual_seed(0)
    layers = (nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())
    head = (clones, alrao.LinearClassifier, width, classes)
    return alrao.AlraoModel("classification", nn.NLLLoss(), nn.Sequential(*layers), *head)


class Start(NamedTuple):
    """What both begin with: a network of their own, the same rates of its features and clones, and the momentum."""

    net: alrao.AlraoModel
    rates: list[Tensor]
    clone_rates: list[float]
    momentum: float


class CompatStep:
    """One training step of alrao_fast.compat."""

    def __init__(self, start: Start) -> None:
        self.net = net = start.net
        params = (net.parameters_internal_nn(), start.rates, net.last_layers_parameters_list())
        self.optimizer = alrao.SGDAlrao(*params, start.clone_rates, momentum=start.momentum)

    def __call__(self, batch: Batch) -> None:
        x, y = batch
        self.optimizer.zero_grad()
        loss = F.nll_loss(self.net(x), y)
        loss.backward()
        alrao.alrao_step(self.net, self.optimizer, F.nll_loss, y)

    def state(self) -> list[Tensor]:
        return [*self.net.parameters(), self.net.switch.logposterior]


class LoopStep:
    """The same step by loops over the last layers and the parameters, in plain torch."""

    def __init__(self, start: Start) -> None:
        self.internal = start.net.internal_nn
        self.layers: list[Any] = [layer.fc for layer in start.net.last_layers()]
        self.rates = start.rates
        self.momentum = start.momentum
        self.buffers: dict[Tensor, Tensor] = {}
        self.optimizers = [
            torch.optim.SGD(layer.parameters(), lr=lr, momentum=start.momentum)
            for layer, lr in zip(self.layers, start.clone_rates)
        ]
        self.switch = alrao.Switch(len(self.layers), save_ll_perf=True)

    def __call__(self, batch: Batch) -> None:
        x, y = batch
        self.internal.zero_grad()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        features = self.internal(x)
        if not features.isfinite().all():
            raise ValueError("the features are not finite")
        outputs = [F.log_softmax(layer(features), dim=1) for layer in self.layers]
        prior = self.switch.logposterior.float()
        mixture = torch.logsumexp(torch.stack([out + p for out, p in zip(outputs, prior)]), 0)
        F.nll_loss(mixture, y).backward()
        fixed = features.detach()
        for layer, optimizer in zip(self.layers, self.optimizers):
            optimizer.zero_grad()
            loss = F.nll_loss(F.log_softmax(layer(fixed), dim=1), y)
            if loss.isfinite():
                loss.backward()
        with torch.no_grad():
            for param, rate in zip(self.internal.parameters(), self.rates):
                assert param.grad is not None
                param.sub_(rate * self._direction(param, param.grad, rate))
        for optimizer in self.optimizers:
            optimizer.step()
        self._observe(outputs, y)

    def _direction(self, param: Tensor, grad: Tensor, rate: Tensor) -> Tensor:
        if not self.momentum:
            return grad
        if param not in self.buffers:
            self.buffers[param] = grad.clone()
        else:
            keep = 1 - self.momentum * rate.sqrt().clamp(max=1 / self.momentum)
            self.buffers[param].mul_(keep).add_(grad)
        return self.buffers[param]

    @torch.no_grad()
    def _observe(self, outputs: list[Tensor], y: Tensor) -> None:
        # What the switch reports: loss and accuracy of each layer.
        losses = torch.stack([F.nll_loss(out, y) for out in outputs])
        if losses.isnan().any():
            raise ValueError("a loss is not a number")
        correct = torch.stack([(out.argmax(1) == y).sum() for out in outputs])
        self.switch.observe(losses, correct, y)

    def state(self) -> list[Tensor]:
        own = [p for layer in self.layers for p in layer.parameters()]
        return [*self.internal.parameters(), *own, self.switch.logposterior]


def measure(
    batch: int, width: int, classes: int, clones: int, momentum: float, rounds: int
) -> tuple[float, float]:
    """(seconds of a compat step, seconds of the same step by loops): medians of interleaved rounds.

    Raises AssertionError if five steps of the two do not end in the same state.
    """
    features = 64
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, features, generator=generator)
    data = (x, torch.randint(classes, (batch,), generator=generator))
    nets = [make_model(features, width, classes, clones) for _ in range(2)]
    sampler = alrao.lr_sampler_generic(1e-5, 0.1)
    rates = list(alrao.generator_randomlr_neurons(nets[0].internal_nn, sampler))
    clone_rates = [1e-5 * math.exp(k / max(clones - 1, 1) * math.log(1e4)) for k in range(clones)]
    starts = [Start(net, rates, clone_rates, momentum) for net in nets]
    ours, loop = CompatStep(starts[0]), LoopStep(starts[1])
    for _ in range(5):
        ours(data)
        loop(data)
    for actual, expected in zip(ours.state(), loop.state()):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    times = interleave({"compat": lambda: ours(data), "loop": lambda: loop(data)}, rounds=rounds)
    return times["compat"].median, times["loop"].median


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks compat", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(
        f"{'batch':>6}{'width':>7}{'classes':>9}{'clones':>8}{'momentum':>10}"
        f"{'compat ms':>12}{'loop ms':>10}{'ratio':>8}"
    )
    for batch, width, classes, clones, momentum in (
        (32, 64, 10, 10, 0.0),
        (32, 64, 10, 10, 0.9),
        (32, 64, 10, 20, 0.9),
        (128, 256, 100, 10, 0.9),
        (700, 128, 2000, 6, 0.0),
    ):
        ours, loop = measure(batch, width, classes, clones, momentum, options.rounds)
        print(
            f"{batch:6}{width:7}{classes:9}{clones:8}{momentum:10}"
            f"{ours * 1e3:12.3f}{loop * 1e3:10.3f}{loop / ours:8.2f}"
        )
