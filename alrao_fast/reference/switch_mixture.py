"""The N clones of the last layer, evaluated together and mixed by the switch posterior (paper, section 3.2).

With `logp[b,n] = log p_n(y_b | x_b)` the log-likelihood of sample b under clone n and `a` the switch log-posterior:

    loss   = -mean_b logsumexp_n(a_n + logp[b,n])        value, and gradient to x
    own_n  = -mean_b logp[b,n]                           gradient to clone n's weight and bias, as if it were alone

One returned scalar carries both gradients: the mixture is built on detached weights, the clones' own losses on
detached features, and their value is subtracted again.

The prediction is another mixture, over the clones that are alive for the sample (below):

    log_prob = log sum_n exp(a_n + logp[b,n,c]) - log sum_n exp(a_n)

A dead clone predicts nothing, so its posterior mass is shared out among the living; so is what the mass of an average
of log-posteriors lacks or exceeds 1 by. In the loss a dead clone has the likelihood 0 and keeps its mass, as the switch
counts it: what it takes from the mixture's likelihood shows that it died, and the gradients are the same. Which clones
are alive is no function of the parameters, so the second term has no gradient.

Options of the classifiers' loss. The logits z may be capped: s = k tanh(z / k) with k = `softcap`, of which logp is
then the log_softmax, in predictions, too. The target of sample b is a distribution q_b, one-hot for a class. With class
weights w, label smoothing e and z-loss l clone n has in place of -logp[b,n] the loss

    t_b[c]  = w_c ((1 - e) q_b[c] + e / C),    T_b = sum_c t_b[c]
    L_n[b]  = -sum_c (t_b[c] / T_b) logp[b,n,c] + l logsumexp_c(s[b,n,c])^2

and the sums over b have the factors `row_weight [B]` in place of 1 / B, of which T_b is one: weights never sharpen or
flatten the mixture. A sample of factor 0 does not count. What the clones are judged by is neither weighted nor
regularised: -sum_c q_b[c] logp[b,n,c].

Clones that are not finite. A clone with a non-finite output (uncapped) or log-likelihood for a sample is dead there:
its log-likelihood is -inf, so its responsibility is 0. A clone that is dead for any counted sample gets no gradient
from the batch; of losses one by one, if the sample's has an upstream gradient. To keep 0 * inf out of autograd,
everything below runs on operands in which non-finite rows are replaced by zeros, and the replaced results are masked.
Where all clones with posterior mass are dead the loss is +inf, and no class has a probability (-inf, of which the loss
is +inf, too); a mean of values has none to return, and is NaN.

Logits and log-likelihoods may be as large as numbers are. exp(z - (max + log sum)) loses the sum's logarithm where max
is large, so the maximum comes off first wherever a difference is taken: exp((z - max) - log sum).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _finite_rows(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    return x.isfinite().all(dims, keepdim=True)


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Outputs [B, N, C] of the clones."""
    out = torch.einsum("bd,ncd->bnc", x, weight)
    return out if bias is None else out + bias


