"""One softmax of every clone of an adaptive softmax, the head or a tail, with its gradients in the same pass.

The clones go through it in blocks of logits: a product of matrices, the exponentials in its place, and of these the
gradients. No logits are kept. Mathematics: reference/adaptive_mixture.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from alrao_fast.ops.mixture import checks

# Bytes of logits on a CPU: of a block, for products of matrices; and of some of its rows, which stay in the cache.
# Elsewhere both are as large as the memory budget allows.
_CPU_BLOCK = 8 << 20
_CPU_PART = 1 << 20


class Gradients(NamedTuple):
    """What a softmax adds to the gradients: to weight and bias the sums over samples, with their factors; to the inputs
    `[N, B, H]` the gradient of -logp, 0 where the clone is dead. What is not needed is None."""

    weight: Tensor | None
    bias: Tensor | None
    inputs: Tensor | None


class Softmax:
    """A softmax of every clone, for B samples: the head, or a tail after its projection.

    inputs `[B, H]`, or `[N, B, H]` where each clone has its own; weight `[N, C, H]`; place `[B]` of the targets.
    """

    def __init__(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor, memory: int
    ) -> None:
        self.clones, self.classes, self.rows = weight.size(0), weight.size(1), place.size(0)
        self.inputs, self.weight, self.bias, self.place = inputs, weight, bias, place
        self.wide = checks.accumulator(inputs.dtype)
        cpu = inputs.device.type == "cpu"
        self.block = min(memory, _CPU_BLOCK) if cpu else memory
        self.part = _CPU_PART if cpu else memory
        like, shape = inputs, (self.clones, self.rows)
        # Of each clone and sample: the target's logp, whether the clone is alive, whether the target is likelier than
        # every other class, the sum of the exponentials.
        self.logp, self.total = (like.new_empty(shape, dtype=self.wide) for _ in range(2))
        self.alive, self.first = (like.new_empty(shape, dtype=torch.bool) for _ in range(2))

    def run(self, factors: Tensor | None, need_own: bool, need_inputs: bool) -> Gradients:
        """One pass over the logits; `factors [N, B]` of the samples' losses for the clones' own gradients."""
        shape = self.clones, self.rows, self.weight.size(2)
        dweight = dbias = dinputs = None
        if need_own:
            new = self.weight.new_empty if self.rows else self.weight.new_zeros
            dweight = new(self.weight.shape, dtype=self.wide)
            if self.bias is not None:
                dbias = self.bias.new_zeros(self.bias.shape, dtype=self.wide)
        if need_inputs:
            dinputs = self.weight.new_empty(shape, dtype=self.wide)
        safe = finite(self.inputs) if need_own else self.inputs
        buffer = None
        for where in self._blocks():
            clones, rows = where
            weight = self.weight[clones].to(self.wide)
            size = len(weight) * (rows.stop - rows.start) * self.classes
            if buffer is None:
                buffer = weight.new_empty(size)
            z = buffer[:size].view(len(weight), -1, self.classes)
            torch.bmm(self._of(self.inputs, where).to(self.wide), weight.mT, out=z)
            if self.bias is not None:
                z += self.bias[clones].to(self.wide).unsqueeze(1)
            self._reduce(z, where, need_own or need_inputs)
            if dweight is not None:
                assert factors is not None
                own = (factors[where] / self.total[where]).unsqueeze(2)
                scaled = self._of(safe, where).to(self.wide) * own
                if rows.start == 0:
                    torch.bmm(z.mT, scaled, out=dweight[clones])
                else:
                    dweight[clones].baddbmm_(z.mT, scaled)
                if dbias is not None:
                    dbias[clones] += torch.bmm(z.mT, own).squeeze(2)
            if dinputs is not None:
                torch.bmm(z, weight, out=dinputs[where])
        if dinputs is not None:
            dinputs /= self.total.unsqueeze(2)
            clear_(dinputs, self.alive.unsqueeze(2))
        return Gradients(dweight, dbias, dinputs)

    def _reduce(self, z: Tensor, where: tuple[slice, slice], need: bool) -> None:
        """Of a block's logits, some rows at a time; they become `total` times the gradient of -logp by them."""
        places = self.place[where[1]].repeat(len(z)).unsqueeze(1)
        size = max(self.part // (self.classes * self.wide.itemsize), 1)
        found = []
        for logits, place in zip(z.flatten(0, 1).split(size), places.split(size), strict=True):
            own = logits.gather(1, place)
            peak, first = _largest(logits, own, place)
            least = logits.amin(1, keepdim=True)
            total = logits.sub_(peak).exp_().sum(1, keepdim=True)
            # NaN if a logit is NaN or inf, -inf if one is -inf or too far below the largest.
            alive = (least - peak).isfinite()
            found.append((own - peak - total.log(), total, alive, first))
            if need:
                logits.scatter_add_(1, place, -total)
                clear_(logits, alive)
        shape = z.shape[:2]
        logp, total, alive, first = (torch.cat(parts).view(shape) for parts in zip(*found))
        self.logp[where], self.alive[where], self.first[where] = logp, alive, first
        self.total[where] = torch.where(alive, total, 1)

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Clones and samples whose logits have the size of a block; of several clones all samples."""
        rows = max(self.block // (self.classes * self.wide.itemsize), 1)
        clones = max(rows // max(self.rows, 1), 1)
        for n in range(0, self.clones, clones):
            for b in range(0, self.rows, rows):
                yield slice(n, min(n + clones, self.clones)), slice(b, min(b + rows, self.rows))

    @staticmethod
    def _of(inputs: Tensor, where: tuple[slice, slice]) -> Tensor:
        """The inputs `[n, b, H]` of a block."""
        clones, rows = where
        if inputs.dim() == 3:
            return inputs[where]
        return inputs[rows].expand(clones.stop - clones.start, -1, -1)


def _largest(logits: Tensor, own: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the logits `[R, C]`, and whether it is that of the target, `own` at `place`; all `[R, 1]`.

    Of equal ones the first is meant, as in a prediction.
    """
    if logits.device.type != "cpu":
        peak, guess = logits.max(1, keepdim=True)
        return peak, guess == place
    # Without places it is several times as fast on a CPU.
    others = logits.scatter_(1, place, -math.inf).amax(1, keepdim=True)
    logits.scatter_(1, place, own)
    first = own > others
    tied = own == others
    if tied.any():
        rows = tied.nonzero()[:, 0]
        first[rows] = logits[rows].argmax(1, keepdim=True) == place[rows]
    return torch.maximum(own, others), first


def holds(mask: Tensor) -> bool:
    """Whether all are true, as far as that is known without a wait for a device."""
    return mask.device.type == "cpu" and bool(mask.all())


def clear_(values: Tensor, mask: Tensor) -> None:
    """Zeros where the mask is false."""
    if not holds(mask):
        values.masked_fill_(~mask, 0)


def finite(x: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    """x with zeros in place of every slice along `dims` that is not finite."""
    finite = x.isfinite().all(dims, keepdim=True)
    return x if holds(finite) else torch.where(finite, x, 0)
