"""The small tasks: data that comes with scikit-learn and Python, or is drawn, and a network for each of them.

What is drawn, and the split of what is not, depend on the seed alone, so that the methods of a seed see the same
examples in the same order.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.experiments.data import Text, load_images, load_text
from benchmarks.experiments.quality import networks
from benchmarks.experiments.tasks import Score, Task
from benchmarks.networks import MLP, TransformerLM

Part = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """Inputs `[n, ...]` and targets of the parts, the number of classes or of real outputs, and a fresh backbone."""

    train: Part
    valid: Part
    test: Part
    classes: int
    network: Callable[[], nn.Module]


def split(x: Tensor, y: Tensor, train: int, valid: int) -> tuple[Part, Part, Part]:
    """The first `train` examples, the next `valid`, and the others, for testing."""
    first, second = train, train + valid
    return (x[:first], y[:first]), (x[first:second], y[first:second]), (x[second:], y[second:])


def tabular(seed: int) -> Data:
    """40 numeric features of which 20 say something about the class, one of 8; every fiftieth label is wrong."""
    from sklearn.datasets import make_classification

    options = {"n_features": 40, "n_informative": 20, "n_clusters_per_class": 2, "flip_y": 0.02}
    x, y = make_classification(8000, n_classes=8, class_sep=2.0, random_state=seed, **options)
    x = torch.tensor(x, dtype=torch.float32)
    parts = split((x - x.mean(0)) / x.std(0), torch.tensor(y), 4000, 2000)
    return Data(*parts, 8, lambda: MLP(40, 128))


def regression(seed: int) -> Data:
    """Friedman's first function, a sine of a product, a square and two lines, of 10 features, with noise."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(8000, noise=1.0, random_state=seed)
    x = torch.tensor((x - 0.5) * math.sqrt(12), dtype=torch.float32)
    y = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)[:, None]
    return Data(*split(x, y, 4000, 2000), 1, lambda: MLP(10, 64))


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 images `[n, 8, 8]`, from 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)


def _shuffled_digits(seed: int) -> tuple[Tensor, Tensor]:
    x, y = _digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order]


def digits(seed: int) -> Data:
    x, y = _shuffled_digits(seed)
    x = (x - x.mean()) / x.std()
    return Data(*split(x.flatten(1), y, 1000, 397), 10, lambda: MLP(64, 256))


def autoencoder(seed: int) -> Data:
    """The digits' pixels through 8 features; every pixel has mean 0 and, together, they have variance 1."""
    x, _ = _shuffled_digits(seed)
    x = x.flatten(1)
    x = x - x.mean(0)
    x = x / x.std()
    return Data(*split(x, x, 1000, 397), 64, lambda: networks.Bottleneck(64, 128, 8))


SCENE = 12
# Numbers of scenes, and of the digits that they are made of; no digit is in two parts.
SCENES = {"train": (5000, 1000), "valid": (1500, 397), "test": (1500, 400)}