def _safe_outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [B, N, C], all finite, and the mask [B, N] of where they are the true ones."""
    with torch.no_grad():
        alive = _outputs(x, weight, bias).isfinite().all(2)
    x = torch.where(_finite_rows(x, 1), x, 0)
    # A tensor, since the exporter for ONNX of torch 2.11 takes no number beside a parameter.
    zero = x.new_zeros(())
    weight = torch.where(_finite_rows(weight, (1, 2)), weight, zero)
    if bias is not None:
        bias = torch.where(_finite_rows(bias, 1), bias, zero)
    out = _outputs(x, weight, bias)
    return torch.where(alive.unsqueeze(2), out, 0), alive


def _masked_log_likelihood(logp: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """`logp [B, N]` with -inf where dead, and the final mask of who is alive."""
    alive = alive & logp.detach().isfinite()
    return torch.where(alive, logp, -math.inf), alive


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits, drawn smoothly between -softcap and softcap; as they are without one (None or 0)."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _expected(logp: Tensor, distribution: Tensor) -> Tensor:
    """`sum_c distribution[b,c] logp[b,n,c]`, [B, N]; what is impossible may have the probability 0."""
    p = distribution.unsqueeze(1)
    return torch.where(p == 0, 0, p * logp).sum(2)


def likelihoods(
    logp: Tensor, target: Tensor, class_weight: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Of `logp [B, N, C]`, each [B, N]: the log-likelihood of the target, a class [B] or a distribution [B, C], and
    what stands for it in the loss.
    """
    classes = logp.size(2)
    if target.dim() == 2:
        likelihood = _expected(logp, target)
    else:
        index = target.view(-1, 1, 1).expand(-1, logp.size(1), 1)
        likelihood = logp.gather(2, index).squeeze(2)
    if class_weight is None and label_smoothing == 0:
        return likelihood, likelihood
    if target.dim() == 2:
        q = target
    else:
        q = (torch.arange(classes, device=target.device) == target.unsqueeze(1)).to(logp.dtype)
    t = (1 - label_smoothing) * q + label_smoothing / classes
    t = t if class_weight is None else class_weight * t
    total = t.sum(1, keepdim=True)
    return likelihood, _expected(logp, t / torch.where(total == 0, 1, total))


def _categorical(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
):
    """-L [B, N] of the `target`, a class [B] or distribution [B, C]; its log-likelihood, without a graph; mask of the
    living; correct predictions.
    """
    logits, alive = _safe_outputs(x, weight, bias)
    logits = soft_capped(logits, softcap)
    logp = logits.log_softmax(2)
    if target.dim() == 2:
        # One that is not finite is unlikely under every clone and must not reach the gradients.
        finite = _finite_rows(target, 1)
        alive = alive & finite
        target = torch.where(finite, target, 0)
        classes = target.argmax(1)
    else:
        classes = target
    likelihood, objective = likelihoods(logp, target, class_weight, label_smoothing)
    if z_loss != 0:
        objective = objective - z_loss * logits.logsumexp(2).square()
    objective, alive = _masked_log_likelihood(objective, alive)
    likelihood = torch.where(alive, likelihood.detach(), -math.inf)
    correct = (logits.argmax(2) == classes.unsqueeze(1)) & alive
    return objective, likelihood, alive, correct.double()


def _gaussian(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, sigma2: float):
    """Log-density [B, N] of `target [B, K]`, mask of the living [B, N], squared error [B, N]."""
    means, alive = _safe_outputs(x, weight, bias)
    # As for x: a target that is not finite is unlikely under every clone and must not reach the gradients.
    squared = (target.unsqueeze(1) - means).square().sum(2)
    finite = torch.isfinite(squared.detach())
    squared = (torch.where(_finite_rows(target, 1), target, 0).unsqueeze(1) - means).square().sum(2)
    logp = -squared / (2 * sigma2) - 0.5 * target.size(1) * math.log(2 * math.pi * sigma2)
    logp, alive = _masked_log_likelihood(logp, alive & finite)
    return logp, alive, torch.where(alive, squared.detach(), math.inf).double()


def _log_mixture(joint: Tensor) -> Tensor:
    """logsumexp [B, 1] of `joint [B, N]` over the clones: -inf, without a gradient, where all are."""
    peak = joint.detach().amax(1, keepdim=True)
    possible = peak > -math.inf
    # Relative to the largest, or the gradients of log-likelihoods in the millions would not sum to 1.
    shifted = torch.where(possible, joint - torch.where(possible, peak, 0), 0)
    return torch.where(possible, peak + torch.logsumexp(shifted, dim=1, keepdim=True), -math.inf)


def _posterior(log_posterior: Tensor, alive: Tensor) -> Tensor:
    """Log-posterior [B, N] over the clones `alive [B, N]`, float64: -inf for the dead, NaN where none has any mass."""
    a = log_posterior.detach().double()
    return torch.where(alive, a, -math.inf).log_softmax(1)


