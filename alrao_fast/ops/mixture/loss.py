"""switch_mixture's loss: the N clones of the last layer, evaluated together and mixed by the posterior.

Mathematics: reference/switch_mixture.py. The op computes the gradients along with the loss, since
one pass over the logits serves all of them; the backward only scales them. Losses per sample wait
for the factors of theirs (per_sample.py). The gradients are not those of one
function: x gets the mixture's, each clone its own, so there is no second derivative, and no
forward-mode one. Both raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.ops import derivatives, dispatch
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.dispatch import LIB, define, no_result
from alrao_fast.ops.mixture import checks, per_sample
from alrao_fast.ops.mixture.likelihood import Classes, Likelihood, Values
from alrao_fast.ops.mixture.weighting import Weighting
from alrao_fast.ops.switch_update import observe_op, switch_observe_
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


class _Op(NamedTuple):
    """An op of the loss, or its twin."""

    overload: Any
    likelihood: type[Likelihood]
    names: tuple[str, ...]
    # Finds x, weight, bias, need_dx and need_dw among the inputs.
    find: Callable[[Sequence[Any]], tuple[Any, ...]]
    # The place of per_sample.
    per_sample: int
    observed: bool

    def run(self, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The op's results, within a torch.autograd.Function."""
        output: tuple[Tensor, ...]
        if self.observed:
            output = self.overload(*inputs)
        else:
            # What the registered autograd does without gradients, less a sixth of a small head's forward.
            with torch._C._AutoDispatchBelowAutograd():
                output = self.overload(*inputs)
        return output


# By the likelihood's op, whether it is the Triton twin, and whether it observes.
_ops: dict[tuple[str, bool, bool], _Op] = {}


# An op, its inputs after x, weight and bias, and whether the gradients to x and to the other two are wanted.
_Call = tuple[_Op, tuple[Any, ...], bool, bool]


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

    def state(self) -> dict[str, Tensor]:
        """The tensors beside the log-posterior, by name."""
        return {"logw": self.logw, "t": self.t, "running": self.running}

    def observe(self, stats: Tensor, impl: str = "auto") -> None:
        """Take the statistics `[3, N]` of a batch."""
        tensors = *self[:4], stats
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            with derivatives.outside(CANNOT_OBSERVE, tensors) as plain:
                switch_observe_(*plain, mean=self.mean, theta=self.theta, impl=impl)
        else:
            switch_observe_(*tensors, mean=self.mean, theta=self.theta, impl=impl)


