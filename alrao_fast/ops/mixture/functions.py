"""The losses of the mixture as functions, of classifiers and of regressors."""

from torch import Tensor

from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture.checks import check_weight
from alrao_fast.ops.mixture.likelihood import Classes, Values
from alrao_fast.ops.mixture.loss import mixture_stats
from alrao_fast.ops.mixture.weighting import ClassWeight, Weighting


def switch_mixture_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`switch_mixture_nll` with the sums behind its second result, for running statistics.

    Returns the loss and float64 `stats [3, N]`, detached: per clone the sum of its own -log p over
    the counted samples (inf if it was dead for one), its correct predictions, and the number of
    counted samples.
    """
    if class_weight is not None:
        check_together(x=x, class_weight=class_weight)
        check_weight(weight)
        class_weight = ClassWeight(weight.size(1)).check("class_weight", class_weight)
    likelihood = Classes.of(ignore_index, class_weight, label_smoothing, z_loss, logit_softcap)
    return mixture_stats(
        likelihood,
        (x, weight, bias, log_posterior),
        target,
        Weighting.of(reduction, sample_weight, num_items_in_batch, x),
        memory_budget,
        impl,
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
    sample_weight: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of a mixture of N linear softmax classifiers, and each clone's own.

    Args:
        x: `[..., D]` features; float32, float64, bfloat16 or float16.
        weight, bias: `[N, C, D]` and `[N, C]` (or None), the clones.
        log_posterior: `[N]` float64 or float32, the switch's log-posterior `a`. No gradient.
        target: `[...]` int64 classes, or `[..., C]` floating probabilities `q`: a row that sums to
            S stands for its normalised with the weight S, one of zeros for a sample that does not
            count. No gradient.
        ignore_index: targets of this value do not count.
        reduction: "mean" over the counted samples, "sum", or "none" for the losses `[...]`. A mean
            is the weighted one of F.cross_entropy: over the weights of samples and, for classes,
            the `class_weight` of the targets.
        sample_weight: `[...]` factors of the samples' losses, any real dtype; where it is 0 the
            sample does not count. No gradient.
        num_items_in_batch: a number that the sum is divided by, whatever the reduction, as when
            several batches make one step.
        class_weight: `[C]` factors >= 0 of the classes, as the weight of F.cross_entropy; where the
            target's is 0 the sample does not count. No gradient.
        label_smoothing: 0 to 1, the share of the target that is spread evenly over the classes.
        z_loss: factor >= 0 of the square of the logits' logsumexp.
        logit_softcap: k > 0: the logits are k tanh(z / k).
        memory_budget: bytes for the logits of a chunk of samples; None: 64 MiB on a CPU, 1 GiB on a
            GPU.
        impl: "auto", or the backend that must run it.

    Returns:
        The mixture's loss (a scalar, or `[...]`; float32, or float64 for float64 inputs), and
        `clone_nll [N]` float64, detached: always the mean of -log p over the counted samples, by no
        weights and without what regularises the loss; NaN where nothing counted.

    With `logp[b,n,c] = log_softmax_c(W_n x_b + b_n)` (paper, section 3.2):
        loss        = -mean_b logsumexp_n(a_n + logp[b,n,y_b])     its gradient goes to x
        clone_nll_n = -mean_b logp[b,n,y_b]                        its gradient goes to W_n and b_n
    All gradients scale with the loss's upstream gradient. A clone with a logit that is not finite
    for a sample is dead there: it takes no part in the mixture, and gets no gradient from the
    batch. Where all are dead the loss is +inf and the sample has no gradient. Smoothing, class
    weights and z-loss change the loss of each clone within the mixture; the weights of samples and
    of the target's class are factors around it (the documentation's page "Losses" has the
    formulas).

    The loss has one backward: a derivative of its gradient, or one in forward mode, raises
    RuntimeError. Inside transforms of torch.func plain PyTorch computes, whatever `impl` says. With
    reduction "none" the backward computes the logits again.
    """
    loss, stats = switch_mixture_stats(
        x,
        weight,
        bias,
        log_posterior,
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        sample_weight=sample_weight,
        num_items_in_batch=num_items_in_batch,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
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
    sample_weight: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    memory_budget: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`switch_mixture_gaussian_nll` with the sums behind its second result.

    As `switch_mixture_stats`; row 1 is the sum of squared errors.
    """
    return mixture_stats(
        Values.of(sigma2),
        (x, weight, bias, log_posterior),
        target,
        Weighting.of(reduction, sample_weight, num_items_in_batch, x),
        memory_budget,
        impl,
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
    sample_weight: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
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
        sample_weight=sample_weight,
        num_items_in_batch=num_items_in_batch,
        memory_budget=memory_budget,
        impl=impl,
    )
    return loss, stats[0] / stats[2]
