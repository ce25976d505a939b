"""switch_mixture's loss: the N clones of the last layer, evaluated together and mixed by the posterior.

Mathematics: reference/switch_mixture.py. The op computes the gradients along with the loss, since
one pass over the logits serves all of them; the backward only scales them. They are not the
gradients of one function: x gets the mixture's, each clone its own, so there is no second
derivative, and no forward-mode one. Both raise.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.ops import derivatives, dispatch
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.dispatch import LIB, define, no_result
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.likelihood import Classes, Likelihood, Values
from alrao_fast.ops.switch_update import switch_observe_
from alrao_fast.reference import switch_mixture as reference

NO_OTHER_DERIVATIVE = (
    "the loss of switch_mixture (of the heads with targets, and of clone_loss) has one backward and no other "
    "derivative, neither a second nor a forward-mode one: its gradient is the mixture's for x and each clone's own for "
    "weight and bias, which is not that of one function. Differentiate instead the log-probabilities "
    "(switch_mixture_log_prob, a head without targets) or the outputs of the clones (clone_outputs)."
)
CANNOT_OBSERVE = (
    "switch: got a loss in training mode inside torch.func.vmap, expected one batch for one observation. Call eval() "
    "before the transformed function; a call in training mode outside of it, under torch.no_grad(), observes."
)
# Finds x, weight, bias, need_dx and need_dw among the inputs of an op.
_Finder = Callable[[Sequence[Any]], tuple[Any, ...]]
_finders: dict[Any, _Finder] = {}


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

    def observe(self, stats: Tensor, impl: str = "auto") -> None:
        """Take the statistics `[3, N]` of a batch."""
        tensors = *self[:4], stats
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            with derivatives.outside(CANNOT_OBSERVE, tensors) as plain:
                switch_observe_(*plain, mean=self.mean, theta=self.theta, impl=impl)
        else:
            switch_observe_(*tensors, mean=self.mean, theta=self.theta, impl=impl)


def _save_gradients(
    ctx: Any, find: _Finder, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    _loss, _stats, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    found = find(inputs)
    ctx.dtypes = checks.gradient_dtypes(*found)
    # For their place in the graph alone: save_for_backward would forbid to change their values.
    ctx.sources = found[:3]
    ctx.num_inputs = len(inputs)


def _save_op(find: _Finder, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save_gradients(ctx, find, inputs, output)


def _scale_gradients(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    """The gradients to the op's inputs, of which x, weight and bias come first; grad None: nothing arrived."""
    return _gradients(ctx, None if grad is None else lambda saved: saved * grad)


