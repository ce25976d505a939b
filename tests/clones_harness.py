"""What the tests of the heads share: small heads, batches, and each clone's loss by itself."""

import math

import torch
import torch.nn.functional as F

from alrao_fast.nn import ClassifierClones, RegressorClones

D, C, N = 6, 4, 3


def classifier(**arguments):
    return ClassifierClones(D, C, N, **arguments)


def regressor(**arguments):
    return RegressorClones(D, C, N, **arguments)


def batch(*shape, dtype=torch.float32):
    return torch.randn(*shape, D, dtype=dtype, requires_grad=True), torch.randint(C, shape)


def soft(*shape):
    """Targets of probabilities."""
    return torch.rand(*shape, C).softmax(-1)


def concentrate(head, *log_likelihood):
    """Give the switch a posterior that is not uniform."""
    head.switch.update(torch.tensor(log_likelihood, dtype=torch.float64))


def state(head):
    return [b.clone() for b in head.buffers()]


def assert_same(a, b):
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def own_losses(head, x, y):
    """Each clone's loss by itself, with its own graph."""
    outputs = [
        F.linear(x, w, None if head.bias is None else head.bias[n])
        for n, w in enumerate(head.weight)
    ]
    if isinstance(head, ClassifierClones):
        return [F.cross_entropy(out.flatten(0, -2), y.flatten()) for out in outputs]
    constant = 0.5 * C * math.log(2 * math.pi * head.sigma2)
    return [((out - y).square().sum(-1) / (2 * head.sigma2)).mean() + constant for out in outputs]
