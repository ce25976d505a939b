"""Which network for scikit-learn's digits? Six architectures ranked by Alrao, without a learning-rate search.

python examples/rank_digits.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import alrao_fast as alrao


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip((64, *widths), widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def cnn(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, valid = (
        TensorDataset(images[part], labels[part]) for part in (order[360:], order[:360])
    )

    ranking = alrao.rank(
        {
            "linear": nn.Flatten,
            "8": lambda: mlp(8),
            "256": lambda: mlp(256),
            "32-32-32-32": lambda: mlp(32, 32, 32, 32),
            "cnn 4": lambda: cnn(4),
            "cnn 16": lambda: cnn(16),
        },
        DataLoader(train, batch_size=32, shuffle=True),
        DataLoader(valid, batch_size=512),
        num_classes=10,
        epochs=args.epochs,
        seeds=args.seeds,
    )
    print(ranking)


if __name__ == "__main__":
    main()
