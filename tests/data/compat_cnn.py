"""A script as users of the authors' package write it: a small CNN on generated images."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from alrao import AlraoModel, LinearClassifier, alrao_step
from alrao.earlystopping import EarlyStopping
from alrao.optim_spec import init_alrao_optimizer
from alrao.utils import Subset, l2params

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--optim", default="SGD")
args = parser.parse_args()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.linearinputdim = 8 * 16

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return x.flatten(1)


torch.manual_seed(0)
labels = torch.randint(0, 4, (256,))
images = torch.randn(256, 1, 8, 8) * 0.3
for image, label in zip(images, labels):
    image[0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1
dataset = Subset(list(zip(images, labels)), range(200))
loader = torch.utils.data.DataLoader(dataset, batch_size=25, shuffle=True)

base = Net()
net = AlraoModel("classification", nn.NLLLoss(), base, 6, LinearClassifier, base.linearinputdim, 4)
optimizer = init_alrao_optimizer(net, 6, 1e-4, 1.0, optim_name=args.optim, momentum=0.0)
criterion = nn.NLLLoss()
stopping = EarlyStopping(patience=5)
l2params(net)
for epoch in range(args.epochs):
    net.train()
    net.switch.reset_ll_perf()
    total, correct = 0.0, 0
    for inputs, targets in loader:
        optimizer.zero_grad()
        outputs = net(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters_internal_nn(), 5.0)
        alrao_step(net, optimizer, criterion, targets, catch_up=True)
        total += loss.item() * len(targets)
        correct += outputs.max(1)[1].eq(targets).sum().item()
    print("epoch", epoch, "loss", total / 200, "accuracy", correct / 200, net.repr_posterior())
    print([(round(loss, 3), round(acc, 3)) for loss, acc in net.switch.get_ll_perf()])
    stopping.step(total)
    if stopping.stop:
        break
net.eval()
with torch.no_grad():
    accuracy = (net(images[200:]).argmax(1) == labels[200:]).float().mean().item()
print("test accuracy", accuracy)
