"""Which cases a run measures: quick, cpu and full for a CPU, gpu with the figures to reach on an H100 or H200."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from speed.case import Case, Target
from speed.evaluation import evaluation_case
from speed.head_steps import head_case
from speed.heads import mixture_case
from speed.optimizers import optimizer_case
from speed.steps import step_case
from speed.switch import switch_case

FUSED = "torch fused"
LIBRARY = "linear_cross_entropy"
# Of N heads one by one nobody has the memory at these sizes.
LARGE = (
    "alrao",
    "alrao cuda",
    "alrao triton",
    *(f"{name} {way}" for name in (LIBRARY, "liger", "cce") for way in ("x N", "two passes")),
    *(f"{name} by rows" for name in (LIBRARY, "cce")),
    "quack x N",
)


def quick() -> Iterator[Case]:
    """A minute and a half on two cores."""
    for network in ("LSTM", "256 vectors of 64"):
        yield optimizer_case(network, momentum=0.9)
    yield optimizer_case("LSTM", op="feature_adam")
    yield mixture_case("10 classes", 32, 1024, 10, 10)
    yield mixture_case("10,000 words", 140, 100, 10_000, 6)
    yield evaluation_case("10,000 words", 140, 100, 10_000, 6)
    yield switch_case()
    yield step_case("MLP")
    yield step_case("LSTM, 50 characters")


def cpu() -> Iterator[Case]:
    """What the README's figures are taken from."""
    second = (Target("C2", "wall", "alrao", FUSED, 1.05),)
    small = (Target("C2", "wall", "alrao", FUSED, 0.25),)
    for momentum in (0.0, 0.9):
        yield optimizer_case("VGG19", momentum=momentum, targets=second)
        yield optimizer_case("GoogLeNet", momentum=momentum, targets=second)
        yield optimizer_case("LSTM", momentum=momentum)
        yield optimizer_case("256 vectors of 64", momentum=momentum, targets=small)
    yield optimizer_case("VGG19", op="feature_adam")
    yield optimizer_case("VGG19", "bfloat16", momentum=0.9)
    first = (
        Target("C1", "wall", "alrao", "authors", 0.20),
        Target("C1", "wall", "alrao", f"{LIBRARY} x N", 1.05),
        Target("C1", "memory", "alrao", "authors", 0.05),
    )
    yield mixture_case("10 classes", 32, 1024, 10, 10)
    yield mixture_case("50 characters", 1400, 100, 50, 6, targets=first[:2])
    yield mixture_case("10,000 words", 700, 100, 10_000, 6, memory=True, targets=first)
    yield head_case("10 classes", 32, 1024, 10, 10)
    yield evaluation_case("10,000 words", 700, 100, 10_000, 6)
    yield switch_case()
    for batch in (32, 128):
        yield step_case("MLP", batch)
    yield step_case("LSTM, 50 characters")
    yield step_case("LSTM, 10,000 words")
    yield step_case("transformer, 50,000 tokens", 4)
    for network in ("MobileNetV2", "GoogLeNet", "VGG19", "SENet18"):
        yield step_case(network, 32)


def full() -> Iterator[Case]:
    """The cpu preset, and the convolutional networks at a batch of 128."""
    yield from cpu()
    for network in ("MobileNetV2", "GoogLeNet", "VGG19", "SENet18"):
        yield step_case(network, 128)


def _ratio(row: str, metric: str, peer: str | None, limit: float) -> Target:
    return Target(row, metric, "alrao", peer, limit)