def _save(ctx: Any, found: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients for the backward; `found`: x, weight, bias, need_dx and need_dw."""
    _loss, _stats, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.dtypes = checks.gradient_dtypes(*found)
    # For their place in the graph alone: save_for_backward would forbid to change their values.
    ctx.sources = found[:3]


def _save_op(op: _Op, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.per_sample = inputs[op.per_sample]
    ctx.num_others = len(inputs) - 3
    if ctx.per_sample:
        per_sample.save(ctx, op, inputs, output[2:])
    else:
        _save(ctx, op.find(inputs), output)


def _differentiate_op(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if ctx.per_sample:
        gradients = per_sample.gradients(ctx, grad, ctx.needs_input_grad, NO_OTHER_DERIVATIVE)
    else:
        gradients = _scaled_gradients(ctx, grad)
    return *gradients, *[None] * ctx.num_others


def _scaled_gradients(ctx: Any, grad: Tensor | None) -> Sequence[Tensor | None]:
    """The gradients to x, weight and bias by that to the loss; None: nothing arrived."""
    if grad is None:
        return None, None, None
    dtypes = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return _gradients(ctx, [None if dtype is None else saved * grad for saved, dtype in dtypes])


def _gradients(ctx: Any, scaled: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The same, scaled already, in the dtypes that autograd expects."""
    gradients = [checks.in_dtype(g, dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)]
    if torch.is_grad_enabled():
        return derivatives.final(gradients, ctx.sources, NO_OTHER_DERIVATIVE)
    return gradients


class _EagerGradients(torch.autograd.Function):
    """The op with the same gradients as registered below, at half of the dispatcher's overhead.

    That overhead, about 50 us, is a sixth of the training step of a small network. torch.compile
    goes through the registration. Every argument costs: `call` holds the op, and those of its inputs
    that have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        op, others, need_dx, need_dw = call
        output = op.run((x, weight, bias, *others))
        loss, stats, *_ = output
        ctx.mark_non_differentiable(stats)
        _save(ctx, (x, weight, bias, need_dx, need_dw), output)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        # `loss.backward()` brings the factor 1: then autograd takes the saved gradients as they
        # are. Never those of a graph that is kept: its next backward needs them, and whoever gets
        # these may write into them. A traced backward has no value to look at.
        kept = (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch._C._autograd._get_current_graph_task_keep_graph()
        )
        saved = () if kept or grad is None else ctx.saved_tensors
        if grad is not None and not kept and _scaled_in_place(saved, grad):
            gradients = _gradients(ctx, saved)
        else:
            gradients = _scaled_gradients(ctx, grad)
        if not kept:
            ctx.sources = ()
        return None, *gradients


class _EagerLosses(torch.autograd.Function):
    """The same of losses that are not summed."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        op, others, *_ = call
        inputs = x, weight, bias, *others
        losses, stats, *made = op.run(inputs)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        per_sample.save(ctx, op, inputs, made)
        return losses, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        return None, *per_sample.gradients(ctx, grad, needed, NO_OTHER_DERIVATIVE)


def _scaled_in_place(gradients: Sequence[Tensor], grad: Tensor) -> bool:
    """Scale the gradients in place, without a wait for a device and, but by Triton, without a pass where `grad` is 1.

    False, and nothing done, for a batch of factors.
    """
    if derivatives.is_batch(grad):
        return False
    if grad.device.type != "cpu" or grad.item() != 1:
        _scale(*gradients, grad)
    return True


def _define(likelihood: type[Likelihood]) -> None:
    """Define the likelihood's op, its Triton twin, and for compiled GPU kernels the op that observes, too."""
    for observed in (False, True):
        schema = likelihood.schema(observed=observed)
        names, defaults = dispatch.arguments_of(schema)
        find = dispatch.finder(schema, "x", "weight", "bias", "need_dx", "need_dw")
        place = names.index("per_sample")

        def fake(
            *inputs: Any, defaults: Any = defaults, find: Any = find, place: int = place
        ) -> Any:
            # Where the dispatcher calls Python, it leaves out defaults at the end.
            inputs = (*inputs, *defaults[len(inputs) :])
            x, weight, bias, need_dx, need_dw = find(inputs)
            if inputs[place] and (need_dx or need_dw):
                raise NotImplementedError(f"{likelihood.OP}: {per_sample.IN_NO_GRAPH}")
            losses = x.shape[:1] if inputs[place] else ()
            return (
                x.new_empty(losses, dtype=checks.accumulator(x.dtype)),
                x.new_empty((3, weight.size(0)), dtype=torch.float64),
                *checks.empty_loss_gradients(x, weight, bias, need_dx, need_dw),
            )

        qualified = [define(schema, fake)]
        if not observed:
            qualified.append(dispatch.define_triton(schema, fake, "mixture.loss", likelihood.check))
        for name, is_twin in zip(qualified, (False, True)):
            overload = dispatch.overload(name.removeprefix("alrao_fast::"))
            op = _Op(overload, likelihood, names, find, place, observed)
            _ops[likelihood.OP, is_twin, observed] = op
            if not observed:
                torch.library.register_autograd(
                    name, _differentiate_op, setup_context=partial(_save_op, op), lib=LIB
                )


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


def _scale_each(dx: Tensor, dweight: Tensor, dbias: Tensor, factor: Tensor) -> None:
    for gradient in (dx, dweight, dbias):
        if gradient.numel() > 0:
            gradient.mul_(factor)


# In C++/CUDA one launch, which ends at once where the factor is 1.
_SCALE = "switch_mixture_scale_"
LIB.impl(
    define(
        f"{_SCALE}(Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, Tensor factor) -> ()",
        no_result,
    ),
    _scale_each,
    "CompositeExplicitAutograd",
)
_scale = dispatch.overload(_SCALE)


def mixture_stats(
    likelihood: Likelihood,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    target: Tensor,
    weighting: Weighting,
    memory_budget: int | None,
    impl: str = "auto",
    observer: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and statistics, which the observer takes."""
    x, weight, bias, log_posterior = inputs
    state = {} if observer is None else observer.state()
    check_together(
        "bias", x=x, weight=weight, bias=bias, log_posterior=log_posterior, target=target, **state
    )
    memory = checks.budget(x, memory_budget)
    backend = backends.select(checks.OP, x.device, impl)
    samples = x.shape[:-1]
    x, weight, bias = checks.flat(x, weight, bias)
    target = likelihood.rows(target, samples, weight)
    plain = backend == "reference" or derivatives.transformed()
    likelihood, target, mean = likelihood.weighed(
        target, weight, weighting, "reference" if plain else backend
    )
    inputs = x, weight, bias, log_posterior
    how = mean, weighting.per_sample, memory, backend
    loss, stats = prepared_stats(likelihood, inputs, target, *how, observer)
    if weighting.per_sample and len(samples) != 1:
        loss = loss.view(samples)
    return loss, stats


def prepared_stats(
    likelihood: Likelihood,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    target: Tensor,
    mean: bool,
    one_by_one: bool,
    memory: int,
    backend: str,
    observer: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of inputs and a target that are checked and in rows, with the options that `weighed` has made, of which
    `one_by_one` is one: then the losses are `[B]`."""
    x, weight, bias, log_posterior = inputs
    if backend == "reference" or derivatives.transformed():
        checks.check_inputs(x, weight, bias, log_posterior, memory)
        likelihood.check_target(target, x, weight)
        likelihood.check_weights(x, mean, False)
        x, weight, bias = derivatives.once(NO_OTHER_DERIVATIVE, x, weight, bias)
        function, posterior = getattr(reference, likelihood.OP), log_posterior.detach()
        options = {**likelihood.defining(), "reduction": "mean" if mean else "sum"}
        loss, stats = function(x, weight, bias, posterior, target, **options)
        if observer is not None:
            observer.observe(stats, backend)
        return loss, stats

    # Whether the gradient to x, and those to weight and bias, are wanted.
    need_dx = need_dw = False
    if torch.is_grad_enabled() and (not one_by_one or per_sample.keeps(x, weight, memory, backend)):
        need_dx = x.requires_grad
        need_dw = weight.requires_grad or (bias is not None and bias.requires_grad)
    elif one_by_one:
        # The backward runs the op again, with the posterior that this forward saw.
        log_posterior = log_posterior.clone()
    data = x, weight, bias, log_posterior, target
    needs = mean, need_dx, need_dw, memory
    one_launch = backend == "cuda" and not one_by_one
    if observer is not None and one_launch and not torch.compiler.is_compiling():
        # The update is the tail of the op's last kernel.
        logw, _, t, running, mean, theta = observer
        observation = logw, t, running, mean, theta
        op = _ops[likelihood.OP, False, True]
        arguments = likelihood.arguments(data, needs, observation)
        call = op, arguments[3:], need_dx, need_dw
        return _EagerGradients.apply(call, x, weight, bias)
    arguments = likelihood.arguments(data, needs)
    if torch.compiler.is_compiling():
        loss, stats, *_ = dispatch.overload(likelihood.OP, backend)(*arguments)
    else:
        op = _ops[likelihood.OP, backend == "triton", False]
        call = op, arguments[3:], need_dx, need_dw
        function = _EagerLosses if one_by_one else _EagerGradients
        loss, stats = function.apply(call, x, weight, bias)
    if observer is not None:
        # Its tensors are checked.
        logw, own, t, running, mean, theta = observer
        observe_op(backend)(logw, own, t, running, stats, mean, theta)
    return loss, stats
