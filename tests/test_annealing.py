"""The interval of the rates that narrows during a run. Protects:

- the formula by hand: where log-rates lie for a posterior, a progress and a width, and that they stay in the interval;
- rates rewritten in place, shared vectors once, Constant's not; the heads show the clones' present rates;
- parameters added during a run have rates as narrow as the others';
- `total_steps`: warm-up, averages and narrowing together, checkpoints that go on bit for bit, refusals;
- a captured step counts its replays.
"""

import copy
import math

import pytest
import torch
from checkpoint_harness import assert_same_state, build, generator, train
from torch import nn

import alrao_fast as alrao
from alrao_fast import AlraoAdam, AlraoSGD, Constant, LogTriangular


def set_posterior(model, posterior):
    switch = model.head.switch
    weights = torch.tensor(posterior, dtype=torch.float64)
    switch.log_posterior.copy_(weights.log())


def log_rates(opt, param):
    return opt.state[param]["rate"].double().log10()


def test_by_hand():
    """The interval (1e-4, 1), in powers of ten: middle -2, half width 2; clones at -4, -8/3, -4/3, 0.

    All mass is at -4/3, which stays where it is. 0.4 of four decades are a tenth, so after a third of the run k = 1/4:
    the middle goes to 1/4 * -2 + 3/4 * -4/3 = -1.5, a rate at -4 to -2, one at 0 to -1. At the end k = .1: the middle
    at -1.4.
    """
    model = build()
    opt = AlraoSGD(model, (1e-4, 1.0), generator=generator(0))
    weight = model.backbone[0].weight
    drawn = log_rates(opt, weight)
    tensor, shared = opt.state[weight]["rate"], opt.state[model.backbone[0].bias]["rate"]
    set_posterior(model, [0.0, 0.0, 1.0, 0.0])
    close = {"rtol": 0, "atol": 1e-6}
    for progress, middle, keep in ((1 / 3, -1.5, 0.25), (1.0, -1.4, 0.1), (0.0, -2, 1)):
        opt.anneal_rates(progress)
        torch.testing.assert_close(log_rates(opt, weight), middle + keep * (drawn + 2), **close)
        ends = torch.tensor([middle - 2 * keep, middle + 2 * keep], dtype=torch.float64)
        torch.testing.assert_close(log_rates(opt, model.head.weight)[[0, -1]], ends, **close)
        assert torch.equal(model.head.clone_lr, opt.state[model.head.weight]["rate"])
    assert opt.state[weight]["rate"] is tensor and shared is tensor
    opt.anneal_rates(1.0, width=0.0)
    assert log_rates(opt, weight).unique().numel() == 1
    opt.anneal_rates(0.0, width=0.0)
    assert torch.equal(log_rates(opt, weight), drawn)


@pytest.mark.parametrize("interval", [(1e-6, 1e3), (1e-4, 1.0), (1e-3, 1e-2), (0.1, 0.2)])
def test_intervals_end_equally_wide(interval):
    """In decades, where they were wider; k = 1 / (1 + q (1 / w - 1)) on the way, with w = 0.4 / decades."""
    model = build()
    opt = AlraoSGD(model, interval, generator=generator(0))
    weight = model.backbone[0].weight
    drawn, decades = log_rates(opt, weight), math.log10(interval[1] / interval[0])
    for q in (0.1, 0.5, 1.0):
        opt.anneal_rates(q)
        kept = float(log_rates(opt, weight).std() / drawn.std())
        expected = 1 / (1 + q * (decades / 0.4 - 1)) if decades > 0.4 else 1
        assert kept == pytest.approx(expected, rel=1e-4)


def test_rates_stay_in_the_interval_they_were_drawn_from():
    model = build()
    opt = AlraoSGD(model, (1e-4, 1.0), generator=generator(0))
    for posterior in ([0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]):
        set_posterior(model, posterior)
        for k in range(41):
            opt.anneal_rates(k / 40)
            for param in model.parameters():
                rate = opt.state[param]["rate"]
                assert float(rate.min()) >= 1e-4 * (1 - 1e-6) and float(rate.max()) <= 1 + 1e-6


def test_where_all_clones_are_dead_rates_stay_finite():
    model = build()
    opt = AlraoSGD(model, (1e-4, 1.0), generator=generator(0))
    set_posterior(model, [0.0] * 4)
    opt.anneal_rates(0.5)
    assert all(opt.state[p]["rate"].isfinite().all() for p in model.parameters())


def test_the_heads_show_the_narrowed_rates():
    model = build()
    opt = AlraoSGD(model, (1e-4, 1.0), generator=generator(0))
    train(model, opt, range(3))
    opt.anneal_rates(1.0)
    expected = opt.state[model.head.weight]["rate"].clone()
    assert torch.equal(copy.deepcopy(model).head.clone_lr, expected)
    del opt
    assert torch.equal(model.head.clone_lr, expected)


