"""The plain loop: scikit-learn's digits by Alrao, without choosing a learning rate.

python examples/digits.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import alrao_fast as alrao


def data(generator: torch.Generator) -> tuple[TensorDataset, TensorDataset]:
    """1,437 images to train on, 360 to test on, 8 x 8 pixels each."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    train, test = random_split(
        TensorDataset(images, torch.tensor(labels)), (0.8, 0.2), generator=generator
    )
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--clones", type=int, default=10, help="copies of the last layer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    train, test = data(generator)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)

    backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    head = alrao.ClassifierClones(in_features=256, num_classes=10, num_clones=args.clones)
    net = alrao.AlraoModel(backbone, head)
    opt = alrao.AlraoAdam(net, total_steps=args.epochs * len(loader), generator=generator)

    for epoch in range(args.epochs):
        net.train()
        for x, y in loader:
            opt.zero_grad()
            loss = net(x, targets=y)
            loss.backward()
            opt.step()

        net.eval()
        with torch.no_grad(), opt.averaged():
            x, y = test[:]
            accuracy = (net(x).argmax(-1) == y).double().mean().item()
        best = net.posterior().argmax()
        print(
            f"epoch {epoch + 1:3}   loss {loss.item():.4f}   test accuracy {accuracy:.1%}   "
            f"best clone {best.item()}, learning rate {head.clone_lr[best]:.1e}"
        )

    print(f"a learning rate to start a plain Adam run from: {net.suggested_lr():.2g}")
    print(net.collapse("best"))


if __name__ == "__main__":
    main()
