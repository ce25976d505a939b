"""CIFAR-10: a ResNet-18 by Alrao with momentum and a cosine schedule, in bfloat16 on a GPU.

python examples/cifar10.py --data DIR --download
"""

import argparse
import time

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2
from tqdm import tqdm

import alrao_fast as alrao

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def resnet(blocks: int) -> tuple[nn.Module, int]:
    """torchvision's ResNet for pictures of 32 x 32 as a backbone (2 blocks: ResNet-18), and the number of features."""
    net = models.ResNet(models.resnet.BasicBlock, [blocks] * 4)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    features = net.fc.in_features
    net.fc = nn.Identity()
    return net, features


def loaders(args: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    sets = []
    for train in (True, False):
        transform = v2.Compose([*(augment if train else ()), *to_tensor])
        if args.fake:
            sets.append(datasets.FakeData(args.fake, (3, 32, 32), 10, transform))
        else:
            sets.append(datasets.CIFAR10(args.data, train, transform, download=args.download))
    options = {"num_workers": args.workers, "pin_memory": args.device == "cuda"}
    return (
        DataLoader(sets[0], args.batch, shuffle=True, drop_last=True, **options),
        DataLoader(sets[1], 512, **options),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data", help="folder of CIFAR-10")
    parser.add_argument("--download", action="store_true", help="fetch it into that folder")
    parser.add_argument("--fake", type=int, metavar="N", help="N random pictures instead")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2, help="in each of four stages")
    parser.add_argument("--clones", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test = loaders(args)
    backbone, features = resnet(args.blocks)
    head = alrao.ClassifierClones(features, 10, num_clones=args.clones)
    net = alrao.AlraoModel(backbone, head).to(args.device, memory_format=torch.channels_last)
    opt = alrao.AlraoSGD(
        net, momentum=0.9, weight_decay=5e-4, generator=torch.Generator().manual_seed(0)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.epochs * len(train))
    amp = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")

    for epoch in range(args.epochs):
        net.train()
        start = time.perf_counter()
        for x, y in tqdm(train, desc=f"epoch {epoch + 1}", leave=False):
            x, y = x.to(args.device, non_blocking=True), y.to(args.device, non_blocking=True)
            opt.zero_grad()
            with amp:
                loss = net(x, targets=y)
            loss.backward()
            opt.step()
            schedule.step()
        seconds = time.perf_counter() - start

        net.eval()
        correct = 0
        with torch.no_grad(), amp:
            for x, y in test:
                correct += (net(x.to(args.device)).argmax(-1) == y.to(args.device)).sum()
        metrics = net.clone_metrics(reset=True)
        print(
            f"epoch {epoch + 1:3}   {seconds:.0f} s   best clone's loss {metrics['loss'].min():.3f}   "
            f"test accuracy {correct / len(test.dataset):.1%}   "
            f"clone {net.posterior().argmax().item()} is the best",
            flush=True,
        )


if __name__ == "__main__":
    main()
