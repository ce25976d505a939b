"""The options of the classifier's loss in the kernels of the mixture (reference/switch_mixture.py has the formulas).

Kernels take their values at run time, and as constants only whether there are any (OPTIONS) and which tensors are
(HAS_ROW_WEIGHT, HAS_CLASS_WEIGHT, SOFT, CAPPED); without options they are what they were.
"""

import triton
import triton.language as tl


@triton.jit
def tanh_of(x):
    """tanh: its series for small arguments, where a difference of exponentials would lose digits."""
    square = x * x
    series = 21844.0 / 6081075.0
    series = series * square - 1382.0 / 155925.0
    series = series * square + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    if x.dtype == tl.float64:
        is_small = tl.abs(x) < 0.02
    else:
        is_small = tl.abs(x) < 0.5
    return tl.where(is_small, x + x * (square * series), tl.where(x < 0.0, -large, large))


@triton.jit
def cap(z, softcap, ACC: tl.constexpr):
    """softcap tanh(z / softcap) of finite logits."""
    bound = tl.full([], softcap, ACC)
    return bound * tanh_of(z / bound)


@triton.jit
def cap_derivative(z, softcap, ACC: tl.constexpr):
    """That of `cap`, by its value."""
    share = z / tl.full([], softcap, ACC)
    return 1.0 - share * share


@triton.jit
def load_weight(
    row_weight_ptr,
    norm_ptr,
    sample,
    ACC: tl.constexpr,
    FOLD: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
):
    """A sample's factor in the loss, and that in the gradient to the logits; 0: it does not count."""
    one = tl.full([], 1.0, ACC)
    if HAS_ROW_WEIGHT:
        weight = tl.load(row_weight_ptr + sample).to(ACC)
        if FOLD:
            return weight, weight
        else:
            # Relative to the largest, by which the gradients are scaled at the end.
            return weight, weight / tl.load(norm_ptr).to(ACC)
    else:
        if FOLD:
            return one, tl.load(norm_ptr).to(ACC)
        else:
            return one, one


@triton.jit
def option_terms(
    weighted,
    dot,
    weighted_dot,
    mass,
    weighted_mass,
    largest,
    total,
    class_weight,
    weight,
    num_classes,
    smoothing,
    z_loss,
    ACC: tl.constexpr,
):
    """(log-likelihood, objective, scale, spread, hit) of clones for a sample.

    The sums are over the classes of w l, q l, w q l, q and w q, l being a logit less the largest; of a class, l of the
    target stands for `dot` and `weighted_dot` and 1 for the masses, and `class_weight` is its own. The gradient to a
    logit is scale exp(l) - w spread - w q hit, or hit at the target.
    """
    e = tl.full([], smoothing, ACC)
    zl = tl.full([], z_loss, ACC)
    classes = tl.full([], 1.0, ACC) * num_classes
    log_sum = tl.log(total)
    likelihood = dot - mass * log_sum
    whole = (1.0 - e) * weighted_mass * class_weight + e
    none = whole == 0.0
    divisor = tl.where(none, 1.0, whole)
    own = (1.0 - e) * class_weight * (weighted_dot - weighted_mass * log_sum)
    mean = tl.where(none, 0.0, (own + e * (weighted / classes - log_sum)) / divisor)
    lse = largest + log_sum
    objective = mean - zl * lse * lse
    share = tl.where(none, 0.0, weight)
    scale = (share + 2.0 * zl * weight * lse) / total
    spread = share * e / (classes * divisor)
    # share (1 - e) w / T in other words: of one class alone nothing is left, to the bit.
    rest = share - classes * spread
    hit = tl.where(
        weighted_mass == 0.0, 0.0, rest / tl.where(weighted_mass == 0.0, 1.0, weighted_mass)
    )
    return likelihood, objective, scale, spread, hit
