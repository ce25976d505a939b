"""Optimizers in the wrappers of Lightning's Trainer and Fabric, which are of a subclass of the optimizer's class.

Protects against methods that act on the wrapper in place of the optimizer: rates without their bound, a loaded state
that no step uses, a saved one that has forgotten how far the run is, and steps while averages are shown.
"""

import pytest
import torch

import alrao_fast as alrao

lightning = pytest.importorskip("lightning")


def in_lightning(opt):
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(opt)


def in_fabric(opt):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    return fabric.setup_optimizers(opt)


WRAPPERS = pytest.mark.parametrize("wrap", [in_lightning, in_fabric])


def make(seed=0, steps=3):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh())
    net = alrao.AlraoModel(backbone, alrao.ClassifierClones(16, 3, 3))
    generator = torch.Generator().manual_seed(seed)
    opt = alrao.AlraoAdam(net, total_steps=40, generator=generator)
    for _ in range(steps):
        train(net, opt)
    return net, opt


def train(net, opt):
    opt.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 8, generator=generator), torch.arange(12) % 3
    net(x, targets=y).backward()
    opt.step()


def rates(opt):
    return [own["rate"] for own in opt.state.values()]


@WRAPPERS
def test_a_group_has_the_bound_of_its_rates(wrap):
    added = []
    for around in (lambda opt: opt, wrap):
        _, opt = make()
        torch.manual_seed(5)
        layer = torch.nn.Linear(16, 400)
        around(opt).add_param_group({"params": layer})
        own = opt.state[layer.weight]
        assert (own["rate"] <= own["rate_limit"]).all()
        added.append(own["rate"])
    torch.testing.assert_close(*added, rtol=0, atol=0)


@WRAPPERS
def test_states_are_the_optimizers(wrap):
    net, opt = make()
    saved = wrap(opt).state_dict()
    assert saved["param_groups"][0]["steps_taken"] == 3
    other_net, other = make(seed=1, steps=0)
    other_net.load_state_dict(net.state_dict())
    wrap(other).load_state_dict(saved)
    torch.testing.assert_close(rates(other), rates(opt), rtol=0, atol=0)
    for _ in range(2):
        train(net, opt)
        train(other_net, other)
    torch.testing.assert_close(other_net.state_dict(), net.state_dict(), rtol=0, atol=0)


@WRAPPERS
def test_averages_are_the_optimizers(wrap):
    net, opt = make()
    wrapped = wrap(opt)
    before = net.head.weight.detach().clone()
    with wrapped.averaged():
        assert not torch.equal(net.head.weight, before)
        with pytest.raises(RuntimeError, match=r"step\(\) within averaged\(\)"):
            opt.step()
    torch.testing.assert_close(net.head.weight, before, rtol=0, atol=0)
    opt.step()


@WRAPPERS
def test_narrowing_is_the_optimizers(wrap):
    nets, (opt, other) = zip(make(), make())
    wrap(opt).anneal_rates(0.5)
    other.anneal_rates(0.5)
    torch.testing.assert_close(rates(opt), rates(other), rtol=0, atol=0)
    # The heads know of it.
    torch.testing.assert_close(*(net.head.clone_lr for net in nets), rtol=0, atol=0)
