"""Protects feature_adam_, one Adam or AdamW step with a learning rate per feature:

- every backend as near to the float64 truth as the reference, for all layouts, dtypes and options at once, with tensors
  at different steps in one call; 50 steps along torch.optim.Adam and AdamW when all rates are equal;
- float32 moments and masters of bf16 and fp16 parameters, stochastic rounding to the reference's very bits;
- skipped steps, gradients left alone, version counters, errors before anything is written, the plan;
- opcheck and torch.compile(fullgraph=True).

Layout walking, conversions and plans are shared with feature_sgd_ and are tested closely there.
"""

import math

import pytest
import torch

from alrao_fast import testing
from alrao_fast.ops import feature_adam
from alrao_fast.ops.feature import Scalars
from alrao_fast.ops.feature_adam import feature_adam_

OP = "feature_adam"

OPTIONS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "betas, eps": {"betas": (0.5, 0.8), "eps": 1e-3},
    "multiplier": {"lr": 0.3},
    "multiplier in a tensor": {"lr": torch.tensor(0.3)},
    "loss scale": {"grad_scale": torch.tensor([8.0]), "found_inf": torch.tensor([0.0])},
    "amsgrad": {"amsgrad": True},
    "amsgrad, decoupled decay": {
        "amsgrad": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
    },
    "authors": {"eps_rule": "authors", "eps": 1e-3},
    "authors, amsgrad, weight decay": {
        "eps_rule": "authors",
        "amsgrad": True,
        "weight_decay": 0.1,
        "eps": 1e-3,
    },
}


def moments(problem, amsgrad, dtype=None):
    """m, v and, with amsgrad, v_max; zeros where the tensor's first step is to come, as `first_steps` has it."""
    lists = []
    for value in (0.25, 0.5, 0.75)[: 2 + amsgrad]:
        lists.append(
            [
                torch.full_like(p, value * (t % 2), dtype=dtype or p.dtype)
                for t, p in enumerate(problem.params)
            ]
        )
    return lists


def first_steps(problem):
    """Every second tensor has had three updates before."""
    return torch.arange(len(problem.params), device=problem.params[0].device) % 2 * 3


def run(problem, impl, options, *, state_dtype=None, updates=3):
    """Several updates; returns the lists of states."""
    device = problem.params[0].device
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    states = moments(problem, options.pop("amsgrad", False), state_dtype)
    steps = first_steps(problem)
    for _ in range(updates):
        feature_adam_(
            problem.params,
            problem.grads,
            states[0],
            states[1],
            problem.rates,
            steps=steps,
            max_exp_avg_sqs=states[2] if len(states) > 2 else None,
            inners=problem.inners,
            impl=impl,
            **options,
        )
    assert torch.equal(steps, first_steps(problem) + updates)
    return states


