"""Kernels of the mixture where all clones' logits of a sample fit one program: one read, one write (small N C).

A program has the tile [N, C] of one sample in registers: softmax, likelihoods, responsibilities and the gradient at the
logits, alone (G, for the clones) and weighted by the responsibility (r G, for the features).
"""

import torch
import triton
import triton.language as tl

from ..launch import launch, round_to, widen
from . import problem
from .gemm import finite, input_gradient, safe_matmul, settle
from .options import cap, cap_derivative, load_weight, option_terms


@triton.jit
def load_tile(z_ptr, bias_ptr, num_clones, num_classes, softcap, HAS_BIAS, CAPPED, N_P, C_P, ACC):
    """Finite logits of a sample, [N_P, C_P]; which clones had only such; offsets and mask of the tile."""
    n = tl.arange(0, N_P)
    c = tl.arange(0, C_P)
    mask = (n < num_clones)[:, None] & (c < num_classes)[None, :]
    offs = n[:, None] * num_classes + c[None, :]
    z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(ACC)
    if HAS_BIAS:
        z += widen(tl.load(bias_ptr + offs, mask=mask, other=0.0), ACC)
    finite = tl.abs(z) < float("inf")
    alive = tl.min(finite.to(tl.int32), 1)
    z = tl.where(alive[:, None] != 0, z, 0.0)
    if CAPPED:
        z = cap(z, softcap, ACC)
    return z, alive, offs, mask


@triton.jit
def share_of(joint, log_prob):
    """A clone's share in the probability of a class, of logarithm `log_prob`: at most 1, however large the numbers are
    whose rounding may say otherwise."""
    return tl.exp(tl.minimum(joint - log_prob, 0.0))


