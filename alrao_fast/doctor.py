"""What runs on this machine: versions, how the kernels were built, and a self-test of every op on every backend.

A self-test runs the op through its public function in float32 and holds every output against the float64 reference,
within the error budget that the tests use too.
"""

import json
import platform
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import __version__, _extension, backends, functional, testing
from alrao_fast.ops.feature import FEATURE_OPS, FeatureOp, Lists, Scalars
from alrao_fast.reference import switch_update as switch

Outputs = dict[str, Tensor]


class Row(NamedTuple):
    """One op on one backend. `state` is "passed", "failed" or "unavailable"; `error` the largest relative error."""

    op: str
    backend: str
    state: str
    error: float | None
    detail: str


def report() -> dict[str, Any]:
    """Everything that `main` prints, as JSON has it."""
    rows = [_check(op, backend) for op in sorted(backends.OPS) for backend in backends.BACKENDS]
    return {
        "alrao_fast": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "extension_error": _extension.ERROR,
        "cpu_isa": _cpu_isa(),
        "build": _extension.build_info(),
        "ops": [row._asdict() for row in rows],
        "healthy": all(row.state != "failed" for row in rows) and not _extension_is_broken(),
    }


def main(*, as_json: bool = False) -> int:
    """Print the report; return 0 if all that is available works, else 1."""
    found = report()
    print(json.dumps(found, indent=1) if as_json else _as_text(found))
    return 0 if found["healthy"] else 1


def _as_text(found: dict[str, Any]) -> str:
    build = found["build"]
    lines = [
        f"alrao_fast {found['alrao_fast']}, Python {found['python']}, {found['platform']}",
        f"torch      {found['torch']}, CUDA {found['torch_cuda'] or 'none'}, "
        f"Triton {found['triton'] or 'none'}",
        f"devices    {', '.join(found['devices']) or 'CPU only'}",
    ]
    if found["extension_error"]:
        lines.append(f"extension  {found['extension_error']}")
    else:
        lines.append(
            f"extension  built with torch {build.get('torch')} and {build.get('compiler')}, "
            f"for {', '.join(build.get('isas', []))}; this machine runs {found['cpu_isa']}"
        )
        toolkit = f"toolkit {build.get('cuda_toolkit')}, {', '.join(build.get('cuda_archs', []))}"
        skipped = build.get("cuda_skipped")
        lines.append(f"CUDA       {f'left out: {skipped}' if skipped else toolkit}")
    lines.append("")
    for row in found["ops"]:
        error = "" if row["error"] is None else f"error {row['error']:.0e}"
        rest = " ".join(part for part in (error, row["detail"]) if part)
        lines.append(f"{row['op']:<15} {row['backend']:<10} {row['state']:<12} {rest}".rstrip())
    lines += ["", "All that is available works." if found["healthy"] else "SOMETHING IS BROKEN."]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_isa() -> str | None:
    if _extension.ERROR is not None:
        return None
    try:
        return str(import_module("alrao_fast._C").cpu_isa())
    except RuntimeError as error:
        return str(error)


def _extension_is_broken() -> bool:
    """Built, and yet it does not load: unlike one that was left out, a fault."""
    built = bool(_extension.build_info()) and not _extension.build_info().get("extension_skipped")
    return built and _extension.ERROR is not None


def _check(op: str, backend: str) -> Row:
    status = backends.status(op, backend)
    if not status.available:
        return Row(op, backend, "unavailable", None, status.reason)
    device = backends.device_of(backend)
    run = partial(_feature, FEATURE_OPS[op]) if op in FEATURE_OPS else _SELF_TESTS[op]
    try:
        truth = run("reference", torch.float64, torch.device("cpu"))
        reference = run("reference", torch.float32, torch.device("cpu"))
        actual = run(backend, torch.float32, device)
        for name, value in actual.items():
            testing.assert_within_budget(value, reference[name], truth[name], name)
    except Exception as error:  # whatever goes wrong is what the row reports
        return Row(op, backend, "failed", None, f"{type(error).__name__}: {error}")
    worst = max(testing.relative_error(value, truth[name]) for name, value in actual.items())
    return Row(op, backend, "passed", worst, "")


# The sizes leave a tail behind every vector width.
_SHAPES = ((19, 7), (19,), (5, 3, 3))


def _feature(op: FeatureOp, impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    generator = torch.Generator().manual_seed(0)

    def one(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    params, grads = ([one(*shape) for shape in _SHAPES] for _ in range(2))
    rates = [one(shape[0]).exp().float() for shape in _SHAPES]
    options = {name: 0.5 if kind.schema == "float" else False for name, kind in op.options.items()}
    states = [[torch.zeros_like(p) for p in params] for _ in range(op.num_states(options))]
    steps = torch.zeros(len(params), dtype=torch.int64, device=device)
    inners = [param.stride(0) for param in params]
    for _ in range(2):
        lists = Lists(params, states, [], rates, inners, [], steps)
        op(lists, grads, options, Scalars(lr=0.1), impl)
    named = {"params": params, **dict(zip(op.states, states))}
    return {f"{name}[{i}]": value for name, each in named.items() for i, value in enumerate(each)}


def _switch_mixture(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    inputs = testing.mixture_inputs(37, 19, 11, 3, dtype=dtype, device=device)
    x, weight, bias, log_posterior, target = inputs
    assert bias is not None
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    loss, clone_nll = functional.switch_mixture_nll(
        x, weight, bias, log_posterior, target, impl=impl
    )
    dx, dweight, dbias = torch.autograd.grad(loss, leaves)
    log_prob = functional.switch_mixture_log_prob(x, weight, bias, log_posterior, impl=impl)
    return {
        "loss": loss,
        "clone_nll": clone_nll,
        "dx": dx,
        "dweight": dweight,
        "dbias": dbias,
        "log_prob": log_prob,
    }


def _switch_update(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    logw, log_posterior, t = (state.to(device) for state in switch.initial_state(5, theta=0.999))
    generator = torch.Generator().manual_seed(0)
    for observation in torch.randn(4, 5, generator=generator).to(device, dtype):
        observation[1] = -torch.inf
        functional.switch_update_(logw, log_posterior, t, observation, impl=impl)
    return {"logw": logw, "log_posterior": log_posterior, "t": t.double()}


def _gradient_clip(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    names, grads, firsts, counts, segments = testing.clip_problem(dtype, device)
    norms = functional.gradient_clip_(grads, firsts, counts, segments, max_norm=1.0, impl=impl)
    there = {name: grad for name, grad in zip(names, grads) if grad.numel()}
    return {"norms": norms.to(dtype), **there}


_SELF_TESTS: dict[str, Callable[[str, torch.dtype, torch.device], Outputs]] = {
    "gradient_clip": _gradient_clip,
    "switch_mixture": _switch_mixture,
    "switch_update": _switch_update,
}