def test_a_cleared_state_narrows_once():
    model = build()
    opt = AlraoSGD(model, (1e-4, 1.0), generator=generator(0))
    drawn = opt.state[model.backbone[0].weight]["rate"].clone()
    opt.anneal_rates(1.0)
    opt.state.clear()
    opt.anneal_rates(1.0)
    opt.anneal_rates(0.0)
    torch.testing.assert_close(opt.state[model.backbone[0].weight]["rate"], drawn)


def test_a_loaded_interval_counts():
    def two(lr_range):
        model = build()
        groups = [{"params": model.backbone, "lr_range": lr_range}, {"params": model.head}]
        return model, AlraoSGD(groups, generator=generator(0))

    (model, opt), (again, other) = two((1e-5, 0.1)), two((1e-2, 100.0))
    other.load_state_dict(opt.state_dict())
    for optimizer in (opt, other):
        optimizer.anneal_rates(1.0)
    rates = [o.state[m.backbone[0].weight]["rate"] for o, m in ((opt, model), (other, again))]
    assert torch.equal(*rates)


@pytest.mark.parametrize("total", [3, 40, 79, 1039])
def test_how_often_a_run_narrows(total, monkeypatch):
    from alrao_fast.optim import annealing

    model, seen = build(), []
    opt = AlraoAdam(model, total_steps=total)
    monkeypatch.setattr(annealing, "anneal", lambda opt, progress, width: seen.append(progress))
    for _ in range(total + 50):
        opt._run.count(opt)
    assert len(seen) == min(total, 40) and seen[-1] == 1


def test_on_meta():
    model = build().to("meta")
    opt = AlraoAdam(model, total_steps=20)
    assert opt.state[model.backbone[0].weight]["drawn_rate"].device.type == "cpu"


def test_a_checkpoint_without_averages_is_told():
    model = build()
    saved = AlraoAdam(model).state_dict()
    with pytest.warns(UserWarning, match="written without averages"):
        AlraoAdam(model, total_steps=20).load_state_dict(saved)


def test_groups_of_other_samplers():
    model = build()
    groups = [
        {"params": model.backbone, "sampler": Constant(0.25)},
        {"params": model.head, "lr_range": (1e-3, 1e-1)},
    ]
    opt = AlraoSGD(groups, generator=generator(0))
    set_posterior(model, [0.0, 0.0, 0.0, 1.0])
    opt.anneal_rates(1.0)
    assert opt.state[model.backbone[0].weight]["rate"].unique().tolist() == [0.25]
    assert "drawn_rate" not in opt.state[model.backbone[0].weight]
    # What the clones agree on stays where it is.
    clones = log_rates(opt, model.head.weight)
    torch.testing.assert_close(float(clones[-1]), -1.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["add_param_group", "by hand"])
@pytest.mark.parametrize("taken", [0, 7, 30, 100, 250])
def test_parameters_added_during_a_run(taken, how):
    """Their rates are those of the narrowing before, and the others stay what they are."""
    model = build()
    opt = AlraoAdam(model, total_steps=100, rate_bound=None, generator=generator(0))
    set_posterior(model, [0.0, 0.0, 1.0, 0.0])
    opt._run.taken = taken
    last = min(taken, 100) * 40 // 100 * 100 / 40
    opt.anneal_rates(math.ceil(last) / 100)
    before = {p: opt.state[p]["rate"].clone() for p in model.parameters()}
    layer = nn.Linear(5, 400)
    if how == "by hand":
        opt.param_groups[0]["params"] += [layer.weight, layer.bias]
        with pytest.warns(UserWarning, match="bare tensors"):
            opt.refresh()
    else:
        opt.add_param_group({"params": layer})
    assert all(torch.equal(opt.state[p]["rate"], rate) for p, rate in before.items())
    own = opt.state[layer.weight]
    found = own["rate"].clone()
    assert found.log().std() < 0.7 * own["drawn_rate"].log().std() or taken < 7
    opt.anneal_rates(math.ceil(last) / 100)
    assert torch.equal(own["rate"], found)
    assert torch.equal(own["rate"], own["drawn_rate"]) == (taken == 0)
    opt.load_state_dict(opt.state_dict())


def test_refusals():
    plain = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"params: got no clones.*warmup_steps= and averaging="):
        AlraoSGD(plain).anneal_rates(0.5)
    with pytest.raises(ValueError, match="params: got no clones"):
        AlraoAdam(plain, total_steps=10)
    opt = AlraoSGD(build())
    with pytest.raises(ValueError, match=r"progress: got 1\.5"):
        opt.anneal_rates(1.5)
    with pytest.raises(ValueError, match=r"width: got -0\.5"):
        opt.anneal_rates(0.5, width=-0.5)
    for wrong, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="total_steps: got"):
            AlraoAdam(build(), total_steps=wrong)


