"""switch_mixture: the N clones of the last layer, evaluated together and mixed by the posterior.

Mathematics: reference/switch_mixture.py. The op computes the gradients along with the loss, since
one pass over the logits serves all of them; the backward only scales them. They are not the
gradients of one function: x gets the mixture's, each clone its own, so there is no second backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alrao_fast import backends
from alrao_fast.ops import dispatch
from alrao_fast.ops.checks import FLOATS, check, check_tensor
from alrao_fast.ops.dispatch import LIB, define
from alrao_fast.ops.switch_update import switch_observe_
from alrao_fast.reference import switch_mixture as reference

OP = "switch_mixture"
backends.OPS[OP] = "switch_mixture_nll"
# Bytes that the logits of a chunk of samples may take: on a CPU about its caches, on a GPU enough rows for a product of
# matrices to run at full speed with 128,000 classes.
CPU_MEMORY_BUDGET = 64 << 20
GPU_MEMORY_BUDGET = 1 << 30

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor log_posterior"
_MUTABLE_INPUTS = _INPUTS.replace("Tensor log_posterior", "Tensor(a!) log_posterior")
_NEEDS = "bool mean, bool need_dx, bool need_dw, int memory_budget"
_RESULT = "(Tensor loss, Tensor stats, Tensor dx, Tensor dweight, Tensor dbias)"
_OBSERVER = "Tensor(b!) logw, Tensor(c!) t, Tensor(d!) running, bool mean_evidence, float theta"


class Observer(NamedTuple):
    """What a training step updates besides the parameters, as `switch_observe_` takes it.

    `logw [2, N]`, `log_posterior [N]` and `t` are the switch's state, `running [3, N]` the running statistics; `mean`
    and `theta` say how.
    """

    logw: Tensor
    log_posterior: Tensor
    t: Tensor
    running: Tensor
    mean: bool
    theta: float


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_result(x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool) -> tuple[Tensor, ...]:
    wide = _accumulator(x.dtype)
    clones, classes, _ = weight.shape
    return (
        x.new_empty((), dtype=wide),
        x.new_empty((3, clones), dtype=torch.float64),
        x.new_empty(x.shape if need_dx else (0,), dtype=wide),
        x.new_empty(weight.shape if need_dw else (0,), dtype=wide),
        x.new_empty((clones, classes) if need_dw else (0,), dtype=wide),
    )


def _fake_nll(
    x, weight, bias, log_posterior, target, ignore_index, mean, need_dx, need_dw, memory_budget
):
    return _fake_result(x, weight, need_dx, need_dw)


def _fake_gaussian_nll(
    x, weight, bias, log_posterior, target, sigma2, mean, need_dx, need_dw, memory_budget
):
    return _fake_result(x, weight, need_dx, need_dw)


def _fake_observe(x, weight, *rest):
    need_dx, need_dw = rest[5:7]
    return _fake_result(x, weight, need_dx, need_dw)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.needs = inputs[7:9]
    ctx.num_inputs = len(inputs)


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save_gradients(ctx, inputs, output)


@once_differentiable
def _scale_gradients(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, None if grad is None else lambda saved: saved * grad)


def _gradients(ctx: Any, scaled: Callable[[Tensor], Tensor] | None) -> tuple[Tensor | None, ...]:
    """The gradients to the op's inputs from the saved ones; None: nothing arrived."""
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    if scaled is not None:
        need_dx, need_dw = ctx.needs
        needed = need_dx, need_dw, need_dw and ctx.dtypes[2] is not None
        for i, saved in enumerate(ctx.saved_tensors):
            if needed[i]:
                gradients[i] = scaled(saved).to(ctx.dtypes[i])
    return tuple(gradients)


