"""Protects head.log_likelihood: log-probabilities of targets and entropies of predictions, in chunks of samples.

- They and their gradients are those of the head's log-probabilities, under a softcap, too.
- What does not count, and dead clones; no tensor of all samples and classes.
"""

import math

import pytest
import torch
from clones_harness import C, batch, classifier, concentrate, soft
from mixture_harness import NAN

from alrao_fast.nn import ClassifierClones


@pytest.mark.parametrize("memory_budget", [None, 1], ids=["one chunk", "a chunk per sample"])
def test_log_likelihood(memory_budget):
    head = classifier(dtype=torch.float64, logit_softcap=1.5, memory_budget=memory_budget)
    concentrate(head, -1.0, -2.0, -1.5)
    x, y = batch(3, 4, dtype=torch.float64)
    before = [buffer.clone() for buffer in head.buffers()]
    log_prob, entropy = head.log_likelihood(x, y)
    assert all(a.equal(b) or a.isnan().all() for a, b in zip(head.buffers(), before))
    expected = head(x)
    own = expected.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_prob, own)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=expected).entropy())
    tensors = x, head.weight, head.bias
    found = torch.autograd.grad((log_prob * entropy).sum(), tensors)
    want = torch.autograd.grad((own * -(expected.exp() * expected).sum(-1)).sum(), tensors)
    torch.testing.assert_close(found, want)
    # Expected log-probabilities.
    q = soft(3, 4).double()
    torch.testing.assert_close(head.log_likelihood(x, q)[0], (q * expected).sum(-1))


def test_log_likelihood_of_what_does_not_count():
    head = classifier()
    x, y = batch(4)
    y[1] = -100
    x = torch.where(torch.tensor([[False], [True], [False], [False]]), NAN, x).detach()
    x.requires_grad_()
    log_prob, entropy = head.log_likelihood(x, y)
    assert log_prob[1] == 0 and entropy[1] == 0
    (log_prob.sum() + entropy.sum()).backward()
    assert x.grad.isfinite().all() and head.weight.grad.isfinite().all()
    with torch.no_grad():
        head.weight.fill_(NAN)
    log_prob, entropy = head.log_likelihood(x.detach(), y)
    assert log_prob.tolist() == [-math.inf, 0, -math.inf, -math.inf] and not entropy.any()
    with pytest.raises(
        (RuntimeError, ValueError), match="target: got 4 at position 0, expected a class"
    ):
        head.log_likelihood(x, torch.full_like(y, C))


def test_log_likelihood_never_holds_all_classes():
    head = ClassifierClones(2, 500, 2, memory_budget=4 * 500 * 4 * 4)
    x = torch.randn(64, 2, requires_grad=True)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tensor.numel())
            return out

    with Sizes():
        log_prob, entropy = head.log_likelihood(x, torch.zeros(64, dtype=torch.int64))
        (log_prob.sum() + entropy.sum()).backward()
    assert max(sizes) <= 4 * 2 * 500


@pytest.mark.parametrize("memory_budget", [None, 1])
def test_gradcheck_of_log_likelihood(memory_budget):
    head = classifier(dtype=torch.float64, memory_budget=memory_budget)
    x, y = batch(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: head.log_likelihood(x, y), (x,))