class _OfTheLiving(torch.autograd.Function):
    """`own [B, N]`; a clone, not `alive [B, N]` for a sample that sends back a gradient, gets none from any."""

    generate_vmap_rule = True

    @staticmethod
    def forward(own: Tensor, alive: Tensor) -> Tensor:
        return own.view_as(own)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (alive,) = ctx.saved_tensors
        return torch.where((alive | (grad == 0)).all(0), grad, 0), None


def of_the_living(logp: Tensor, alive: Tensor) -> Tensor:
    """`logp [B, N]`, 0 where not `alive`, of which a clone that is dead for any sample gets no gradient."""
    own: Tensor = _OfTheLiving.apply(torch.where(alive, logp, 0), alive)
    return own


def combine(
    mixture_logp: Tensor,
    own_logp: Tensor,
    alive: Tensor,
    score: Tensor,
    counted: Tensor,
    log_posterior: Tensor,
    reduction: str,
    *,
    likelihood: Tensor | None = None,
    row_weight: Tensor | None = None,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss with both gradients, and the statistics, from the clones' log-likelihoods `[B, N]`, -inf where not `alive`.

    `mixture_logp` has the graph to x, `own_logp` the graph to the clones; their values are the same. `score [B, N]`
    is summed into row 1 of the statistics, `counted [B]` says which samples count. `likelihood [B, N]` is what the
    statistics have in place of `own_logp`. `row_weight [B]` weighs the losses, 0 counts as not counted; per_sample:
    they are returned one by one, `[B]`.
    """
    counted = counted.unsqueeze(1)
    if row_weight is not None:
        row_weight = row_weight.unsqueeze(1)
        counted = counted & (row_weight != 0)
    count = counted.sum()
    # In float64 a sum of finite losses stays finite.
    norm = count.clamp(min=1).double() if reduction == "mean" else 1

    # +inf, visible, and without a gradient where every clone with posterior mass is dead.
    log_mixture = _log_mixture(log_posterior.to(mixture_logp.dtype) + mixture_logp)
    own = of_the_living(torch.where(counted, own_logp, 0), alive | ~counted)
    each = -torch.where(counted, log_mixture, 0) + (own.detach() - own).sum(1, keepdim=True)
    if row_weight is not None:
        each = torch.where(counted, row_weight * each, 0)
    loss = each.squeeze(1) if per_sample else each.sum(dtype=torch.float64) / norm

    likelihood = own_logp if likelihood is None else likelihood
    stats = torch.stack(
        [
            -torch.where(counted, likelihood.detach(), 0).double().sum(0),
            torch.where(counted, score, 0).sum(0),
            count.double().expand(score.size(1)),
        ]
    )
    return loss.to(mixture_logp.dtype), stats


def switch_mixture_nll(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    reduction: str,
    row_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the mixture of N linear softmax classifiers.

    `x [B, D]`, `weight [N, C, D]`, `bias [N, C]` or None, `log_posterior [N]`, `target [B]` int64 or distributions
    `[B, C]`; the options are those above. Returns the loss and float64 `stats [3, N]`: sum of the clone's own -log p
    over the counted samples, its correct predictions, the number of counted samples.
    """
    dtype = _accumulator(x, weight)
    hard = target.dim() == 1
    counted = target != ignore_index if hard else torch.ones_like(target[:, 0], dtype=torch.bool)
    if row_weight is not None:
        counted = counted & (row_weight != 0)
    # What does not count may be anything, NaN too, and gets a zero gradient.
    x = torch.where(counted.unsqueeze(1), x.to(dtype), 0)
    target = torch.where(counted if hard else counted.unsqueeze(1), target, 0)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    fixed_bias = None if bias is None else bias.detach()
    options = target, class_weight, label_smoothing, z_loss, softcap
    mixture, *_ = _categorical(x, weight.detach(), fixed_bias, *options)
    own, likelihood, alive, correct = _categorical(x.detach(), weight, bias, *options)
    return combine(
        mixture,
        own,
        alive,
        correct,
        counted,
        log_posterior,
        reduction,
        likelihood=likelihood,
        row_weight=row_weight,
        per_sample=per_sample,
    )


def switch_mixture_gaussian_nll(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    *,
    sigma2: float,
    reduction: str,
    row_weight: Tensor | None = None,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same for N linear regressors with Gaussian noise of variance `sigma2`; `target [B, K]`, K outputs.

    Row 1 of the statistics is the sum of squared errors (inf for a clone that was dead).
    """
    dtype = _accumulator(x, weight)
    x, weight, target = x.to(dtype), weight.to(dtype), target.to(dtype)
    counted = torch.ones_like(target[:, 0], dtype=torch.bool)
    if row_weight is not None:
        counted = row_weight != 0
        x, target = (torch.where(counted.unsqueeze(1), t, 0) for t in (x, target))
    bias = None if bias is None else bias.to(dtype)
    fixed_bias = None if bias is None else bias.detach()
    mixture, _, _ = _gaussian(x, weight.detach(), fixed_bias, target, sigma2)
    own, alive, squared = _gaussian(x.detach(), weight, bias, target, sigma2)
    return combine(
        mixture,
        own,
        alive,
        squared,
        counted,
        log_posterior,
        reduction,
        row_weight=row_weight,
        per_sample=per_sample,
    )


def switch_mixture_log_prob(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    softcap: float = 0.0,
) -> Tensor:
    """Mixture log-probabilities [B, C]: `log sum_n exp(a_n + logp[b,n,c])` over the living clones, `a` normalised to
    them.

    A sample on which every clone is dead gets -inf everywhere.
    """
    dtype = _accumulator(x, weight)
    bias = None if bias is None else bias.to(dtype)
    logits, alive = _safe_outputs(x.to(dtype), weight.to(dtype), bias)
    logp = F.log_softmax(soft_capped(logits, softcap), dim=2)
    return log_mixture_of_the_living(logp, alive, log_posterior)


def log_mixture_of_the_living(logp: Tensor, alive: Tensor, log_posterior: Tensor) -> Tensor:
    """Mixture [B, C] of the log-probabilities `[B, N, C]` of the clones `alive [B, N]`; -inf where there is none."""
    posterior = _posterior(log_posterior, alive)
    joint = posterior.to(logp.dtype).unsqueeze(2) + logp
    possible = (joint.detach() > -math.inf).any(1)
    mixture = torch.logsumexp(torch.where(possible.unsqueeze(1), joint, 0), dim=1)
    return torch.where(possible, mixture, -math.inf)


def switch_mixture_mean(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor
) -> Tensor:
    """Posterior mean [B, K] of the regressors: `sum_n p_n f_n(x)` over the living clones, p normalised to them.

    NaN where every clone with posterior mass is dead.
    """
    dtype = _accumulator(x, weight)
    bias = None if bias is None else bias.to(dtype)
    means, alive = _safe_outputs(x.to(dtype), weight.to(dtype), bias)
    p = _posterior(log_posterior, alive).exp().to(dtype)
    return (p.unsqueeze(2) * means).sum(1)


def mean_and_mass(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, but 0 where there is no clone to take the mean of, and the logarithm `[B]`, float64, of the
    probability that the living clones have together."""
    dtype = _accumulator(x, weight)
    bias = None if bias is None else bias.to(dtype)
    means, alive = _safe_outputs(x.to(dtype), weight.to(dtype), bias)
    mass = _mass(log_posterior, alive)
    norm = torch.where(mass > -math.inf, mass, 0).unsqueeze(1)
    p = torch.where(alive, log_posterior.double() - norm, -math.inf).exp().to(dtype)
    return (p.unsqueeze(2) * means).sum(1), mass


def _mass(log_posterior: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive, log_posterior.double(), -math.inf).logsumexp(1)


def log_mass(x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor) -> Tensor:
    """Logarithm [B] of the probability that the clones alive for the sample have together."""
    dtype = _accumulator(x, weight)
    bias = None if bias is None else bias.to(dtype)
    _, alive = _safe_outputs(x.to(dtype), weight.to(dtype), bias)
    return _mass(log_posterior, alive).to(dtype)
