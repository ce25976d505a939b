"""Cases of the op gradient_clip: the gradients of a network clipped, the backbone and each clone by its own norm."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as torch_clip

import alrao_fast as alrao
from alrao_fast import backends
from alrao_fast.nn.clones import LinearClones
from benchmarks.speed import case as cases
from benchmarks.speed.case import DTYPES, Call, Candidate, Case
from benchmarks.speed.optimizers import NETWORKS, POSITIONS
from benchmarks.speed.optimizers import inputs as update_inputs

# Bounds below and above the norms of these gradients.
BOUND, NO_BOUND = 0.25, 1e9
EPS = 1e-6


class Gradients(NamedTuple):
    """A network whose parameters have gradients, and the values that they are given anew before they are clipped."""

    model: nn.Module
    fresh: list[Tensor]
    max_norm: float

    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params() if p.grad is not None]

    def heads(self) -> list[list[nn.Parameter]]:
        """The parameters `[N, ...]` of each head."""
        return [list(m.parameters()) for m in self.model.modules() if isinstance(m, LinearClones)]

    def backbone(self) -> list[nn.Parameter]:
        clones = {id(p) for own in self.heads() for p in own}
        return [p for p in self.params() if id(p) not in clones]

    def device(self) -> torch.device:
        return self.params()[0].device


def inputs(
    make_network: Callable[[], nn.Module], clipped: bool, device: torch.device, seed: int
) -> Gradients:
    """Small normal gradients, drawn on the device."""
    model = update_inputs(make_network, 0.0, device, seed).model
    fresh = [p.grad.clone() for p in model.parameters() if p.grad is not None] if clipped else []
    return Gradients(model, fresh, BOUND if clipped else NO_BOUND)


def _sampled(tensors: list[Tensor]) -> Tensor:
    return torch.cat([cases.sampled(tensor, POSITIONS).double() for tensor in tensors])


def truth(given: Gradients) -> Mapping[str, Tensor]:
    """The formula in float64 on the compared entries: by parts, and in one norm over all ("plain")."""

    def squares(param: nn.Parameter, dims: int) -> Tensor:
        """Sums over all but the first `dims` dimensions."""
        assert param.grad is not None
        flat = param.grad.flatten(dims)
        return torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64).square()

    def factor(square: Tensor) -> Tensor:
        return (given.max_norm / (square.sqrt() + EPS)).clamp(max=1)

    square = torch.stack([squares(p, 0) for p in given.backbone()]).sum()
    total = torch.stack([squares(p, 0) for p in given.params()]).sum()
    factors = {p: factor(square) for p in given.backbone()}
    for own in given.heads():
        of_clones = factor(torch.stack([squares(p, 1) for p in own]).sum(0))
        factors |= {p: of_clones.view(-1, *[1] * (p.dim() - 1)) for p in own}
    parts = [p.grad.double() * factors[p] for p in given.params() if p.grad is not None]
    return {
        "grads": _sampled(parts),
        "norm": square.sqrt(),
        "plain grads": _sampled([grad.double() * factor(total) for grad in given.grads()]),
        "plain norm": total.sqrt(),
    }


def _call(clip: Callable[[], Tensor], given: Gradients, prefix: str = "") -> Call:
    grads, fresh = given.grads(), given.fresh
    norms: list[Tensor] = []

    def run() -> None:
        norms.clear()
        if fresh:
            # What is clipped once is short enough ever after.
            torch._foreach_copy_(grads, fresh)
        norms.append(clip())

    return Call(
        run,
        lambda: {f"{prefix}grads": _sampled(grads), f"{prefix}norm": norms[0].double()},
        norms.clear,
    )


def _ours(backend: str, given: Gradients) -> Call:
    clip = partial(alrao.clip_grad_norm_, given.model, given.max_norm)

    def on() -> Tensor:
        with backends.use_backend(backend):
            return clip()

    return _call(clip if backend == "auto" else on, given)


def _torch(foreach: bool, given: Gradients) -> Call:
    # As one writes it: ours looks through the network, too.
    def clip() -> Tensor:
        return torch_clip(given.model.parameters(), given.max_norm, foreach=foreach)

    return _call(clip, given, "plain ")


def _by_parts(given: Gradients) -> Call:
    """torch's function for the backbone, and its formula for the clones of each head; all found beforehand."""
    backbone = given.backbone()
    clones = [[p.grad for p in own if p.grad is not None] for own in given.heads()]

    @torch.no_grad()
    def clip() -> Tensor:
        norm = torch_clip(backbone, given.max_norm, foreach=True)
        for grads in clones:
            norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads]
            own = torch.linalg.vector_norm(torch.stack(norms), dim=0)
            factor = (given.max_norm / (own + EPS)).clamp(max=1)
            for grad in grads:
                grad.mul_(factor.view(-1, *[1] * (grad.dim() - 1)))
        return norm

    return _call(clip, given)


def clipping_case(
    network: str,
    dtype: str = "float32",
    *,
    clipped: bool = True,
    tiny: bool = False,
) -> Case:
    """Clip all gradients of `network`; with nothing to clip where not `clipped`.

    A call clips what was clipped before, so each takes a copy first, which is in everybody's time.
    """

    def make() -> nn.Module:
        return NETWORKS[network](tiny).to(DTYPES[dtype])

    with torch.device("meta"):
        numels = [param.numel() for param in make().parameters()]
    entries, width = sum(numels), DTYPES[dtype].itemsize
    names = ("grads", "norm")
    return Case(
        name=f"gradient_clip {network}{', with a copy before' if clipped else ', nothing to clip'}",
        op="gradient_clip",
        sizes={"entries": entries, "tensors": len(numels)},
        dtype=dtype,
        inputs=partial(inputs, make, clipped),
        truth=truth,
        candidates=(
            *cases.ours(
                "gradient_clip", _ours, names, slow=("reference",), device_of=Gradients.device
            ),
            Candidate("torch foreach", partial(_torch, True), ("plain grads", "plain norm")),
            Candidate("torch single", partial(_torch, False), ("plain grads", "plain norm")),
            Candidate("torch foreach, by parts", _by_parts, names),
        ),
        # Copied, read for the norm, read and written; or read for the norm alone.
        bytes=entries * width * (5 if clipped else 1),
        flops=entries * (3 if clipped else 2),
        set_bytes=entries * width * (3 if clipped else 2),
        check_runs=2,
    )
