"""Protects the machine code of the Triton kernels, made without a GPU for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942.

- Every kernel compiles in every configuration that the launchers choose: sizes, dtypes and options.
- No registers are spilled (few by an older Triton), shared memory fits, and full chunks of the optimizers move 16 bytes
  at a time.
- Hyper-parameters, batch sizes and the number of the clone compile nothing anew.

`pytest -s` prints the table of registers, spills and shared memory.
"""

from __future__ import annotations

import functools
import itertools
import os
from unittest import mock

import pytest
import torch
from torch.torch_version import TorchVersion

from alrao_fast import backends, testing

pytest.importorskip("triton", reason="triton is not installed")
if backends.INTERPRETED:
    pytest.skip("the kernels are interpreted in this process", allow_module_level=True)

import triton
import triton.language as tl
from alrao_fast.kernels import gradient_clip, switch_update
from alrao_fast.kernels.feature import adam as adam_kernels
from alrao_fast.kernels.feature import frame, sgd
from alrao_fast.kernels.feature.plan import SMALL, Lists
from alrao_fast.kernels.launch import accumulator
from alrao_fast.kernels.mixture import log_prob as mixture_log_prob
from alrao_fast.kernels.mixture import loss as mixture_loss
from alrao_fast.kernels.mixture import problem as mixture_problem
from alrao_fast.kernels.mixture import weights as mixture_weights
from triton_aot import TARGETS, Resources, Start, compile_for, record, wide_accesses

