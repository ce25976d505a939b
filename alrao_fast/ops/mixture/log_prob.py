"""switch_mixture's predictions: log-probabilities of N classifiers, the mean of N regressors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.ops import derivatives, dispatch
from alrao_fast.ops.checks import check_tensor, check_together
from alrao_fast.ops.dispatch import LIB, define
from alrao_fast.ops.mixture import checks
from alrao_fast.reference import switch_mixture as reference
from alrao_fast.tracing import ops_are_known


def _fake(x, weight, bias, log_posterior, memory_budget, softcap=0.0):
    wide = checks.accumulator(x.dtype)
    return x.new_empty((x.size(0), weight.size(1)), dtype=wide), x.new_empty(x.size(0), dtype=wide)


def _fake_backward(
    grad,
    x,
    weight,
    bias,
    log_posterior,
    log_prob,
    log_mass,
    need_dx,
    need_dw,
    memory_budget,
    softcap=0.0,
):
    return checks.empty_gradients(x, weight, need_dx, need_dw)


def _check(x, weight, bias, log_posterior, memory_budget, softcap=0.0):
    checks.check_inputs(x, weight, bias, log_posterior, memory_budget)
    checks.check_softcap(softcap)


def _check_backward(
    grad,
    x,
    weight,
    bias,
    log_posterior,
    log_prob,
    log_mass,
    need_dx,
    need_dw,
    memory_budget,
    softcap=0.0,
):
    _check(x, weight, bias, log_posterior, memory_budget, softcap)
    samples, dtypes = x.size(0), (checks.accumulator(x.dtype),)
    for name, tensor in (("grad", grad), ("log_prob", log_prob)):
        check_tensor(name, tensor, (samples, weight.size(1)), dtypes, x.device)
    check_tensor("log_mass", log_mass, (samples,), dtypes, x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.memory_budget, ctx.softcap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(backward: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of log_prob by the op of this name."""

    def run(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, weight, bias, log_posterior, *outputs = ctx.saved_tensors
        if torch.is_grad_enabled() or derivatives.transformed() or derivatives.is_batch(grad):
            found = _plain_gradients(grad, x, weight, bias, log_posterior, ctx.softcap)
            return *found, None, None, None
        need_dx, *need_own = ctx.needs_input_grad[:3]
        needs = need_dx, any(need_own)
        gradients = getattr(torch.ops.alrao_fast, backward)(
            grad.contiguous(),
            x,
            weight,
            bias,
            log_posterior,
            *outputs,
            *needs,
            ctx.memory_budget,
            ctx.softcap,
        )
        dtypes = checks.gradient_dtypes(x, weight, bias, *needs)
        typed = zip(gradients, dtypes, strict=True)
        return *(None if dtype is None else g.to(dtype) for g, dtype in typed), None, None, None

    return run


def _plain_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    softcap: float,
) -> list[Tensor | None]:
    """The same by the reference: these have derivatives (create_graph), and `grad` may be a batch or a dual tensor."""

    def log_prob(inputs: list[Any]) -> Tensor:
        x, weight, bias = inputs
        return reference.switch_mixture_log_prob(x, weight, bias, log_posterior, softcap)

    return derivatives.plain_gradients(log_prob, (x, weight, bias), grad)


# log_mass [B]: the logarithm of what the posterior of the clones alive for the sample adds up to.
_SCHEMA = (
    f"switch_mixture_log_prob({checks.INPUTS}, int memory_budget, float softcap=0.0) -> "
    "(Tensor log_prob, Tensor log_mass)"
)
_BACKWARD_SCHEMA = (
    f"switch_mixture_log_prob_backward(Tensor grad, {checks.INPUTS}, Tensor log_prob, "
    "Tensor log_mass, bool need_dx, bool need_dw, int memory_budget, float softcap=0.0) -> "
    "(Tensor, Tensor, Tensor)"
)
_MODULE = "mixture.log_prob"
for _name, _backward in (
    (define(_SCHEMA, _fake), define(_BACKWARD_SCHEMA, _fake_backward)),
    (
        dispatch.define_triton(_SCHEMA, _fake, _MODULE, _check),
        dispatch.define_triton(_BACKWARD_SCHEMA, _fake_backward, _MODULE, _check_backward),
    ),
):
    torch.library.register_autograd(
        _name,
        _differentiate(_backward.removeprefix("alrao_fast::")),
        setup_context=_save,
        lib=LIB,
    )