def _gpu_optimizers(tiny: bool) -> Iterator[Case]:
    for momentum in (0.0, 0.9):
        yield optimizer_case(
            "GoogLeNet",
            momentum=momentum,
            tiny=tiny,
            targets=(
                _ratio("A1", "gpu", FUSED, 1.02),
                _ratio("A1", "gpu", None, 1.35),
                _ratio("A2", "wall", FUSED, 0.35),
            ),
        )
    third = (_ratio("A3", "gpu", FUSED, 1.02), _ratio("A3", "gpu", None, 1.12))
    seventh = (
        _ratio("A7", "gpu", "torch.compile", 1.00),
        _ratio("A7", "gpu", "foreach, rates per weight", 0.55),
        _ratio("A7", "gpu", "authors", 0.30),
        # Theirs has the rates and as large a buffer: a thousandth of the rates is half a thousandth of both.
        _ratio("A7", "memory", "foreach, rates per weight", 0.0005),
    )
    yield optimizer_case("VGG19", momentum=0.0, tiny=tiny, targets=third + seventh)
    yield optimizer_case("VGG19", momentum=0.9, tiny=tiny, targets=third)
    few = ("alrao", "alrao cuda", "alrao triton", FUSED, "torch foreach", "apex FusedSGD")
    for momentum in (0.0, 0.9):
        yield optimizer_case("GPT 124M", momentum=momentum, tiny=tiny, keep=few, targets=third)
    for network in ("GPT 124M", "GPT 1.3B"):
        yield optimizer_case(
            network,
            "bfloat16",
            momentum=0.9,
            tiny=tiny,
            keep=few,
            targets=(_ratio("A4", "gpu", FUSED, 0.97), _ratio("A4", "gpu", None, 1.12)),
        )
    for momentum, limit in ((0.0, 0.80), (0.9, 0.86)):
        yield optimizer_case(
            "GPT 124M",
            momentum=momentum,
            scaler=True,
            tiny=tiny,
            targets=(_ratio("A5", "gpu", FUSED, limit),),
        )
    for momentum, limit in ((0.0, 0.80), (0.9, 0.95)):
        yield optimizer_case(
            "GPT 1.3B",
            momentum=momentum,
            tiny=tiny,
            keep=("alrao", FUSED, "apex FusedSGD"),
            targets=(_ratio("A6", "gpu", "apex FusedSGD", limit),),
        )
    yield optimizer_case(
        "GPT 124M",
        op="feature_adam",
        tiny=tiny,
        keep=("alrao", "alrao cuda", "alrao triton", FUSED),
        targets=(_ratio("A8", "gpu", FUSED, 1.02),),
    )