@triton.jit(do_not_specialize=["first_sample", "num_samples", "ignore_index"])
def mixture_tile_kernel(
    z_ptr,
    bias_ptr,
    log_posterior_ptr,
    target_ptr,
    norm_ptr,
    g_ptr,
    rg_ptr,
    nll_ptr,
    score_ptr,
    mix_ptr,
    dead_ptr,
    first_sample,
    num_samples,
    num_clones,
    num_classes,
    ignore_index,
    inv_sigma2: tl.float64,
    log_normaliser: tl.float64,
    row_weight_ptr,
    class_weight_ptr,
    soft_ptr,
    smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    GAUSSIAN: tl.constexpr,
    OPTIONS: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    SOFT: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_G: tl.constexpr,
    NEED_RG: tl.constexpr,
    FOLD: tl.constexpr,
    N_P: tl.constexpr,
    C_P: tl.constexpr,
):
    """One sample of a chunk that begins at `first_sample`; z, g and rg hold the chunk, all else the batch."""
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    infinity = float("inf")
    local = tl.program_id(0).to(tl.int64)
    sample = first_sample + local
    # 64-bit offsets once a program, 32-bit ones within the tile.
    z_ptr += local * num_clones * num_classes
    g_ptr += local * num_clones * num_classes
    rg_ptr += local * num_clones * num_classes
    n = tl.arange(0, N_P)
    c = tl.arange(0, C_P)
    z, alive, offs, mask = load_tile(
        z_ptr, bias_ptr, num_clones, num_classes, softcap, HAS_BIAS, CAPPED, N_P, C_P, ACC
    )
    if OPTIONS:
        loss_weight, weight = load_weight(
            row_weight_ptr, norm_ptr, sample, ACC, FOLD, HAS_ROW_WEIGHT
        )
    all_finite = tl.min(tl.where(n < num_clones, alive, 1), 0)
    if GAUSSIAN:
        counted = sample < num_samples
        target = tl.load(target_ptr + sample * num_classes + c, mask=c < num_classes, other=0.0)
        error = tl.where(mask, z - widen(target, ACC)[None, :], 0.0)
        squared = tl.sum(error * error, 1)
        alive = tl.where(squared < infinity, alive, 0)
        inverse = tl.full([], inv_sigma2, ACC)
        logp = -0.5 * squared * inverse - tl.full([], log_normaliser, ACC)
        g = error * inverse
    else:
        target = tl.load(target_ptr + sample)
        counted = target != ignore_index
        z = tl.where(mask, z, -infinity)
        largest = tl.max(z, 1)
        largest = tl.where(n < num_clones, largest, 0.0)
        e = tl.exp(z - largest[:, None])
        total = tl.sum(e, 1)
        # A target that is no class is impossible for every clone: the loss shows it.
        possible_target = (target >= 0) & (target < num_classes)
        target = tl.where(possible_target, target, -1).to(tl.int32)
        hit = c[None, :] == target
        at_target = tl.sum(tl.where(mask & hit, z, 0.0), 1)
        alive = tl.where(target >= 0, alive, 0)
        best = tl.min(tl.where(z == largest[:, None], c[None, :], C_P), 1)
        if OPTIONS:
            below = tl.where(mask, z - largest[:, None], 0.0)
            w = tl.full([C_P], 1.0, ACC)
            class_weight = tl.full([], 1.0, ACC)
            if HAS_CLASS_WEIGHT:
                w = tl.load(class_weight_ptr + c, mask=c < num_classes, other=0.0)
            weighted = tl.sum(w[None, :] * below, 1)
            if SOFT:
                q = tl.load(soft_ptr + sample * num_classes + c, mask=c < num_classes, other=0.0)
                dot = tl.sum(q[None, :] * below, 1)
                weighted_dot = tl.sum((w * q)[None, :] * below, 1)
                q_mass = tl.sum(q, 0)
                weighted_mass = tl.sum(w * q, 0)
            else:
                dot = at_target - largest
                weighted_dot = dot
                q_mass = tl.full([], 1.0, ACC)
                weighted_mass = q_mass
                if HAS_CLASS_WEIGHT:
                    class_weight = tl.load(class_weight_ptr + tl.where(target >= 0, target, 0))
            likelihood, logp, scale, spread, own = option_terms(
                weighted,
                dot,
                weighted_dot,
                q_mass,
                weighted_mass,
                largest,
                total,
                class_weight,
                weight,
                num_classes,
                smoothing,
                z_loss,
                ACC,
            )
            alive = tl.where(tl.abs(likelihood) < infinity, alive, 0)
            g = e * scale[:, None] - w[None, :] * spread
            if SOFT:
                g -= (w * q)[None, :] * own
            else:
                g -= tl.where(hit, own, 0.0)
            if CAPPED:
                g *= cap_derivative(z, softcap, ACC)
        else:
            logp = at_target - largest - tl.log(total)
            likelihood = logp
            g = e / total[:, None] - tl.where(hit, 1.0, 0.0)
    alive = tl.where((tl.abs(logp) < infinity) & (n < num_clones), alive, 0)
    living = alive != 0
    if GAUSSIAN:
        score = tl.where(living, squared, infinity)
    else:
        score = tl.where(living & (best == target), 1.0, 0.0)

    a = tl.load(log_posterior_ptr + n, mask=n < num_clones, other=0.0).to(ACC)
    joint = tl.where(living, a + logp, -infinity)
    peak = tl.max(joint, 0)
    possible = peak > -infinity
    share = tl.exp(joint - tl.where(possible, peak, 0.0))
    mass = tl.sum(share, 0)
    mix = tl.where(possible, -peak - tl.log(mass), infinity)
    if GAUSSIAN:
        nll = tl.where(living, -logp, infinity)
    else:
        nll = tl.where(living, -likelihood, infinity)

    if OPTIONS:
        if HAS_ROW_WEIGHT:
            counted = counted & (loss_weight != 0.0)
            mix *= loss_weight
    tl.store(mix_ptr + sample, tl.where(counted, mix, 0.0))
    column = n.to(tl.int64) * num_samples + sample
    tl.store(nll_ptr + column, tl.where(counted, nll, 0.0), mask=n < num_clones)
    tl.store(score_ptr + column, tl.where(counted, score, 0.0), mask=n < num_clones)
    # Every program stores the same 1: no order matters.
    num_dying = tl.where(counted, num_clones, 0)
    tl.store(dead_ptr + n, tl.full([N_P], 1, tl.int32), mask=(n < num_dying) & (alive == 0))
    if all_finite == 0:
        tl.store(dead_ptr + num_clones, 1)

    norm = tl.full([], 1.0, ACC)
    if FOLD:
        norm = tl.load(norm_ptr)
    if OPTIONS:
        if GAUSSIAN:
            g *= weight
        g = tl.where(living[:, None] & counted, g, 0.0)
    else:
        norm = tl.where(counted, norm, 0.0)
        g = tl.where(living[:, None], g * norm, 0.0)
    if NEED_G:
        tl.store(g_ptr + offs, round_to(g, g_ptr.dtype.element_ty), mask=mask)
    if NEED_RG:
        r = share / tl.where(possible, mass, 1.0)
        tl.store(rg_ptr + offs, round_to(g * r[:, None], rg_ptr.dtype.element_ty), mask=mask)