def switch_mixture_log_prob(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    *,
    logit_softcap: float | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probabilities `[..., C]` of the mixture, `log sum_n p_n softmax_c(W_n x_b + b_n)`.

    Arguments as in `switch_mixture_nll`; `p` is the posterior `exp(log_posterior)`, normalised over
    the clones that are alive for the sample: neither a dead clone nor a log-posterior that is not
    normalised leaves probabilities that do not sum to 1. (In the loss a dead clone has the
    likelihood 0 and keeps its mass.) -inf for every class, of which `nll_loss` is +inf as the loss
    is, where all clones with posterior mass are dead.

    float32, or float64 for float64 inputs; differentiable in x, weight and bias in the ordinary
    sense, any number of times and in forward mode. Those further derivatives, and all inside
    transforms of torch.func, are plain PyTorch's, whatever `impl` says.
    """
    options = logit_softcap, memory_budget, impl
    result, _ = _log_prob(x, weight, bias, log_posterior, *options, need_mass=False)
    return result if x.dim() == 2 else result.reshape(*x.shape[:-1], weight.size(1))


def log_prob_and_mass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    *,
    logit_softcap: float | None,
    memory_budget: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`switch_mixture_log_prob` in rows `[B, C]`, and the logarithm `[B]` of what it has divided by: the probability
    that the clones alive for the sample have together. That has no gradient."""
    options = logit_softcap, memory_budget, impl
    return _log_prob(x, weight, bias, log_posterior, *options, need_mass=True)


def _log_prob(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    logit_softcap: float | None,
    memory_budget: int | None,
    impl: str,
    *,
    need_mass: bool,
) -> tuple[Tensor, Tensor]:
    check_together("bias", x=x, weight=weight, bias=bias, log_posterior=log_posterior)
    backend = backends.select(checks.OP, x.device, impl)
    rows, weight, bias = checks.flat(x, weight, bias)
    memory = checks.budget(x, memory_budget)
    softcap = checks.softcap(logit_softcap)
    if backend != "reference" and not derivatives.transformed() and ops_are_known():
        op = dispatch.overload("switch_mixture_log_prob", backend)
        result, mass = op(rows, weight, bias, log_posterior, memory, softcap)
        return result, mass
    checks.check_inputs(rows, weight, bias, log_posterior, memory)
    inputs = rows, weight, bias, log_posterior
    result = reference.switch_mixture_log_prob(*inputs, softcap)
    return result, reference.log_mass(*inputs) if need_mass else result


def switch_mixture_mean(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Posterior mean `[..., K]` of N linear regressors: `sum_n p_n f_n(x)`, p the posterior.

    As in `switch_mixture_log_prob` p is normalised over the clones that are alive for the sample,
    those whose outputs are finite. NaN where all clones with posterior mass are dead: no value is a
    mean of none. The plain PyTorch of the reference on every backend: there is nothing to fuse.
    """
    check_together("bias", x=x, weight=weight, bias=bias, log_posterior=log_posterior)
    backends.select(checks.OP, x.device, impl)
    rows, weight, bias = checks.flat(x, weight, bias)
    checks.check_inputs(rows, weight, bias, log_posterior, checks.budget(x, None))
    result = reference.switch_mixture_mean(rows, weight, bias, log_posterior)
    return result if x.dim() == 2 else result.reshape(*x.shape[:-1], weight.size(1))