def test_total_steps_is_the_whole_recipe():
    model, by_hand = build(), build()
    opt = AlraoAdam(model, total_steps=80, rate_bound=None, generator=generator(0))
    options = {"warmup_steps": 4, "averaging": 8.0, "rate_bound": None}
    other = AlraoAdam(by_hand, generator=generator(0), **options)
    for step in range(90):
        train(model, opt, [step])
        train(by_hand, other, [step])
        if step < 80 and step % 2:
            other.anneal_rates((step + 1) / 80)
    for p, q in zip(model.parameters(), by_hand.parameters()):
        assert torch.equal(p, q)
        own, others = opt.state[p], other.state[q]
        assert torch.equal(own["rate"], others["rate"])
        if p.requires_grad:
            assert torch.equal(own["average"], others["average"])
    drawn = opt.state[model.backbone[0].weight]["drawn_rate"].log()
    spread = opt.state[model.backbone[0].weight]["rate"].log()
    torch.testing.assert_close(spread.std() / drawn.std(), torch.tensor(0.1), rtol=1e-4, atol=0)
    assert AlraoAdam(model, total_steps=80, averaging=False).param_groups[0]["averaging"] is None
    given = AlraoAdam(model, total_steps=80, averaging=2, warmup_steps=0).param_groups[0]
    assert (given["averaging"], given["warmup_steps"]) == (2, 0)


@pytest.mark.parametrize("at", [0, 3, 21, 40])
def test_a_checkpoint_goes_on(at):
    model = build()
    opt = AlraoAdam(model, total_steps=40, generator=generator(0))
    train(model, opt, range(at))
    again = build(seed=7)
    again.load_state_dict(model.state_dict())
    other = AlraoAdam(again, total_steps=40, generator=generator(1))
    saved = copy.deepcopy(opt.state_dict())
    if at == 21:
        # As flattened by torch.distributed.checkpoint.
        for group in saved["param_groups"]:
            del group["steps_taken"]
    other.load_state_dict(saved)
    copied, copied_opt = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (again, other), (copied, copied_opt)):
        train(m, o, range(at, 44))
    assert_same_state(opt, other)
    assert_same_state(opt, copied_opt)
    assert opt.state_dict()["param_groups"][0]["steps_taken"] == 44
    assert "steps_taken" not in opt.param_groups[0]


def test_a_run_of_fewer_steps_than_narrowings():
    model = build()
    opt = AlraoAdam(model, total_steps=3, rate_bound=None, generator=generator(0))
    train(model, opt, range(3))
    own = opt.state[model.backbone[0].weight]
    ratio = own["rate"].log().std() / own["drawn_rate"].log().std()
    torch.testing.assert_close(ratio, torch.tensor(0.1), rtol=1e-4, atol=0)


def test_a_compiled_step():
    """As one graph it could not count: Python takes the step then."""
    model = build()
    opt = AlraoAdam(model, total_steps=40)
    model(torch.randn(10, 6), targets=torch.randint(3, (10,))).backward()
    compiled = torch.compile(opt.step, backend="eager")
    for _ in range(3):
        compiled()
    assert opt._run.taken == 3


def test_a_captured_step_counts_its_replays(monkeypatch):
    """A repetition of the step stands in for the capture."""
    from alrao_fast import graphed_step

    def capture(step, warm_up, steps, device):
        warm_up(steps)
        out = step()
        opt = optimizers[0]

        def replay():
            # Python counts nothing while a graph replays.
            run, opt._run = opt._run, None
            step()
            opt._run = run

        return replay, out

    monkeypatch.setattr(graphed_step, "_capture", capture)
    monkeypatch.setattr(graphed_step, "_device_of", lambda tensors: torch.device("cpu"))
    models = [build() for _ in range(2)]
    optimizers = [AlraoAdam(m, total_steps=40, generator=generator(0)) for m in models]
    torch.manual_seed(5)
    batches = [(torch.randn(10, 6), torch.randint(3, (10,))) for _ in range(20)]
    run = alrao.GraphedStep(models[0], optimizers[0], *batches[0])
    # The stand-in has taken one step where a capture takes none.
    assert optimizers[0]._run.taken == 0
    for x, y in batches:
        run(x, y)
    assert optimizers[0]._run.taken == 20
    rate = optimizers[0].state[models[0].backbone[0].weight]["rate"]
    assert rate.log().std() < 0.6 * log_std(optimizers[1], models[1])


def log_std(opt, model):
    return float(opt.state[model.backbone[0].weight]["drawn_rate"].log().std())


def test_triangular_rates_narrow_alike():
    model = build()
    opt = AlraoSGD(model, sampler=LogTriangular(1e-3, 1.0), generator=generator(0))
    weight = model.backbone[0].weight
    drawn, clones = log_rates(opt, weight), model.head.clone_lr.clone()
    opt.anneal_rates(1.0)
    expected = (drawn + 1.5) * 0.4 / 3
    actual = log_rates(opt, weight)
    torch.testing.assert_close(
        actual - actual.mean(), expected - expected.mean(), rtol=0, atol=1e-6
    )
    before, after = (rates.log10().diff() for rates in (clones, model.head.clone_lr))
    torch.testing.assert_close(after, 0.4 / 3 * before, rtol=1e-4, atol=0)