def mixture_tile(loss: problem.Loss) -> None:
    inputs, need_dx, need_dw = loss.inputs, loss.need_dx, loss.need_dw
    x, matrix = inputs.x, inputs.matrix
    num_samples, num_features, num_clones, num_classes = inputs.sizes
    n, c, warps = problem.tile_of(num_clones, num_classes)
    rows = num_clones * num_classes
    norm = None if loss.folds else loss.norm
    held = rows * (inputs.dtype.itemsize + x.element_size() * (need_dx + need_dw))
    chunks = inputs.chunks(held, loss.memory_budget)
    direct = (
        len(chunks) == 1
        and num_samples * rows * num_features <= problem.DIRECT
        and inputs.dtype == torch.float32
    )
    samples = x if direct or not need_dw else finite(x)
    dweight = loss.dweight.view(-1, num_features)
    for part in chunks:
        z, *others = inputs.logits(part)
        g = torch.empty_like(z, dtype=x.dtype) if need_dw else z
        rg = torch.empty_like(z, dtype=x.dtype) if need_dx else z
        launch(
            mixture_tile_kernel,
            (z.size(0),),
            z,
            *others,
            loss.target,
            loss.norm,
            g,
            rg,
            *loss.statistics,
            part.start,
            num_samples,
            num_clones,
            num_classes,
            num_warps=warps,
            HAS_BIAS=inputs.bias is not None,
            NEED_G=need_dw,
            NEED_RG=need_dx,
            FOLD=loss.folds,
            N_P=n,
            C_P=c,
            **loss.likelihood,
            **loss.options,
        )
        if direct:
            if need_dx:
                safe_matmul(rg, matrix, loss.dx, norm=norm)
            if need_dw:
                safe_matmul(
                    g.t(),
                    x,
                    dweight,
                    norm=norm,
                    dead=loss.dead,
                    rows_per_clone=num_classes,
                    row_sum=loss.dbias if loss.dbias.numel() else None,
                )
            continue
        if need_dx:
            input_gradient(rg, matrix, loss.dead[num_clones:], loss.dx[part])
        if need_dw:
            loss.add_weight_gradient(g, samples[part], part)
    if not direct:
        if norm is not None:
            loss.dx.mul_(norm)
        settle(loss.dweight, loss.dbias, loss.dead, norm)


@triton.jit
def log_prob_tile_kernel(
    z_ptr,
    bias_ptr,
    log_posterior_ptr,
    out_ptr,
    mass_ptr,
    grad_ptr,
    flag_ptr,
    num_clones,
    num_classes,
    softcap: tl.float64,
    BACKWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    N_P: tl.constexpr,
    C_P: tl.constexpr,
):
    """Mixture log-probabilities of one sample, and the log of the posterior mass of the clones that are alive for it,
    by which they are normalised; z, out, mass and grad hold the chunk.

    BACKWARD overwrites the logits by the gradient to them.
    """
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    infinity = float("inf")
    sample = tl.program_id(0).to(tl.int64)
    z_ptr += sample * num_clones * num_classes
    n = tl.arange(0, N_P)
    c = tl.arange(0, C_P)
    z, alive, offs, mask = load_tile(
        z_ptr, bias_ptr, num_clones, num_classes, softcap, HAS_BIAS, CAPPED, N_P, C_P, ACC
    )
    if CAPPED:
        derivative = cap_derivative(z, softcap, ACC)
    if BACKWARD:
        if tl.min(tl.where(n < num_clones, alive, 1), 0) == 0:
            tl.store(flag_ptr, 1)
    z = tl.where(mask, z, -infinity)
    largest = tl.where(n < num_clones, tl.max(z, 1), 0.0)
    # The largest is taken off before anything small is added: logits may be huge.
    z -= largest[:, None]
    a = tl.load(log_posterior_ptr + n, mask=n < num_clones, other=-infinity).to(ACC)
    if BACKWARD:
        e = tl.exp(z)
        total = tl.where(n < num_clones, tl.sum(e, 1), 1.0)
        a -= tl.load(mass_ptr + sample) + tl.log(total)
        out = tl.load(out_ptr + sample * num_classes + c, mask=c < num_classes, other=-infinity)
        grad = tl.load(grad_ptr + sample * num_classes + c, mask=c < num_classes, other=0.0)
        possible = out > -infinity
        share = share_of(a[:, None] + z, tl.where(possible, out, 0.0)[None, :])
        # Where a class has no probability the gradient is cut, as is the way to a dead clone.
        flows = mask & possible[None, :] & (alive != 0)[:, None]
        weighted = tl.where(flows, share * grad[None, :], 0.0)
        dz = weighted - e / total[:, None] * tl.sum(weighted, 1)[:, None]
        if CAPPED:
            dz *= derivative
        tl.store(z_ptr + offs, dz, mask=mask)
    else:
        a = tl.where(alive != 0, a, -infinity)
        most = tl.max(a, 0)
        mass = tl.sum(tl.exp(a - tl.where(most > -infinity, most, 0.0)), 0)
        log_mass = most + tl.log(tl.where(most > -infinity, mass, 1.0))
        tl.store(mass_ptr + sample, log_mass)
        a -= tl.log(tl.where(n < num_clones, tl.sum(tl.exp(z), 1), 1.0))
        joint = a[:, None] + z
        peak = tl.max(joint, 0)
        possible = peak > -infinity
        shift = tl.where(possible, peak, 0.0)
        out = shift + tl.log(tl.sum(tl.exp(joint - shift[None, :]), 0)) - log_mass
        out = tl.where(possible, out, -infinity)
        tl.store(out_ptr + sample * num_classes + c, out, mask=c < num_classes)