pytestmark = [pytest.mark.xdist_group("triton_compile"), pytest.mark.long(200)]
LOW_PRECISION = (torch.bfloat16, torch.float16)
TYPES = {tl.float64: 8, tl.float32: 4, tl.bfloat16: 2, tl.float16: 2}
LARGE = SMALL
# The most of a kernel (accesses to local memory, or registers of AMD), and how many kernels have any: before 3.9 three
# of float64, one of float16, one of gfx942.
SPILLS, SPILLING = (0, 0) if TorchVersion(triton.__version__) >= "3.9" else (6, 5)
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def feature_step(
    dtype,
    *,
    numel=LARGE,
    adam=False,
    master=False,
    average=False,
    seeds=(),
    states=None,
    **options,
):
    """Starts of one optimizer step over one tensor."""
    param = torch.empty(numel, dtype=dtype)
    state = torch.empty(numel, dtype=states or dtype)
    scalar = torch.ones(()) if options.pop("scalars", False) else None
    lr = options.pop("lr", 0.1)
    if adam:
        update, own = adam_kernels.UPDATE, {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        own |= {"authors_eps": False, "amsgrad": False, "decoupled": False}
    else:
        update, own = sgd.UPDATE, {"momentum": 0.0, "dampening": 0.0}
        own |= {"nesterov": False, "authors_momentum": False}
    own |= {"weight_decay": 0.01} | options
    kinds = 2 + own["amsgrad"] if adam else int(own["momentum"] != 0)
    lists = Lists(
        [param],
        [[state]] * kinds,
        [torch.empty(numel)] if master else [],
        [torch.ones(numel // 64)],
        [64],
        list(seeds),
        torch.zeros(1, dtype=torch.int64),
        [torch.empty(numel, dtype=accumulator(dtype))] if average else [],
    )
    scalars = {"lr": lr, "lr_tensor": scalar, "maximize": False}
    scalars |= {"warmup_steps": 0.0, "averaging": 0.0}
    scalars |= {"grad_scale": scalar, "found_inf": scalar, "check": lambda: None}
    return record(lambda: frame.run(update, lists, [param], own, **scalars))


def feature_steps() -> list[Start]:
    low, single, double = torch.bfloat16, torch.float32, torch.float64
    found = [
        *feature_step(single, numel=4096),
        *feature_step(single, scalars=True, momentum=0.9, nesterov=True),
        *feature_step(single, momentum=0.9, authors_momentum=True),
        *feature_step(single, adam=True, scalars=True, amsgrad=True, decoupled=True),
        *feature_step(single, adam=True, authors_eps=True),
    ]
    for dtype, adam in itertools.product((single, low, torch.float16, double), (False, True)):
        momentum = {} if adam else {"momentum": 0.9}
        found += feature_step(dtype, adam=adam, **momentum)
        if not adam:
            found += feature_step(dtype)
        found += feature_step(dtype, adam=adam, average=True, **momentum)
        if dtype.itemsize == 2:
            wide = {"master": True, "states": single, "average": True}
            found += feature_step(dtype, adam=adam, **wide, **momentum)
            found += feature_step(dtype, adam=adam, seeds=[7], **momentum)
            found += feature_step(dtype, adam=adam, master=True, states=single, **momentum)
            if not adam:
                found += feature_step(dtype, master=True, states=single)
    return found


# dtype, (B, D, C, N): tiles of every number of warps, rows of one and of many blocks, direct products and the
# library's, sizes of 1; fused kernels of every width, and of one clone.
MIXTURES = [
    (torch.float32, (32, 64, 10, 10)),
    (torch.bfloat16, (32, 64, 100, 10)),
    (torch.float32, (8192, 64, 200, 10)),
    (torch.float16, (8192, 64, 200, 10)),
    (torch.float32, (4, 1, 1, 1)),
    (torch.float32, (4, 64, 300, 100)),
    (torch.float32, (4, 64, 20000, 2)),
    (torch.bfloat16, (4, 200, 20000, 2)),
    (torch.float64, (4, 64, 20000, 2)),
    *((dtype, (4, d, 20000, 2)) for dtype in LOW_PRECISION for d in (16, 32, 64, 100)),
    (torch.bfloat16, (1, 1, 20000, 1)),
]


def mixture(
    dtype, shape, *, budget=1 << 30, needs=(True, True), log_prob=True, tf32=False
) -> list[Start]:
    x, weight, bias, log_posterior, target = testing.mixture_inputs(*shape, dtype=dtype)
    common = (x, weight, bias, log_posterior)

    def run() -> None:
        mixture_loss.switch_mixture_nll(*common, target, -100, True, *needs, budget)
        if log_prob:
            out = mixture_log_prob.switch_mixture_log_prob(*common, budget)
            backward = mixture_log_prob.switch_mixture_log_prob_backward
            backward(out[0], *common, *out, *needs, budget)

    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    try:
        return record(run)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def regression(dtype, shape) -> list[Start]:
    x, weight, _, log_posterior, _ = testing.mixture_inputs(*shape, dtype=dtype)
    target = torch.zeros(shape[0], shape[2], dtype=dtype)
    arguments = (x, weight, None, log_posterior, target, 1.0, False, True, True, 1 << 30)
    return record(lambda: mixture_loss.switch_mixture_gaussian_nll(*arguments))


def mixture_with_options(dtype, shape, *, soft=False, label_smoothing=0.1) -> list[Start]:
    """The loss with all of its options, and log-probabilities with a softcap."""
    x, weight, bias, log_posterior, target = testing.mixture_inputs(*shape, dtype=dtype)
    common = (x, weight, bias, log_posterior)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if soft:
        target = torch.full((shape[0], shape[2]), 1 / shape[2], dtype=wide)
    weights = torch.ones(shape[0], dtype=wide), torch.ones(shape[2], dtype=wide)
    options = (*weights, label_smoothing, 1e-4, 30.0, False)

    def run() -> None:
        mixture_loss.switch_mixture_nll(*common, target, -100, False, True, True, 1 << 30, *options)
        out = mixture_log_prob.switch_mixture_log_prob(*common, 1 << 30, 30.0)
        backward = mixture_log_prob.switch_mixture_log_prob_backward
        backward(out[0], *common, *out, True, True, 1 << 30, 30.0)

    return record(run)


def loss_weights(dtype) -> list[Start]:
    """The factors of the losses, of classes and of probabilities, with all of their options and without."""
    classes, soft = torch.zeros(40, dtype=torch.int64), torch.ones(40, 3000, dtype=dtype)
    v, w = torch.ones(40, dtype=dtype), torch.ones(3000, dtype=dtype)
    items = torch.tensor(40)

    def run() -> None:
        for target in (classes, soft):
            op = mixture_weights.switch_mixture_weights
            op(target, v, w, -100, 0.1, True, 1.0, items)
            op(target, v, None, -100, 0.0, False, 2.0)
        op(soft, None, None, -100, 0.0, True, 1.0)

    return record(run)


def exponentials() -> list[Start]:
    """Of many classes, trained and evaluated, the first clone and others, one chunk and several."""
    found = []
    for batch, budget in ((256, 1 << 30), (2000, 1 << 24)):
        x, weight, _, a, target = testing.mixture_inputs(
            batch, 64, 9000, 2, dtype=torch.bfloat16, bias=False
        )
        for needs in ((True, True), (False, True), (False, False)):
            arguments = (x, weight, None, a, target, -100, True, *needs, budget)
            with (
                mock.patch.object(mixture_problem, "is_fused", lambda *_: False),
                mock.patch.object(mixture_problem, "is_exponential", lambda _: True),
            ):
                found += record(functools.partial(mixture_loss.switch_mixture_nll, *arguments))
    assert any("exponential" in start.kernel.__name__ for start in found)
    return found


def mixtures() -> list[Start]:
    found = [*exponentials(), *loss_weights(torch.float32), *loss_weights(torch.float64)]
    for dtype, shape in MIXTURES:
        found += mixture(dtype, shape)
    # With TF32 the products of a small problem, and the fused kernels.
    for shape in (MIXTURES[0][1], *((4, d, 20000, 2) for d in (16, 32, 64))):
        found += mixture(torch.float32, shape, tf32=True)
    for shape in (MIXTURES[0][1], MIXTURES[6][1]):
        found += mixture(torch.float32, shape, needs=(False, False), log_prob=False)
        found += regression(torch.float32, shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((4, 64, 300, 10), (4, 64, 20000, 2)):
            found += mixture_with_options(dtype, shape)
            found += mixture_with_options(dtype, shape, soft=True)
    return found


def updates() -> list[Start]:
    found = []
    for clones, dtype in ((10, torch.float64), (2000, torch.float32)):
        logw = torch.zeros(2, clones, dtype=torch.float64)
        evidence = torch.zeros(clones, dtype=dtype)
        t = torch.tensor(1)
        found += record(
            functools.partial(switch_update.switch_update_, logw, logw[0], t, evidence, 0.999)
        )
        sums = torch.zeros(2, 3, clones, dtype=torch.float64)
        for mean in (True, False):
            arguments = (logw, logw[0], t, *sums, mean, 0.999)
            found += record(functools.partial(switch_update.switch_observe_, *arguments))
    return found


def clips() -> list[Start]:
    """Every dtype, every order of norm, and with and without what may be left out."""
    grads = [torch.zeros(3, 50, dtype=dtype) for dtype in testing.DTYPES]
    spans = (grads, [0] * 4, [1] * 4)
    found = record(lambda: gradient_clip.gradient_clip_(*spans, 1, 2.0, 1.0))
    one = ([torch.zeros(3, 50)], [0], [3])
    for order in (1.0, float("inf"), 3.0):
        found += record(functools.partial(gradient_clip.gradient_clip_, *one, 3, order, 1.0))
    found += record(lambda: gradient_clip.gradient_clip_(*one, 3, 2.0, float("inf")))
    norms = torch.ones(3, dtype=torch.float64)
    return found + record(lambda: gradient_clip.gradient_clip_by_(*one, norms, 1.0))


@functools.cache
def starts() -> list[Start]:
    return list(dict.fromkeys([*feature_steps(), *mixtures(), *updates(), *clips()]))


def _compile(start: Start, target: str) -> Resources | str:
    try:
        return compile_for(start, target)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def compiled():
    """Resources, or the compiler's message, of every start for sm_90; for the other targets of one start per kernel and
    number of warps, or of every start with ALRAO_AOT=all (minutes)."""
    few = {}
    for i, start in enumerate(starts()):
        few.setdefault((start.kernel.__name__, start.options), i)
    every = range(len(starts()))
    complete = TARGETS if os.environ.get("ALRAO_AOT") == "all" else ("sm_90",)
    return {
        (i, target): _compile(starts()[i], target)
        for target in TARGETS
        for i in (every if target in complete else few.values())
        if starts()[i].runs_on(target)
    }


def test_everything_compiles_without_spills(compiled, capsys):
    wrong, rows = [], []
    for (number, target), result in compiled.items():
        start = starts()[number]
        if isinstance(result, str):
            wrong.append(f"{target} {start}: {result}")
            continue
        rows.append(f"{target:7} {result.registers:4} {result.spills:4} {result.shared:6}  {start}")
        if result.spills > SPILLS or result.shared > SHARED_BYTES[target]:
            wrong.append(rows[-1])
    print("\ntarget  regs spil shared  kernel")
    print("\n".join(rows))
    assert not wrong, "\n".join(wrong)
    assert sum(not isinstance(r, str) and r.spills > 0 for r in compiled.values()) <= SPILLING


def test_full_chunks_move_16_bytes_at_a_time(compiled):
    for (number, target), result in compiled.items():
        start = starts()[number]
        if target == "sm_90" and start.kernel.__name__.startswith("feature_"):
            assert not isinstance(result, str), result
            constants = {start.signature[i][0]: value for i, value in start.constants}
            # Of every tensor, BLOCK entries over 4 warps of 32 threads.
            param = TYPES[constants["P_DTYPE"]]
            per_thread = constants["BLOCK"] // 128 * param // 16
            loads, stores = wide_accesses(result.compiled)
            assert loads >= 2 * per_thread, (start, loads)
            assert stores >= per_thread, (start, stores)


def test_changing_values_compile_nothing_anew():
    one = feature_step(torch.float32, numel=4096, lr=0.1, momentum=0.9)
    assert one == feature_step(torch.float32, numel=4096, lr=1.0, momentum=0.5)
    first = mixture(torch.float32, (48, 64, 20000, 2))
    other = mixture(torch.float32, (17, 64, 20000, 5), budget=1 << 20)
    rows = [start for start in other if "row_kernel" in start.kernel.__name__]
    assert rows and set(rows) <= set(first)
    with_options = mixture_with_options(torch.float32, (4, 64, 20000, 2))
    assert with_options == mixture_with_options(
        torch.float32, (4, 64, 20000, 2), label_smoothing=0.3
    )
