"""Which cases a run measures: quick, cpu and full for a CPU, gpu with the figures to reach on an H100 or H200."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.speed.case import Case, Target
from benchmarks.speed.clipping import clipping_case
from benchmarks.speed.head_uses import evaluation_case, head_case
from benchmarks.speed.heads import Head, mixture_case
from benchmarks.speed.optimizers import optimizer_case
from benchmarks.speed.steps import step_case
from benchmarks.speed.switch import switch_case

FUSED = "torch fused"
LIBRARY = "linear_cross_entropy"
CONVOLUTIONAL = ("MobileNetV2", "GoogLeNet", "VGG19", "SENet18")
# Of N heads one by one nobody has the memory at these sizes.
BACKENDS = ("alrao", "alrao cuda", "alrao triton")
LARGE = (
    *BACKENDS,
    *(f"{name} {way}" for name in (LIBRARY, "liger", "cce") for way in ("x N", "two passes")),
    *(f"{name} by rows" for name in (LIBRARY, "cce")),
    "quack x N",
)


def _row(name: str, *targets: tuple[str, str | None, float]) -> tuple[Target, ...]:
    """The figures of a row, each with its metric, its peer and its limit."""
    return tuple(Target(name, metric, "alrao", peer, limit) for metric, peer, limit in targets)


def quick() -> Iterator[Case]:
    """A minute and a half on two cores."""
    for network in ("LSTM", "256 vectors of 64"):
        yield optimizer_case(network, momentum=0.9)
    yield optimizer_case("LSTM", op="feature_adam")
    yield clipping_case("256 vectors of 64", clipped=False)
    words = Head("10,000 words", 140, 100, 10_000, 6)
    yield mixture_case(Head("10 classes", 32, 1024, 10, 10))
    yield mixture_case(words)
    yield evaluation_case(words)
    yield switch_case()
    yield step_case("MLP")
    yield step_case("LSTM, 50 characters")


def cpu() -> Iterator[Case]:
    """What the README's figures are taken from."""
    second = _row("C2", ("wall", FUSED, 1.05))
    small = _row("C2", ("wall", FUSED, 0.25))
    for momentum in (0.0, 0.9):
        yield optimizer_case("VGG19", momentum=momentum, targets=second)
        yield optimizer_case("GoogLeNet", momentum=momentum, targets=second)
        yield optimizer_case("LSTM", momentum=momentum)
        yield optimizer_case("256 vectors of 64", momentum=momentum, targets=small)
    yield optimizer_case("VGG19", op="feature_adam")
    yield optimizer_case("VGG19", "bfloat16", momentum=0.9)
    for network in ("VGG19", "256 vectors of 64"):
        yield clipping_case(network)
        yield clipping_case(network, clipped=False)
    first = _row("C1", ("wall", "authors", 0.20), ("wall", f"{LIBRARY} x N", 1.05))
    memory = _row("C1", ("memory", "authors", 0.05))
    ten = Head("10 classes", 32, 1024, 10, 10)
    words = Head("10,000 words", 700, 100, 10_000, 6)
    yield mixture_case(ten)
    yield mixture_case(Head("50 characters", 1400, 100, 50, 6), targets=first)
    yield mixture_case(words, memory=True, targets=first + memory)
    yield head_case(ten)
    yield evaluation_case(words)
    yield switch_case()
    for batch in (32, 128):
        yield step_case("MLP", batch)
    yield step_case("LSTM, 50 characters")
    yield step_case("LSTM, 10,000 words")
    yield step_case("transformer, 50,000 tokens", 4)
    for network in CONVOLUTIONAL:
        yield step_case(network, 32)


def full() -> Iterator[Case]:
    """The cpu preset, and the convolutional networks at a batch of 128."""
    yield from cpu()
    for network in CONVOLUTIONAL:
        yield step_case(network, 128)


def _gpu_optimizers(tiny: bool) -> Iterator[Case]:
    case = partial(optimizer_case, tiny=tiny)
    first = _row("A1", ("gpu", FUSED, 1.02), ("gpu", None, 1.35))
    first += _row("A2", ("wall", FUSED, 0.35))
    third = _row("A3", ("gpu", FUSED, 1.02), ("gpu", None, 1.12))
    fourth = _row("A4", ("gpu", FUSED, 0.97), ("gpu", None, 1.12))
    by_weight = "foreach, rates per weight"
    seventh = _row(
        "A7",
        ("gpu", "torch.compile", 1.00),
        ("gpu", by_weight, 0.55),
        ("gpu", "authors", 0.30),
        # Theirs has the rates and as large a buffer: a thousandth of the rates is half a thousandth of both.
        ("memory", by_weight, 0.0005),
    )
    backends = (*BACKENDS, FUSED)
    few = (*backends, "torch foreach", "apex FusedSGD")
    for momentum in (0.0, 0.9):
        yield case("GoogLeNet", momentum=momentum, targets=first)
    yield case("VGG19", momentum=0.0, targets=third + seventh)
    yield case("VGG19", momentum=0.9, targets=third)
    for momentum in (0.0, 0.9):
        yield case("GPT 124M", momentum=momentum, keep=few, targets=third)
    for network in ("GPT 124M", "GPT 1.3B"):
        yield case(network, "bfloat16", momentum=0.9, keep=few, targets=fourth)
    # Gradients are unscaled after the update, which torch's kernel does within it: 28 bytes an entry to its 24,
    # and 36 to 32 with momentum.
    for momentum, limit in ((0.0, 1.20), (0.9, 1.16)):
        fifth = _row("A5", ("gpu", FUSED, limit))
        yield case("GPT 124M", momentum=momentum, scaler=True, targets=fifth)
    for momentum, limit in ((0.0, 0.80), (0.9, 0.95)):
        sixth = _row("A6", ("gpu", "apex FusedSGD", limit))
        keep = ("alrao", FUSED, "apex FusedSGD")
        yield case("GPT 1.3B", momentum=momentum, keep=keep, targets=sixth)
    eighth = _row("A8", ("gpu", FUSED, 1.02))
    yield case("GPT 124M", op="feature_adam", keep=backends, targets=eighth)