def _gradients(ctx: Any, scaled: Callable[[Tensor], Tensor] | None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    if scaled is not None:
        for i, (saved, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            if dtype is not None:
                gradients[i] = scaled(saved).to(dtype)
        if torch.is_grad_enabled():
            gradients[:3] = derivatives.final(gradients[:3], ctx.sources, NO_OTHER_DERIVATIVE)
    return tuple(gradients)


class _EagerGradients(torch.autograd.Function):
    """The op with the same gradients as registered below, at half of the dispatcher's overhead.

    That overhead, about 50 us, is a sixth of the training step of a small network. torch.compile
    goes through the registration.
    """

    @staticmethod
    def forward(ctx: Any, op: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = op(*inputs)
        loss, stats, *_ = output
        ctx.mark_non_differentiable(stats)
        _save_gradients(ctx, _finders[op], inputs, output)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        # `loss.backward()` brings the factor 1, and on the CPU looking at it costs nothing: then
        # autograd takes the saved gradients as they are. Never those of a graph that is kept: its
        # next backward needs them, and whoever gets these may write into them. A traced backward
        # has no value to look at.
        kept = (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch._C._autograd._get_current_graph_task_keep_graph()
        )
        if not kept and grad is not None and _is_one(grad):
            gradients = _gradients(ctx, lambda saved: saved)
        else:
            gradients = _scale_gradients(ctx, grad)
        if not kept:
            ctx.sources = ()
        return None, *gradients


def _is_one(grad: Tensor) -> bool:
    """Whether this scalar is known to be 1 without waiting for a device; a batch of them has no one value."""
    return grad.device.type == "cpu" and not derivatives.is_batch(grad) and grad.item() == 1


def _define(likelihood: type[Likelihood]) -> None:
    """Define the likelihood's op, its Triton twin, and for compiled GPU kernels the op that observes, too."""
    for observed in (False, True):
        schema = likelihood.schema(observed=observed)
        find = dispatch.finder(schema, "x", "weight", "bias", "need_dx", "need_dw")

        def fake(*inputs: Any, find: _Finder = find) -> tuple[Tensor, ...]:
            x, weight, _bias, need_dx, need_dw = find(inputs)
            return (
                x.new_empty((), dtype=checks.accumulator(x.dtype)),
                x.new_empty((3, weight.size(0)), dtype=torch.float64),
                *checks.empty_gradients(x, weight, need_dx, need_dw),
            )

        names = [define(schema, fake)]
        if not observed:
            names.append(dispatch.define_triton(schema, fake, "mixture.loss", likelihood.check))
            for name in names:
                torch.library.register_autograd(
                    name, _scale_gradients, setup_context=partial(_save_op, find), lib=LIB
                )
        for name in names:
            _finders[dispatch.overload(name.removeprefix("alrao_fast::"))] = find


for _likelihood in (Classes, Values):
    _define(_likelihood)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in the dtype of `out`: for the CUDA kernels, whose ABI cannot pass addmm's numbers."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)


LIB.impl(
    define("switch_mixture_add_product_(Tensor(a!) out, Tensor a, Tensor b) -> ()", no_result),
    _add_product,
    "CompositeExplicitAutograd",
)


def _stats(
    likelihood: Likelihood,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    target: Tensor,
    reduction: str,
    memory_budget: int | None,
    impl: str,
    observer: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and statistics, which the observer takes."""
    checks.REDUCTION.check("reduction", reduction)
    x, weight, bias, log_posterior = inputs
    check_together(
        "bias", x=x, weight=weight, bias=bias, log_posterior=log_posterior, target=target
    )
    memory = checks.budget(x, memory_budget)
    backend = backends.select(checks.OP, x.device, impl)
    samples = x.shape[:-1]
    x, weight, bias = checks.flat(x, weight, bias)
    target = likelihood.rows(target, samples, weight)
    if backend == "reference" or derivatives.transformed():
        checks.check_inputs(x, weight, bias, log_posterior, memory)
        likelihood.check_target(target, x, weight)
        x, weight, bias = derivatives.once(NO_OTHER_DERIVATIVE, x, weight, bias)
        function, posterior = getattr(reference, likelihood.OP), log_posterior.detach()
        loss, stats = function(
            x, weight, bias, posterior, target, **likelihood.options(), reduction=reduction
        )
        if observer is not None:
            observer.observe(stats, backend)
        return loss, stats

    # Whether the gradient to x, and those to weight and bias, are wanted.
    need_dx = need_dw = False
    if torch.is_grad_enabled():
        need_dx = x.requires_grad
        need_dw = weight.requires_grad or (bias is not None and bias.requires_grad)
    data = x, weight, bias, log_posterior, target
    needs = reduction == "mean", need_dx, need_dw, memory
    if observer is not None and backend == "cuda" and not torch.compiler.is_compiling():
        # The update is the tail of the op's last kernel.
        logw, _, t, running, mean, theta = observer
        observation = logw, t, running, mean, theta
        op = dispatch.overload(f"{likelihood.OP}_observe_")
        return _EagerGradients.apply(op, *likelihood.arguments(data, needs, observation))
    op = dispatch.overload(likelihood.OP, backend)
    arguments = likelihood.arguments(data, needs)
    if torch.compiler.is_compiling():
        loss, stats, *_ = op(*arguments)
    else:
        loss, stats = _EagerGradients.apply(op, *arguments)
    if observer is not None:
        observer.observe(stats, backend)
    return loss, stats


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
    inputs = x, weight, bias, log_posterior
    return _stats(
        Classes.of(ignore_index), inputs, target, reduction, memory_budget, impl, observer
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

    The loss has one backward: a derivative of its gradient, or one in forward mode, raises
    RuntimeError. Inside transforms of torch.func plain PyTorch computes, whatever `impl` says.
    """
    inputs = x, weight, bias, log_posterior
    loss, stats = _stats(Classes.of(ignore_index), inputs, target, reduction, memory_budget, impl)
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
    inputs = x, weight, bias, log_posterior
    return _stats(Values.of(sigma2), inputs, target, reduction, memory_budget, impl, observer)


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
    inputs = x, weight, bias, log_posterior
    loss, stats = _stats(Values.of(sigma2), inputs, target, reduction, memory_budget, impl)
    return loss, stats[0] / stats[2]
