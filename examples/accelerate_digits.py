"""Digits under Accelerate: any number of devices, mixed precision and accumulation by its configuration.

python examples/accelerate_digits.py
accelerate launch examples/accelerate_digits.py
"""

import argparse

import torch
from accelerate import Accelerator
from digits import data
from torch import nn
from torch.utils.data import DataLoader

import alrao_fast as alrao


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    args = parser.parse_args()

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate
    )
    # The same on every process: the same network and the same rates.
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train, test = data(generator)
    backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    net = alrao.AlraoModel(backbone, alrao.ClassifierClones(256, 10))
    opt = alrao.AlraoSGD(net, generator=generator)
    net, opt, loader, test_loader = accelerator.prepare(
        net,
        opt,
        DataLoader(train, batch_size=32, shuffle=True, drop_last=True),
        DataLoader(test, batch_size=64),
    )

    for _ in range(args.epochs):
        net.train()
        for x, y in loader:
            with accelerator.accumulate(net):
                loss = net(x, targets=y)
                accelerator.backward(loss)
                opt.step()
                opt.zero_grad()

    net.eval()
    correct = []
    for x, y in test_loader:
        with torch.no_grad():
            correct.append(accelerator.gather_for_metrics(net(x).argmax(-1) == y))
    plain = accelerator.unwrap_model(net)
    accelerator.print(f"test accuracy {torch.cat(correct).double().mean():.1%}")
    accelerator.print(f"learning rate for a later SGD run: {plain.suggested_lr():.2g}")


if __name__ == "__main__":
    main()