def _gpu_heads(tiny: bool) -> Iterator[Case]:
    for samples in (32, 128, 512):
        yield head_case(
            "10 classes",
            samples,
            1024,
            10,
            10,
            tiny=tiny,
            targets=(_ratio("B1", "wall", "authors", 0.05),),
        )
        yield mixture_case(
            "10 classes",
            samples,
            1024,
            10,
            10,
            tiny=tiny,
            targets=(
                _ratio("B2", "gpu", "torch.compile", 0.6),
                _ratio("B2", "gpu", "torch.func.vmap", 0.6),
                _ratio("B3", "gpu", "plain head", 1.5),
                _ratio("B3", "wall", "plain head", 1.0),
            ),
        )
    yield mixture_case(
        "1,000 classes",
        4096,
        2048,
        1000,
        10,
        "bfloat16",
        tiny=tiny,
        targets=(
            _ratio("B4", "gpu", "torch.compile", 0.55),
            _ratio("B4", "gpu", "authors", 0.30),
            _ratio("B4", "gpu", None, 1 / 0.80),
            _ratio("B9", "memory", "authors", 0.02),
            _ratio("B9", "memory", None, 1.0),
        ),
    )
    for dtype, limit in (("float32", 0.25), ("tf32", 0.25), ("bfloat16", 0.06)):
        yield mixture_case(
            "10,000 words",
            1400,
            100,
            10_000,
            6,
            dtype,
            tiny=tiny,
            targets=(
                _ratio("B5", "gpu", "authors", limit),
                _ratio("B5", "gpu", f"{LIBRARY} two passes", 0.6),
                _ratio("B9", "memory", "authors", 0.02),
                _ratio("B9", "memory", None, 1.0),
            ),
        )
    yield mixture_case(
        "10,000 words, no bias",
        1400,
        100,
        10_000,
        6,
        "bfloat16",
        bias=False,
        tiny=tiny,
        keep=LARGE,
        targets=(_ratio("B5", "gpu", "cce x N", 0.6),),
    )
    for label, samples, features, classes, share in (
        ("50,304 tokens", 8192, 768, 50_304, 0.78),
        ("32,000 tokens", 16_384, 2048, 32_000, 0.83),
    ):
        yield mixture_case(
            label,
            samples,
            features,
            classes,
            6,
            "bfloat16",
            bias=False,
            tiny=tiny,
            keep=LARGE,
            targets=(
                _ratio("B6", "gpu", f"{LIBRARY} two passes", 0.62),
                _ratio("B6", "gpu", "liger two passes", 0.25),
                _ratio("B6", "gpu", "cce two passes", 0.55),
                _ratio("B6", "gpu", None, 1 / share),
                _ratio("B9", "memory", None, 1.0),
            ),
        )
    yield mixture_case(
        "128,256 tokens",
        4096,
        4096,
        128_256,
        6,
        "bfloat16",
        bias=False,
        tiny=tiny,
        keep=("alrao", f"{LIBRARY} x N", "liger x N", "quack x N"),
        targets=(
            _ratio("B7", "gpu", "quack x N", 1.05),
            _ratio("B8", "gpu", "liger x N", 0.15),
            _ratio("B9", "memory", None, 1.0),
        ),
    )
    yield head_case(
        "50,304 tokens",
        8192,
        768,
        50_304,
        6,
        "bfloat16",
        bias=False,
        tiny=tiny,
        keep=tuple(name for name in LARGE if "alrao" not in name and "x N" not in name),
        targets=(_ratio("B10", "gpu", "best", 0.92),),
    )
    for label, samples, features, classes in (
        ("10,000 words", 1400, 100, 10_000),
        ("50,304 tokens", 8192, 768, 50_304),
    ):
        yield evaluation_case(
            label,
            samples,
            features,
            classes,
            6,
            "bfloat16",
            bias=False,
            tiny=tiny,
            targets=(
                _ratio("E1", "gpu", "one by one", 0.5),
                _ratio("E1", "memory", "one by one", 0.5),
            ),
        )
    yield switch_case()


def _gpu_steps(tiny: bool) -> Iterator[Case]:
    for network in ("GoogLeNet", "VGG19", "MobileNetV2"):
        yield step_case(
            network,
            32,
            tiny=tiny,
            targets=(_ratio("S1", "wall", "sgd", 1.02), _ratio("S1", "graph", "sgd", 1.02)),
        )
    for network in ("GoogLeNet", "VGG19", "MobileNetV2"):
        yield step_case(network, 128, tiny=tiny)
    for batch in (32, 128):
        yield step_case("SENet18", batch, tiny=tiny)
    for network in ("MLP", "LSTM, 50 characters", "LSTM, 10,000 words"):
        yield step_case(network, tiny=tiny)
    yield step_case("transformer, 50,000 tokens", 16, tiny=tiny)
    for network in ("GPT 124M", "GPT 1.3B"):
        libraries = ("quack", LIBRARY)
        yield step_case(
            network,
            8,
            "bfloat16",
            tiny=tiny,
            fused_heads=libraries,
            floor_targets=tuple(_ratio("S2", "wall", f"sgd, {name}", 1.05) for name in libraries),
        )


def gpu(tiny: bool = False) -> Iterator[Case]:
    """Every figure to reach on a GPU; `tiny` at sizes at which the same code runs in a moment on a CPU."""
    yield from _gpu_optimizers(tiny)
    yield from _gpu_heads(tiny)
    yield from _gpu_steps(tiny)


PRESETS: dict[str, Callable[..., Iterator[Case]]] = {
    "quick": quick,
    "cpu": cpu,
    "full": full,
    "gpu": gpu,
}


def default(device: torch.device) -> str:
    """The preset for a device."""
    return "gpu" if device.type == "cuda" else "cpu"