@functools.lru_cache(maxsize=2)
def _scenes(seed: int) -> dict[str, Part]:
    """A digit somewhere in an image of 12x12 pixels, among pieces of other digits and noise: `[n, 1, 12, 12]`."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = _shuffled_digits(seed)
    parts, start = {}, 0

    def placed(pieces: Tensor) -> Tensor:
        """Each of `pieces` [n, s, s] at a random place of an empty scene."""
        n, size = pieces.shape[:2]
        scene = torch.zeros(n, SCENE, SCENE)
        row, column = torch.randint(SCENE - size + 1, (2, n, 1, 1), generator=generator)
        span = torch.arange(size)
        scene[torch.arange(n)[:, None, None], row + span[:, None], column + span] = pieces
        return scene

    for name, (count, stock) in SCENES.items():
        x, y = images[start : start + stock], labels[start : start + stock]
        start += stock
        chosen, *others = torch.randint(stock, (3, count), generator=generator)
        scene = placed(x[chosen])
        for other in others:
            scene = torch.maximum(scene, placed(x[other][:, 2:5, 2:5]))
        scene += 0.1 * torch.randn(scene.shape, generator=generator)
        parts[name] = (((scene - 0.2) / 0.3)[:, None], y[chosen])
    return parts


def scenes(network: Callable[[], nn.Module], seed: int) -> Data:
    parts = _scenes(seed)
    return Data(*(parts[name] for name in ("train", "valid", "test")), 10, network)


def rows(seed: int) -> Data:
    """The scenes as sequences of 12 rows."""
    data = scenes(lambda: networks.LastState(SCENE, 64), seed)
    parts = ((x.squeeze(1), y) for x, y in (data.train, data.valid, data.test))
    return Data(*parts, 10, data.network)


def graph(seed: int) -> Data:
    """1,500 nodes of 5 communities, which neighbours share more often than not, and 16 noisy features of each node.

    An input is the number of a node; the edges and features of all nodes are the network's.
    """
    generator = torch.Generator().manual_seed(seed)
    n, classes, features = 1500, 5, 16
    y = torch.randint(classes, (n,), generator=generator)
    likely = torch.where(y[:, None] == y, 0.012, 0.004)
    edges = (torch.rand(n, n, generator=generator) < likely).triu(1)
    near = (edges | edges.T | torch.eye(n, dtype=torch.bool)).float()
    centres = torch.randn(classes, features, generator=generator)
    x = 0.35 * centres[y] + torch.randn(n, features, generator=generator)
    parts = split(torch.arange(n), y, 500, 500)
    return Data(*parts, classes, lambda: networks.GraphNetwork(near, x, 64))


WINDOW, HELD_OUT = 64, 200


@functools.cache
def _help() -> Text:
    return load_text(None, "chars")


def characters(network: Callable[[int], nn.Module], seed: int) -> Data:
    """Windows of 64 characters of Python's help, and the characters that follow each of them."""
    text = _help()

    def windows(tokens: Tensor, most: int | None) -> Part:
        count = (len(tokens) - 1) // WINDOW
        used = count * WINDOW
        x, y = (tokens[k : used + k].view(count, WINDOW) for k in (0, 1))
        return (x, y) if most is None else (x[:: count // most][:most], y[:: count // most][:most])

    parts = (windows(text.train, None), *(windows(t, HELD_OUT) for t in (text.valid, text.test)))
    classes = len(text.vocabulary)
    return Data(*parts, classes, lambda: network(classes))


def cifar(path: Path, cache: Path, network: Callable[[], nn.Module], seed: int) -> Data:
    """10,000 images for training, 2,000 and 3,000, at half their size."""
    train_x, train_y, test_x, test_y = _small_images(path, cache)
    (train, valid, _) = split(train_x, train_y, min(10_000, len(train_y) * 5 // 6), 2000)
    return Data(train, valid, (test_x[:3000], test_y[:3000]), 10, network)


@functools.cache
def _small_images(path: Path, cache: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = load_images(path, cache)
    train, test = (
        nn.functional.avg_pool2d(x[:12_000].float(), 2) for x in (images.train_x, images.test_x)
    )
    dims = (0, 2, 3)
    mean, deviation = train.mean(dims, keepdim=True), train.std(dims, keepdim=True)
    train, test = ((x - mean) / deviation for x in (train, test))
    return train, images.train_y[:12_000], test, images.test_y


@dataclasses.dataclass(frozen=True)
class Kind:
    """A task by name: how its data is made from a seed, and how a network is trained on it."""

    data: Callable[[int], Data]
    steps: int
    batch: int
    regression: bool = False


_cnn = functools.partial(networks.ConvNet, 1)
_transformer = functools.partial(TransformerLM, features=64, layers=2, heads=4, context=WINDOW)
_large = functools.partial(TransformerLM, features=192, layers=5, heads=6, context=WINDOW)
KINDS = {
    "tabular": Kind(tabular, 600, 32),
    "regression": Kind(regression, 600, 32, regression=True),
    "autoencoder": Kind(autoencoder, 800, 32, regression=True),
    "digits": Kind(digits, 400, 32),
    "cnn": Kind(functools.partial(scenes, _cnn), 600, 32),
    "cnn-plain": Kind(functools.partial(scenes, functools.partial(_cnn, normalise=False)), 600, 32),
    "resnet": Kind(functools.partial(scenes, networks.SmallResNet), 400, 32),
    "gru": Kind(rows, 600, 32),
    "graph": Kind(graph, 200, 100),
    "lstm": Kind(functools.partial(characters, networks.CharacterLSTM), 500, 16),
    "transformer": Kind(functools.partial(characters, _transformer), 500, 10),
    # 2.3 million parameters.
    "large": Kind(functools.partial(characters, _large), 300, 8),
}
LARGE = "large"


def cifar_kinds(path: Path, cache: Path) -> dict[str, Kind]:
    """The tasks that need a file; `cache` is a folder for what was decoded."""
    names = {"cifar": True, "cifar-plain": False}
    return {
        name: Kind(
            functools.partial(
                cifar, path, cache, functools.partial(networks.ConvNet, 3, normalise=flag)
            ),
            500,
            64,
        )
        for name, flag in names.items()
    }


class SmallTask(Task):
    """A kind of task with its data on a device; the whole run, `steps` steps, is one epoch.

    `guess` is the loss of who knows the targets' distribution alone. Losses of regressions are half the mean squared
    error of an output, their accuracy the explained part of the variance in percent.
    """

    unit, per_nat = "nats", 1.0
    lr_range, clones = (1e-5, 10.0), 10
    data = "small"

    def __init__(
        self, kind: Kind, seed: int, device: torch.device, steps: int | None = None
    ) -> None:
        data = kind.data(seed)
        self.kind = kind
        self.regression = kind.regression
        self.classes = data.classes
        self.network = data.network
        self.count = steps or kind.steps
        self.train, *held_out = ((x.to(device), y.to(device)) for x, y in data[:3])
        self.parts = dict(zip(("valid", "test"), held_out))
        self.sizes = len(data.train[1]), len(data.valid[1]), len(data.test[1])
        self.guess = 0.5 if self.regression else math.log(self.classes)

    def backbone(self, width: float, dropout: float) -> nn.Module:
        return self.network()

    def steps(self) -> int:
        return self.count

    def batches(self, seed: int, epoch: int = 0) -> Iterator[Part]:
        """Passes over the training set, each in a new order, until the steps are done."""
        generator = torch.Generator().manual_seed(seed)
        x, y = self.train
        n, size = len(y), self.kind.batch
        per_pass = n // size
        for step in range(self.count):
            if step % per_pass == 0:
                order = torch.randperm(n, generator=generator).to(y.device)
            place = step % per_pass * size
            batch = order[place : place + size]
            yield x[batch], y[batch]

    def predictions(self, net: nn.Module, part: str) -> Iterator[Part]:
        for x, y in zip(*(tensor.split(500) for tensor in self.parts[part])):
            out = net(x)
            yield (out, y) if self.regression else (out.flatten(0, -2), y.flatten())

    def evaluate(self, net: nn.Module, part: str) -> Score:
        if not self.regression:
            return super().evaluate(net, part)
        out, y = (torch.cat(both).double() for both in zip(*self.predictions(net, part)))
        error = float((out - y).square().mean())
        return error / 2, 100 * (1 - error / float(y.square().mean()))