def compare(backend, device, dtype, options, *, state_dtype=None):
    if backend == "reference":
        pytest.skip("the reference itself")
    actual, expected = testing.feature_problem(dtype, device), testing.feature_problem(dtype)
    truth = expected.to(torch.float64)
    got = run(actual, backend, options, state_dtype=state_dtype)
    own = run(expected, "reference", options, state_dtype=state_dtype)
    true = run(truth, "reference", options)
    names, check = actual.names, testing.assert_feature_within_budget
    check(actual.params, expected.params, truth.params, names, "parameter")
    for k, name in enumerate(("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: len(got)]):
        check(got[k], own[k], true[k], names, name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_equals_the_reference(backend, device, dtype, options):
    compare(backend, device, dtype, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_moments_of_low_precision_parameters(backend, device, dtype):
    compare(backend, device, dtype, {"weight_decay": 0.1}, state_dtype=torch.float32)


def test_by_hand(backend, device):
    """betas (1/2, 1/2), eps 0, one step from m = v = 0 with g = 2 and rates 1/2 and 1/4.

    m = 1, v = 2; both corrections are 1/2, so m / (1 - beta1) = 2 and sqrt(v / (1 - beta2)) = 2: the change is the
    rate itself. Decoupled decay 1/2 first: p = 4 * (1 - r/2) - r = 2.5 and 3.25.
    """
    param = torch.full((2, 1), 4.0, dtype=torch.float64, device=device)
    m, v = torch.zeros_like(param), torch.zeros_like(param)
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    feature_adam_(
        [param],
        [torch.full_like(param, 2.0)],
        [m],
        [v],
        [torch.tensor([0.5, 0.25], device=device)],
        steps=steps,
        betas=(0.5, 0.5),
        eps=0.0,
        weight_decay=0.5,
        decoupled_weight_decay=True,
        impl=backend,
    )
    torch.testing.assert_close(param.flatten().tolist(), [2.5, 3.25], rtol=1e-15, atol=0)
    assert m.tolist() == [[1.0], [1.0]] and v.tolist() == [[2.0], [2.0]] and steps.tolist() == [1]


@pytest.mark.parametrize(
    "peer, options",
    [
        ("Adam", {}),
        ("Adam", {"betas": (0.8, 0.95), "eps": 1e-4, "maximize": True}),
        ("Adam", {"weight_decay": 0.05, "amsgrad": True}),
        ("AdamW", {"weight_decay": 0.05}),
        ("AdamW", {"weight_decay": 0.05, "amsgrad": True, "maximize": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_fifty_steps_with_equal_rates_follow_torch(backend, device, dtype, peer, options):
    lr = 0.02
    names = ["rows of a linear layer", "channels_last"]
    problem = testing.feature_problem(dtype, device, names=names)
    peers = [p.clone().requires_grad_() for p in problem.params]
    optimizer = getattr(torch.optim, peer)(peers, lr=lr, **options)
    ours = {k: v for k, v in options.items() if k != "amsgrad"}
    states = [[torch.zeros_like(p) for p in peers] for _ in range(3)]
    steps = torch.zeros(len(peers), dtype=torch.int64, device=device)
    rates = [torch.full_like(r, 0.5) for r in problem.rates]
    for k in range(50):
        grads = [g * (1 + k % 3) + 0.1 * p.detach() for g, p in zip(problem.grads, peers)]
        for target, grad in zip(peers, grads):
            target.grad = grad.clone()
        optimizer.step()
        feature_adam_(
            problem.params,
            grads,
            states[0],
            states[1],
            rates,
            steps=steps,
            max_exp_avg_sqs=states[2] if options.get("amsgrad") else None,
            inners=problem.inners,
            lr=2 * lr,
            decoupled_weight_decay=peer == "AdamW",
            impl=backend,
            **ours,
        )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for param, target in zip(problem.params, peers):
        torch.testing.assert_close(param, target.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters(backend, device, dtype):
    start = torch.linspace(-3, 3, 1000, device=device)
    grad = torch.linspace(2, -1, 1000, device=device).to(dtype)
    rates = torch.logspace(-5, 0, 10, device=device)
    param, master = start.to(dtype), start.clone()
    plain = start.clone()
    steps = torch.zeros(1, dtype=torch.int64, device=device)
    for values, gradient, masters in ((param, grad, [master]), (plain, grad.float(), None)):
        states = [[torch.zeros(1000, device=device)] for _ in range(2)]
        feature_adam_(
            [values],
            [gradient],
            *states,
            [rates],
            steps=steps.clone(),
            inners=[100],
            masters=masters,
            impl=backend,
        )
    torch.testing.assert_close(master, plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_gives_the_references_bits(backend, device, dtype):
    """On the first step with these betas and eps = 0 the change is exactly +-rate, and m = v = 0 is exact."""
    numel, step = 37 * 501, 0
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(numel, generator=generator).to(device, dtype)
    rates = 2.0 ** torch.randint(-12, -4, (37,), generator=generator).to(device)
    grad = torch.where(torch.rand(numel, generator=generator) < 0.5, -1.0, 1.0).to(device, dtype)
    results = []
    for impl in (backend, "reference"):
        param = start.clone()
        states = [[torch.zeros(numel, device=device)] for _ in range(2)]
        feature_adam_(
            [param],
            [grad],
            *states,
            [rates],
            steps=torch.tensor([step], device=device),
            inners=[501],
            seeds=[2**35 + 9],
            betas=(0.5, 0.75),
            eps=0.0,
            impl=impl,
        )
        results.append(param)
    assert torch.equal(*results)
    assert 0.1 < float((results[0] != start).float().mean()) < 0.999


def test_amsgrad_keeps_a_nan(backend, device):
    param, grad = torch.ones(3, device=device), torch.ones(3, device=device)
    largest = torch.tensor([math.nan, 5.0, 0.0], device=device)
    steps = torch.ones(1, dtype=torch.int64, device=device)
    feature_adam_(
        [param],
        [grad],
        [torch.zeros(3, device=device)],
        [torch.zeros(3, device=device)],
        [torch.ones(1, device=device)],
        steps=steps,
        max_exp_avg_sqs=[largest],
        betas=(0.5, 0.5),
        impl=backend,
    )
    assert largest[0].isnan() and largest[1:].tolist() == [5.0, 0.5] and param[0].isnan()


def test_found_inf_skips_everything(backend, device):
    problem = testing.feature_problem(torch.float32, device)
    before = problem.to(torch.float32)
    states = moments(problem, True)
    copies = [[x.clone() for x in state] for state in states]
    steps = first_steps(problem)
    feature_adam_(
        problem.params,
        problem.grads,
        *states[:2],
        problem.rates,
        steps=steps,
        max_exp_avg_sqs=states[2],
        inners=problem.inners,
        found_inf=torch.ones(1, device=device),
        impl=backend,
    )
    assert torch.equal(steps, first_steps(problem))
    for got, want in zip([problem.params, *states], [before.params, *copies]):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_reads_gradients_only_and_bumps_versions_of_what_it_writes(backend, device):
    problem = testing.feature_problem(torch.float32, device)
    params = [torch.nn.Parameter(p) for p in problem.params]
    before = problem.to(torch.float32)
    states, steps = moments(problem, True), first_steps(problem)
    written = [*params, *(x for state in states for x in state), steps]
    versions = [t._version for t in written]
    feature_adam_(
        params,
        problem.grads,
        *states[:2],
        problem.rates,
        steps=steps,
        max_exp_avg_sqs=states[2],
        inners=problem.inners,
        grad_scale=torch.full((1,), 2.0, device=device),
        weight_decay=0.1,
        impl=backend,
    )
    assert all(torch.equal(a, b) for a, b in zip(problem.grads, before.grads))
    assert all(t._version > v for t, v in zip(written, versions))


INVALID = {
    "gradients": (lambda a: a["grads"].pop(), "grads has 1 entries, expected 2"),
    "first moments": (lambda a: a["exp_avgs"].pop(), "exp_avgs has 1 entries, expected 2"),
    "no second moments": (lambda a: a["exp_avg_sqs"].clear(), "exp_avg_sqs"),
    "largest second moments": (
        lambda a: a.update(max_exp_avg_sqs=[torch.zeros(3, 4)]),
        "max_exp_avg_sqs has 1 entries, expected 2",
    ),
    "moment's shape": (
        lambda a: a["exp_avg_sqs"].__setitem__(0, torch.zeros(4, 3)),
        r"exp_avg_sqs\[0\] has shape \[4, 3\] .*, expected those of params\[0\], shape \[3, 4\]",
    ),
    "moment's dtype": (
        lambda a: a["exp_avgs"].__setitem__(1, torch.zeros(5, dtype=torch.double)),
        r"exp_avgs\[1\] has dtype float64, expected float32 as params\[1\]",
    ),
    "sparse gradient": (
        lambda a: a["grads"].__setitem__(0, a["grads"][0].to_sparse()),
        r"grads\[0\] is sparse, expected an ordinary \(dense\) gradient",
    ),
    "rate": (
        lambda a: a["rates"].__setitem__(0, torch.ones(2)),
        r"rates\[0\] has 2 entries and inners\[0\] is 4, which does not divide params\[0\] of 12",
    ),
    "moments in the same memory": (
        lambda a: a["exp_avg_sqs"].__setitem__(0, a["exp_avgs"][0]),
        "share memory, expected each tensor once",
    ),
}


@pytest.mark.parametrize("change, message", INVALID.values(), ids=INVALID)
def test_invalid_arguments_are_named_and_nothing_is_written(backend, device, change, message):
    if device.type != "cpu":
        pytest.skip("the cases are CPU tensors")
    shapes = ((3, 4), (5,))
    arguments = {
        name: [torch.zeros(shape) for shape in shapes]
        for name in ("params", "exp_avgs", "exp_avg_sqs")
    }
    arguments["grads"] = [torch.ones(shape) for shape in shapes]
    arguments |= {"rates": [torch.ones(3), torch.ones(5)], "inners": [4, 1]}
    arguments["steps"] = torch.zeros(2, dtype=torch.int64)
    change(arguments)
    with pytest.raises(RuntimeError, match="feature_adam_: .*" + message):
        feature_adam_(**arguments, impl=backend)
    written = [*arguments["params"], *arguments["exp_avgs"], *arguments["exp_avg_sqs"]]
    assert not any(t.any() for t in [*written, arguments["steps"]])


def test_unknown_rule():
    with pytest.raises(ValueError, match="eps_rule: got 'fast', expected 'torch' or 'authors'"):
        feature_adam_([], [], [], [], [], steps=torch.zeros(0, dtype=torch.int64), eps_rule="fast")


# ---- the dispatcher and the plan -----------------------------------------------------------------


SCALARS = {
    "lr": 1.0,
    "lr_tensor": None,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "amsgrad": False,
    "decoupled": True,
    "maximize": False,
    "authors_eps": False,
    "grad_scale": None,
    "found_inf": None,
}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_plan_gives_the_bits_of_the_list_op(compiled, dtype, amsgrad):
    problem, expected = (testing.feature_problem(dtype, compiled.device) for _ in range(2))
    seeds = list(range(len(problem.params)))
    states, others = moments(problem, amsgrad), moments(problem, amsgrad)
    steps, counted = first_steps(problem), first_steps(problem)
    layout = (problem.rates, problem.inners, seeds)
    plan = compiled.plan(problem.params, states, [], *layout, steps)
    scalars = SCALARS | {"amsgrad": amsgrad}
    for _ in range(3):
        assert plan.step(
            problem.grads, {name: scalars[name] for name in feature_adam.OP.options}, Scalars()
        )
        torch.ops.alrao_fast.feature_adam_(
            expected.params,
            expected.grads,
            others[0],
            others[1],
            others[2] if amsgrad else [],
            [],
            *layout,
            counted,
            **scalars,
        )
    assert torch.equal(steps, counted)
    for got, want in zip([problem.params, *states], [expected.params, *others]):
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    with pytest.raises(RuntimeError, match="max_exp_avg_sqs"):
        plan.step(
            problem.grads,
            {name: scalars[name] for name in feature_adam.OP.options} | {"amsgrad": not amsgrad},
            Scalars(),
        )
    problem.params[0].data = problem.params[0].data.clone()
    assert not plan.step(
        problem.grads, {name: scalars[name] for name in feature_adam.OP.options}, Scalars()
    )


@pytest.mark.parametrize("amsgrad", [False, True])
def test_opcheck(compiled, amsgrad):
    names = ["rows of a linear layer", "few columns", "channels_last"]
    problem = testing.feature_problem(device=compiled.device, names=names)
    states = moments(problem, amsgrad)
    arguments = (
        [p.requires_grad_() for p in problem.params],
        problem.grads,
        states[0],
        states[1],
        states[2] if amsgrad else [],
        [],
        problem.rates,
        problem.inners,
        [],
        first_steps(problem),
    )
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.alrao_fast.feature_adam_.default, arguments, SCALARS | {"amsgrad": amsgrad}
        )


def test_compiles_as_one_graph(backend, device):
    if backend == "reference":
        pytest.skip("the reference looks at the step count, which a graph cannot")
    names = ["rows of a linear layer", "few columns", "channels_last"]
    problem, expected = (testing.feature_problem(device=device, names=names) for _ in range(2))

    def step(params, grads, rates, firsts, seconds, steps):
        feature_adam_(
            params,
            grads,
            firsts,
            seconds,
            rates,
            steps=steps,
            inners=problem.inners,
            weight_decay=0.1,
            impl=backend,
        )

    for tensors, function in (
        (problem, torch.compile(step, fullgraph=True, backend="aot_eager")),
        (expected, step),
    ):
        params = [torch.nn.Parameter(p) for p in tensors.params]
        states, steps = moments(tensors, False), first_steps(tensors)
        for _ in range(2):
            function(params, tensors.grads, tensors.rates, *states, steps)
        assert torch.equal(steps, first_steps(tensors) + 2)
    for a, b in zip(problem.params, expected.params):
        torch.testing.assert_close(a, b)