class _EagerGradients(torch.autograd.Function):
    """The op with the same gradients as registered above, at half of the dispatcher's overhead.

    That overhead, about 50 us, is a sixth of the training step of a small network. torch.compile
    goes through the registration.
    """

    @staticmethod
    def forward(ctx: Any, op: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = op(*inputs)
        ctx.mark_non_differentiable(output[1])
        _save_gradients(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        # `loss.backward()` brings the factor 1, and on the CPU looking at it costs nothing: then
        # autograd takes the saved gradients as they are (or copies them, if the graph is kept).
        if grad is not None and grad.device.type == "cpu" and grad.item() == 1:
            return None, *_gradients(ctx, lambda saved: saved)
        return None, *_scale_gradients(ctx, grad)


def _with_gradients(
    name: str, backend: str, observer: Observer | None, *inputs: Any
) -> tuple[Tensor, Tensor]:
    """Loss and statistics by the op `name`, which the observer takes."""
    if observer is not None and backend == "cuda" and not torch.compiler.is_compiling():
        # The update is the tail of the op's last kernel.
        logw, _, t, running, mean, theta = observer
        op = getattr(torch.ops.alrao_fast, f"{name}_observe_").default
        return _EagerGradients.apply(op, *inputs, logw, t, running, mean, theta)
    op = dispatch.overload(name, backend)
    if torch.compiler.is_compiling():
        loss, stats, *_ = op(*inputs)
    else:
        loss, stats = _EagerGradients.apply(op, *inputs)
    _observe(observer, stats, backend)
    return loss, stats


def _observe(observer: Observer | None, stats: Tensor, backend: str) -> None:
    if observer is not None:
        switch_observe_(
            *observer[:4], stats, mean=observer.mean, theta=observer.theta, impl=backend
        )


def _fake_log_prob(x, weight, bias, log_posterior, memory_budget):
    return x.new_empty((x.size(0), weight.size(1)), dtype=_accumulator(x.dtype))


def _fake_log_prob_backward(
    grad, x, weight, bias, log_posterior, log_prob, need_dx, need_dw, memory_budget
):
    return _fake_result(x, weight, need_dx, need_dw)[2:]


def _save_log_prob(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.has_bias = inputs[2] is not None
    ctx.memory_budget = inputs[4]
    ctx.save_for_backward(*(t for t in inputs[:4] if t is not None), output)


def _differentiate_log_prob(backward: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of log_prob by the op of this name."""

    @once_differentiable
    def run(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        x, weight, *bias, log_posterior, log_prob = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        dx, dweight, dbias = getattr(torch.ops.alrao_fast, backward)(
            grad.contiguous(),
            x,
            weight,
            bias[0] if ctx.has_bias else None,
            log_posterior,
            log_prob,
            need_dx,
            need_dw,
            ctx.memory_budget,
        )
        return (
            dx.to(x.dtype) if need_dx else None,
            dweight.to(weight.dtype) if need_dw else None,
            dbias.to(weight.dtype) if need_dw and ctx.has_bias else None,
            None,
            None,
        )

    return run


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor, memory_budget: int
) -> None:
    """For Triton; the compiled implementations check by themselves (csrc/mixture/checks.cpp)."""
    check(
        weight.dim() == 3 and weight.size(0) > 0 and weight.size(1) > 0,
        f"weight: got shape {list(weight.shape)}, expected [N, C, D] with N >= 1 and C >= 1",
    )
    clones, classes, features = weight.shape
    check_tensor("weight", weight, weight.shape, FLOATS, weight.device)
    check(
        x.dim() == 2 and x.size(1) == features,
        f"x: got shape {list(x.shape)}, expected [B, {features}], D being that of weight "
        f"{list(weight.shape)}",
    )
    same = (weight.dtype,)
    check_tensor("x", x, x.shape, same, weight.device)
    if bias is not None:
        check_tensor("bias", bias, (clones, classes), same, weight.device)
    posterior_dtypes = (torch.float32, torch.float64)
    check_tensor("log_posterior", log_posterior, (clones,), posterior_dtypes, weight.device)
    check(
        memory_budget > 0,
        f"memory_budget: got {memory_budget}, expected a positive number of bytes",
    )


def _check_nll(
    x, weight, bias, log_posterior, target, ignore_index, mean, need_dx, need_dw, memory_budget
):
    _check(x, weight, bias, log_posterior, memory_budget)
    check_tensor("target", target, x.shape[:1], (torch.int64,), x.device)
    # Reading classes on a GPU would wait for it: there the loss is inf.
    if x.device.type == "cpu":
        classes = weight.size(1)
        outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if outside.any():
            position = int(outside.nonzero()[0])
            check(
                False,
                f"target: got {int(target[position])} at position {position}, expected a class "
                f"from 0 to {classes - 1} or ignore_index {ignore_index}",
            )


def _check_gaussian_nll(
    x, weight, bias, log_posterior, target, sigma2, mean, need_dx, need_dw, memory_budget
):
    _check(x, weight, bias, log_posterior, memory_budget)
    check_tensor("target", target, (x.size(0), weight.size(1)), (x.dtype,), x.device)
    check(sigma2 > 0, f"sigma2: got {sigma2:g}, expected a positive variance")


def _check_log_prob_backward(
    grad, x, weight, bias, log_posterior, log_prob, need_dx, need_dw, memory_budget
):
    _check(x, weight, bias, log_posterior, memory_budget)
    for name, tensor in (("grad", grad), ("log_prob", log_prob)):
        shape, dtypes = (x.size(0), weight.size(1)), (_accumulator(x.dtype),)
        check_tensor(name, tensor, shape, dtypes, x.device)


for _op, _arguments, _fake, _check_inputs in (
    ("switch_mixture_nll", "Tensor target, int ignore_index", _fake_nll, _check_nll),
    (
        "switch_mixture_gaussian_nll",
        "Tensor target, float sigma2",
        _fake_gaussian_nll,
        _check_gaussian_nll,
    ),
):
    # The same with the observation of the switch as its tail, for the compiled GPU kernels.
    define(
        f"{_op}_observe_({_MUTABLE_INPUTS}, {_arguments}, {_NEEDS}, {_OBSERVER}) -> {_RESULT}",
        _fake_observe,
    )
    _schema = f"{_op}({_INPUTS}, {_arguments}, {_NEEDS}) -> {_RESULT}"
    for _name in (
        define(_schema, _fake),
        dispatch.define_triton(_schema, _fake, "mixture.loss", _check_inputs),
    ):
        torch.library.register_autograd(_name, _scale_gradients, setup_context=_save_op, lib=LIB)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in the dtype of `out`: for the CUDA kernels, whose ABI cannot pass addmm's numbers."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)


LIB.impl(
    define(
        "switch_mixture_add_product_(Tensor(a!) out, Tensor a, Tensor b) -> ()", lambda *_: None
    ),
    _add_product,
    "CompositeExplicitAutograd",
)
_LOG_PROB = f"switch_mixture_log_prob({_INPUTS}, int memory_budget) -> Tensor"
_LOG_PROB_BACKWARD = (
    f"switch_mixture_log_prob_backward(Tensor grad, {_INPUTS}, Tensor log_prob, bool need_dx, "
    "bool need_dw, int memory_budget) -> (Tensor, Tensor, Tensor)"
)
_MODULE = "mixture.log_prob"
for _name, _backward in (
    (
        define(_LOG_PROB, _fake_log_prob),
        define(_LOG_PROB_BACKWARD, _fake_log_prob_backward),
    ),
    (
        dispatch.define_triton(_LOG_PROB, _fake_log_prob, _MODULE, _check),
        dispatch.define_triton(
            _LOG_PROB_BACKWARD, _fake_log_prob_backward, _MODULE, _check_log_prob_backward
        ),
    ),
):
    torch.library.register_autograd(
        _name,
        _differentiate_log_prob(_backward.removeprefix("alrao_fast::")),
        setup_context=_save_log_prob,
        lib=LIB,
    )


def _flat(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The samples in rows, and all in the widest of the floating dtypes, as under autocast."""
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected [..., D]")
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if x.dtype != weight.dtype:
        x, weight = x.to(dtype), weight.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return (x if x.dim() == 2 else x.reshape(-1, x.size(-1))), weight, bias


def _budget(x: Tensor, memory_budget: int | None) -> int:
    if memory_budget is not None:
        return memory_budget
    return CPU_MEMORY_BUDGET if x.device.type == "cpu" else GPU_MEMORY_BUDGET


def _is_mean(reduction: str) -> bool:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
    return reduction == "mean"


def _needs(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool]:
    """Whether the gradient to x, and those to weight and bias, are wanted."""
    if not torch.is_grad_enabled():
        return False, False
    return x.requires_grad, weight.requires_grad or (bias is not None and bias.requires_grad)


def switch_mixture_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    observer: Observer | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`switch_mixture_nll` with the sums behind its second result, for running statistics.

    Returns the loss and float64 `stats [3, N]`, detached: per clone the sum of its own -log p over
    the counted samples (inf if it was dead for one), its correct predictions, and the number of
    counted samples. An `observer`, whose log-posterior must be the one given, takes them as
    `switch_observe_` does after the mixture was computed; in C++/CUDA without a launch of its own.
    """
    mean = _is_mean(reduction)
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target: got shape {list(target.shape)}, expected {list(x.shape[:-1])}, that of x "
            "without the features"
        )
    backend = backends.select(OP, x.device, impl)
    x, weight, bias = _flat(x, weight, bias)
    target = target.reshape(-1)
    if backend == "reference":
        loss, stats = reference.switch_mixture_nll(
            x, weight, bias, log_posterior, target, ignore_index=ignore_index, reduction=reduction
        )
        _observe(observer, stats, backend)
        return loss, stats
    return _with_gradients(
        "switch_mixture_nll",
        backend,
        observer,
        x,
        weight,
        bias,
        log_posterior,
        target,
        ignore_index,
        mean,
        *_needs(x, weight, bias),
        _budget(x, memory_budget),
    )


def switch_mixture_nll(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    memory_budget: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of a mixture of N linear softmax classifiers, and each clone's own.

    Args:
        x: `[..., D]` features; float32, float64, bfloat16 or float16.
        weight, bias: `[N, C, D]` and `[N, C]` (or None), the clones.
        log_posterior: `[N]` float64 or float32, the switch's log-posterior `a`. No gradient.
        target: `[...]` int64 classes.
        ignore_index: targets of this value do not count.
        reduction: "mean" over the counted samples, or "sum".
        memory_budget: bytes for the logits of a chunk of samples; None: 64 MiB on a CPU, 1 GiB on a
            GPU.
        impl: "auto", or the backend that must run it.

    Returns:
        The mixture's loss (a scalar; float32, or float64 for float64 inputs), and `clone_nll [N]`
        float64, detached: always the mean over the counted samples, NaN where nothing counted.

    With `logp[b,n,c] = log_softmax_c(W_n x_b + b_n)` (paper, section 3.2):
        loss        = -mean_b logsumexp_n(a_n + logp[b,n,y_b])     its gradient goes to x
        clone_nll_n = -mean_b logp[b,n,y_b]                        its gradient goes to W_n and b_n
    All gradients scale with the loss's upstream gradient. A clone with a logit that is not finite
    for a sample is dead there: it takes no part in the mixture, and gets no gradient from the
    batch. Where all are dead the loss is +inf and the sample has no gradient.
    """
    loss, stats = switch_mixture_stats(
        x,
        weight,
        bias,
        log_posterior,
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        memory_budget=memory_budget,
        impl=impl,
    )
    return loss, stats[0] / stats[2]


def switch_mixture_gaussian_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    *,
    sigma2: float = 1.0,
    reduction: str = "mean",
    memory_budget: int | None = None,
    observer: Observer | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`switch_mixture_gaussian_nll` with the sums behind its second result.

    As `switch_mixture_stats`; row 1 is the sum of squared errors.
    """
    mean = _is_mean(reduction)
    expected = (*x.shape[:-1], weight.size(1))
    if target.shape != expected:
        raise ValueError(
            f"target: got shape {list(target.shape)}, expected {list(expected)}: that of x with "
            "the clones' outputs in place of the features"
        )
    backend = backends.select(OP, x.device, impl)
    x, weight, bias = _flat(x, weight, bias)
    target = target.detach().reshape(-1, weight.size(1)).to(x.dtype)
    if backend == "reference":
        loss, stats = reference.switch_mixture_gaussian_nll(
            x, weight, bias, log_posterior, target, sigma2=sigma2, reduction=reduction
        )
        _observe(observer, stats, backend)
        return loss, stats
    return _with_gradients(
        "switch_mixture_gaussian_nll",
        backend,
        observer,
        x,
        weight,
        bias,
        log_posterior,
        target,
        float(sigma2),
        mean,
        *_needs(x, weight, bias),
        _budget(x, memory_budget),
    )


def switch_mixture_gaussian_nll(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    *,
    sigma2: float = 1.0,
    reduction: str = "mean",
    memory_budget: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The same for N linear regressors with Gaussian noise of fixed variance.

    `target [..., K]` is what the outputs `f_n(x) = W_n x + b_n`, `[..., K]`, should be; no gradient
    goes to it. `sigma2 > 0` is the variance of the noise. All else as in `switch_mixture_nll`, with
        logp[b,n] = -|y_b - f_n(x_b)|^2 / (2 sigma2) - K/2 log(2 pi sigma2)
    """
    loss, stats = switch_mixture_gaussian_stats(
        x,
        weight,
        bias,
        log_posterior,
        target,
        sigma2=sigma2,
        reduction=reduction,
        memory_budget=memory_budget,
        impl=impl,
    )
    return loss, stats[0] / stats[2]


def switch_mixture_log_prob(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    *,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probabilities `[..., C]` of the mixture: `log sum_n exp(a_n + logp[b,n,c])`.

    Arguments as in `switch_mixture_nll`. float32, or float64 for float64 inputs; differentiable in
    x, weight and bias in the ordinary sense. Dead clones take no part; -inf where all are dead.
    """
    backend = backends.select(OP, x.device, impl)
    rows, weight, bias = _flat(x, weight, bias)
    if backend == "reference":
        result = reference.switch_mixture_log_prob(rows, weight, bias, log_posterior)
    else:
        op = dispatch.overload("switch_mixture_log_prob", backend)
        result = op(rows, weight, bias, log_posterior, _budget(x, memory_budget))
    return result if x.dim() == 2 else result.reshape(*x.shape[:-1], weight.size(1))


def switch_mixture_mean(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Posterior mean `[..., K]` of N linear regressors: `sum_n p_n f_n(x)`, p the posterior.

    A clone with an output that is not finite for a sample is left out there and p renormalised; NaN
    where every clone with posterior mass is. The plain PyTorch of the reference on every backend:
    there is nothing to fuse.
    """
    backends.select(OP, x.device, impl)
    rows, weight, bias = _flat(x, weight, bias)
    result = reference.switch_mixture_mean(rows, weight, bias, log_posterior)
    return result if x.dim() == 2 else result.reshape(*x.shape[:-1], weight.size(1))
