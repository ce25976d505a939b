"""Muon, momentum that is orthogonalised, with one learning rate per feature."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from alrao_fast import sharding
from alrao_fast.arguments import Choice, Flag, Number, Optional
from alrao_fast.ops import feature_adam, feature_sgd
from alrao_fast.ops.feature import FeatureOp, Lists, Options, Scalars
from alrao_fast.ops.plan import Plan
from alrao_fast.optim.annealing import recipe
from alrao_fast.optim.base import AlraoOptimizer
from alrao_fast.optim.binding import Call, MakeRates
from alrao_fast.optim.flat_layouts import FlatLayout
from alrao_fast.optim.layouts import Layout
from alrao_fast.optim.matrices import Matrices, is_hidden_matrix, matrices_of
from alrao_fast.optim.orthogonal import Scaled, orthogonalized, scale_of, size_of_update
from alrao_fast.optim.param_groups import SHARED, tensor_of
from alrao_fast.optim.rates import LogTriangular, Sampler

_ADJUSTMENTS = ("original", "match_rms_adamw")


class _OfMatrices(FeatureOp):
    """`feature_sgd`, whose gradients are made here."""

    def __post_init__(self) -> None:
        """No op of its own."""


OF_MATRICES = _OfMatrices(
    stem="feature_sgd",
    # As Adam's first moment, so that the states of no other optimizer are taken for it.
    states=("exp_avg",),
    options={
        "momentum": Number(low=0, below=1),
        "nesterov": Flag(),
        "weight_decay": feature_adam.OP.options["weight_decay"],
    },
    fixed_states=1,
    reference=feature_sgd.reference,
)
_PLAIN: Options = MappingProxyType(
    {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "authors_momentum": False}
)


class AlraoMuon(AlraoOptimizer):
    """Muon for matrices, AdamW for all else, with a learning rate per feature, drawn once (arXiv 1810.01322).

        p = p - lr * r(i) * (s * orthogonal(momentum) + weight_decay * p)          of matrices
        p = p - lr * r(i) * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)       of all else

    A feature is a row of a matrix. log r is drawn per feature from a triangular law on [log lo, log hi]; clone n of N
    has its quantile (n + 1/2) / N. `orthogonal` is the iteration of Newton and Schulz of torch.optim.Muon, five steps
    with its coefficients (K. Jordan and others, Muon: an optimizer for hidden layers in neural networks, 2024), for all
    matrices of one shape together: in bfloat16 on a GPU, in float32 on a CPU, in float64 for float64 parameters.

    Which parameters are matrices follows the feature layouts: weights of linear layers, of convolutions, flattened to
    [out, in * h * w], of recurrent layers, one matrix per gate, of attention and of fused experts, one per expert. Not
    embeddings, even where an output layer shares their weight, clones, convolutions with one input channel (a depthwise
    one's channels share no input), nor what no layout knows, bare tensors among them. A param group's `orthogonalize`
    says otherwise. Each param group becomes two, one with the matrices, one with the rest; `describe_rates(opt,
    details=True)` shows which is which. A plain last layer, without clones, is a matrix like others: Muon's authors
    give it to AdamW (`orthogonalize=False`).

    Args:
        momentum, nesterov: of matrices, as in torch.optim.Muon.
        adjust_lr_fn: the scale s by which an orthogonal matrix [A, B] is multiplied, as in torch.optim.Muon:
            "match_rms_adamw", 0.2 sqrt(max(A, B)), makes its entries as large as Adam's updates usually are, so that
            one interval serves all parameters; "original", sqrt(max(1, A / B)).
        betas, eps: of all other parameters, as in torch.optim.AdamW.
        weight_decay: of all parameters, decoupled. The factor is at least 0 as in `AlraoAdam`, but not of matrices.
        orthogonalize: None: the matrices as above. True: all parameters of the group, which need two features of two
            entries or more. False: none. Its value stays what it is once a group is there.
        rate_bound: about the largest share of a feature that a step may change: as in `AlraoAdam`, and of matrices,
            whose updates have a known size, whatever s is.

    lr_range, lr, generator, rounding, model, foreach, fused, capturable and differentiable are those of `AlraoSGD`, but
    for the default of lr_range; maximize, master_weights, total_steps, warmup_steps, averaging and sampler those of
    `AlraoAdam`.

    DTensors: a matrix has to be whole to be orthogonalised, so every rank gathers its momentum and orthogonalises it;
    states and updates stay sharded.

    State per parameter, made at construction: "rate" (float32), "step" (int64), "exp_avg" (of matrices the momentum),
    "exp_avg_sq" (of others), "master", "average", and where rates are bounded "drawn_rate" and "rate_limit" (float32);
    of frozen ones only these and the rate. "exp_avg" and "exp_avg_sq" of bfloat16 and float16 parameters are float32.

    Raises as `AlraoAdam` does; ValueError, naming `orthogonalize`, for True with a parameter that is no matrix, and for
    flat shards (FSDP1) with matrices in them.
    """

    _op = feature_adam.OP
    _kinds = {
        **SHARED,
        **{name: feature_adam.OPTIONS[name] for name in ("betas", "eps", "weight_decay")},
        "momentum": OF_MATRICES.options["momentum"],
        "nesterov": Flag(),
        "adjust_lr_fn": Choice(*_ADJUSTMENTS),
        "orthogonalize": Optional(Flag()),
    }
    _float32_states = True
    _from_interval = LogTriangular

    def __init__(
        self,
        params: Any,
        lr_range: tuple[float, float] = (1e-4, 1.0),
        *,
        lr: float | Tensor = 1.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
        orthogonalize: bool | None = None,
        rate_bound: float | None = 0.05,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
        rounding: str | None = None,
        master_weights: bool = False,
        total_steps: int | None = None,
        warmup_steps: int | None = None,
        averaging: float | bool | None = None,
        model: nn.Module | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        arguments = locals()
        self._run, implied = recipe(arguments.pop("total_steps"), warmup_steps, averaging)
        super().__init__(arguments | implied)
        if self._run:
            # From now on the state has all that it will have.
            self.anneal_rates(0.0)

    # Which parameters are matrices.

    def _parts(self, group: dict[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The matrices of a group and its other parameters as groups of their own."""
        chosen = options["orthogonalize"]
        matrices: list[Any] = []
        others: list[Any] = []
        for entry in group["params"]:
            param = tensor_of(entry)
            layout = self._layouts.get(param) if isinstance(param, Tensor) else None
            if isinstance(layout, FlatLayout) and chosen is not False:
                _check_flat(layout, chosen)
            elif chosen and layout is not None:
                _check_matrix(param, layout)
            given = layout is not None and chosen is None and is_hidden_matrix(param, layout)
            (matrices if chosen or given else others).append(entry)
        parts = [(True, matrices), (False, others)]
        found = [{**group, "params": own, "orthogonalize": kind} for kind, own in parts if own]
        return found or [group]

    def _check_loaded(self, number: int, group: Mapping[str, Any]) -> None:
        own = self.param_groups[number]["orthogonalize"]
        if group["orthogonalize"] is not own:
            raise ValueError(
                f"orthogonalize of param group {number} of state_dict is {group['orthogonalize']}; expected {own}, as "
                "the optimizer"
            )

    def _in_rates(self, shares: dict[Tensor, float]) -> dict[Tensor, float]:
        # An update by the rate 1 is smaller, and as much larger may the rate be.
        sizes = {}
        for group in self.param_groups:
            for param in group["params"] if group["orthogonalize"] else ():
                shape = matrices_of(param, self._layouts[param])
                if param in shares and shape is not None:
                    sizes[param] = size_of_update(shape.rows, shape.columns, group["adjust_lr_fn"])
        return {param: share / sizes.get(param, 1.0) for param, share in shares.items()}

    # The update.

    def _update_of(self, group: Mapping[str, Any]) -> tuple[FeatureOp, Callable[..., Call]]:
        if not group["orthogonalize"]:
            return super()._update_of(group)
        return OF_MATRICES, partial(_MatrixCall, layouts=self._layouts)

    def _options(self, group: dict[str, Any]) -> Options:
        if group["orthogonalize"]:
            names = ("momentum", "nesterov", "adjust_lr_fn", "weight_decay")
            return {name: group[name] for name in names}
        beta1, beta2 = group["betas"]
        return {
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "amsgrad": False,
            "decoupled": True,
            "authors_eps": False,
        }


def _check_matrix(param: Tensor, layout: Layout) -> Matrices:
    """The matrices of a parameter; raises ValueError where it has none."""
    shape = None if layout.vector.kind == "clone" else matrices_of(param, layout)
    if shape is None:
        what = "clones" if layout.vector.kind == "clone" else f"shape {list(param.shape)}"
        raise ValueError(
            f"orthogonalize: got True with parameter {layout.name!r} of {what}, expected matrices, of at least two "
            "features and two entries each"
        )
    return shape


def _check_flat(layout: FlatLayout, chosen: bool | None) -> None:
    """Raise ValueError where a flat vector has, or should be, matrices: of them no rank has a whole one."""
    for part in layout.slices:
        if chosen or is_hidden_matrix(part.twin, part.layout):
            raise ValueError(
                f"orthogonalize: got {chosen} with a flat vector that has a part of {part.layout.name!r}, expected "
                "False there, or whole parameters and DTensors (fully_shard): matrices are orthogonalised as a whole"
            )


class _MatrixCall(Call):
    """A step by SGD along the orthogonalised momentum of matrices.

    With g the gradient, m the average of the gradients before and b the momentum, Muon orthogonalises
    g + b (m' - g) where m' = m + (1 - b) (g - m), or m' itself without Nesterov's look-ahead: g + b^2 (m - g), or
    g + b (m - g). So m needs to be written only after the step.
    """

    def __init__(
        self,
        op: FeatureOp,
        lists: Lists,
        impl: str,
        positions: list[int] | None,
        derived: Mapping[int, MakeRates],
        parts: sharding.LocalParts | None,
        *,
        layouts: Mapping[Tensor, Layout],
    ) -> None:
        [self._momenta] = lists.states
        super().__init__(feature_sgd.OP, lists._replace(states=[]), impl, positions, derived, parts)
        self._matrices = [_check_matrix(param, layouts[param]) for param in self.params]

    @torch.no_grad()
    def _run(self, plan: Plan, grads: list[Tensor], options: Options, scalars: Scalars) -> bool:
        momentum, momenta = options["momentum"], self._momenta
        values = self._values(grads, scalars)
        ahead = momentum**2 if options["nesterov"] else momentum
        directions = list(torch._foreach_lerp(values, momenta, ahead))
        updates = self._orthogonalized(directions, str(options["adjust_lr_fn"]))
        plain = {**_PLAIN, "weight_decay": options["weight_decay"]}
        if not plan.step(updates, plain, scalars._replace(grad_scale=None)):
            return False
        torch._foreach_lerp_(momenta, values, 1 - momentum)
        return True

    def _values(self, grads: list[Tensor], scalars: Scalars) -> list[Tensor]:
        """The gradients in the averages' dtype, without loss scaling; where that was too high, the averages."""
        values = [grad.to(m.dtype) for grad, m in zip(grads, self._momenta)]
        if scalars.grad_scale is not None:
            values = [value / scalars.grad_scale for value in values]
        if scalars.found_inf is not None:
            good = scalars.found_inf == 0
            values = [torch.where(good, value, m) for value, m in zip(values, self._momenta)]
        return values

    def _orthogonalized(self, directions: list[Tensor], adjust_lr_fn: str) -> list[Tensor]:
        """What is here of the updates of all parameters, in their dtype."""
        given = []
        for param, shape, direction in zip(self.params, self._matrices, directions):
            whole = sharding.gathered(direction, param) if self._parts else direction
            scale = scale_of(shape.rows, shape.columns, adjust_lr_fn)
            given.append(Scaled(shape.of(whole), scale))
        updates = []
        for param, shape, matrices in zip(self.params, self._matrices, orthogonalized(given)):
            update = shape.back(matrices, param)
            if self._parts:
                update = sharding.part_of(update, param)
            updates.append(update.to(param.dtype))
        return updates