def _gpu_clipping(tiny: bool) -> Iterator[Case]:
    for clipped in (True, False):
        yield clipping_case("GoogLeNet", clipped=clipped, tiny=tiny)
        yield clipping_case("GPT 124M", clipped=clipped, tiny=tiny)
    yield clipping_case("GPT 124M", "bfloat16", tiny=tiny)


def _gpu_heads(tiny: bool) -> Iterator[Case]:
    def head(*sizes: str | int, bias: bool = False) -> Head:
        full_size = Head(*sizes, bias=bias)
        return full_size.tiny() if tiny else full_size

    compile_and_vmap = _row("B2", ("gpu", "torch.compile", 0.6), ("gpu", "torch.func.vmap", 0.6))
    plain = _row("B3", ("gpu", "plain head", 1.5), ("wall", "plain head", 1.0))
    share = _row("B9", ("memory", "authors", 0.02))
    frugal = _row("B9", ("memory", None, 1.0))
    two_passes = f"{LIBRARY} two passes"
    for samples in (32, 128, 512):
        ten = head("10 classes", samples, 1024, 10, 10, bias=True)
        yield head_case(ten, targets=_row("B1", ("wall", "authors", 0.05)))
        yield mixture_case(ten, targets=compile_and_vmap + plain)
    fourth = ("gpu", "torch.compile", 0.55), ("gpu", "authors", 0.30), ("gpu", None, 1 / 0.80)
    thousand = head("1,000 classes", 4096, 2048, 1000, 10, "bfloat16", bias=True)
    yield mixture_case(thousand, targets=_row("B4", *fourth) + share + frugal)
    for dtype, limit in (("float32", 0.25), ("tf32", 0.25), ("bfloat16", 0.06)):
        fifth = _row("B5", ("gpu", "authors", limit), ("gpu", two_passes, 0.6))
        words = head("10,000 words", 1400, 100, 10_000, 6, dtype, bias=True)
        yield mixture_case(words, targets=fifth + share + frugal)
    words = head("10,000 words, no bias", 1400, 100, 10_000, 6, "bfloat16")
    yield mixture_case(words, keep=LARGE, targets=_row("B5", ("gpu", "cce x N", 0.6)))
    gpt = head("50,304 tokens", 8192, 768, 50_304, 6, "bfloat16")
    llama = head("32,000 tokens", 16_384, 2048, 32_000, 6, "bfloat16")
    for large, of_matrix_rate in ((gpt, 0.78), (llama, 0.83)):
        sixth = _row(
            "B6",
            ("gpu", two_passes, 0.62),
            ("gpu", "liger two passes", 0.25),
            ("gpu", "cce two passes", 0.55),
            ("gpu", None, 1 / of_matrix_rate),
        )
        yield mixture_case(large, keep=LARGE, targets=sixth + frugal)
    largest = head("128,256 tokens", 4096, 4096, 128_256, 6, "bfloat16")
    keep = ("alrao", f"{LIBRARY} x N", "liger x N", "quack x N")
    others = _row("B7", ("gpu", "quack x N", 1.05)) + _row("B8", ("gpu", "liger x N", 0.15))
    yield mixture_case(largest, keep=keep, targets=others + frugal)
    keep = tuple(name for name in LARGE if "alrao" not in name and "x N" not in name)
    yield head_case(gpt, keep=keep, targets=_row("B10", ("gpu", "best", 0.92)))
    half = _row("E1", ("gpu", "one by one", 0.5), ("memory", "one by one", 0.5))
    for evaluated in (head("10,000 words", 1400, 100, 10_000, 6, "bfloat16"), gpt):
        yield evaluation_case(evaluated, targets=half)
    yield switch_case()


def _gpu_steps(tiny: bool) -> Iterator[Case]:
    case = partial(step_case, tiny=tiny)
    first = _row("S1", ("wall", "sgd", 1.02), ("graph", "sgd", 1.02))
    networks = ("GoogLeNet", "VGG19", "MobileNetV2")
    for network in networks:
        yield case(network, 32, targets=first)
    for network in networks:
        yield case(network, 128)
    for batch in (32, 128):
        yield case("SENet18", batch)
    for network in ("MLP", "LSTM, 50 characters", "LSTM, 10,000 words"):
        yield case(network)
    yield case("transformer, 50,000 tokens", 16)
    libraries = ("quack", LIBRARY)
    second = _row("S2", *(("wall", f"sgd, {name}", 1.05) for name in libraries))
    for network in ("GPT 124M", "GPT 1.3B"):
        yield case(network, 8, "bfloat16", fused_heads=libraries, floor_targets=second)


def gpu(tiny: bool = False) -> Iterator[Case]:
    """Every figure to reach on a GPU; `tiny` at sizes at which the same code runs in a moment on a CPU."""
    yield from _gpu_optimizers(tiny)
    yield from _gpu_clipping(tiny)
    yield from _gpu_heads(tiny)
    yield from _gpu_steps(tiny)


PRESETS: dict[str, Callable[..., Iterator[Case]]] = {
    preset.__name__: preset for preset in (quick, cpu, full, gpu)
}


def default(device: torch.device) -> str:
    """The preset for a device."""
    return "gpu" if device.type == "cuda" else "cpu"
