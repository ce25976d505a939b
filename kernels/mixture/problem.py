"""What the kernels of the mixture compute on: inputs, likelihood and memory of a call, and how a size is run."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from alrao_fast.ops.mixture.checks import weight_gradient_dtype
from alrao_fast.ops.mixture.likelihood import Likelihood, Values

from ..launch import INTERPRETED, accumulator
from .gemm import matmul, sum_rows, tf32
from .weights import switch_mixture_weights

# The largest tile of [N, C], both padded to powers of two, that stays in registers.
TILE = 4096
# Multiplications of a product below which launches cost more than our own kernel's lower speed.
DIRECT = 1 << 26


class Inputs(NamedTuple):
    """Contiguous and checked; `x [B, D]`, `weight [N, C, D]`, `bias [N, C]` or None, `log_posterior [N]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    log_posterior: Tensor

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor) -> "Inputs":
        bias = None if bias is None else bias.contiguous()
        return cls(x.contiguous(), weight.contiguous(), bias, log_posterior.contiguous())

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, D, N, C)."""
        return (*self.x.shape, self.weight.size(0), self.weight.size(1))

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, sums and results."""
        return accumulator(self.x.dtype)

    @property
    def matrix(self) -> Tensor:
        """The weights of all clones, [N C, D]."""
        return self.weight.view(-1, self.weight.size(2))

    def logits(self, part: slice, clone: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of some samples, of all clones or of one, yet without the bias; bias and posterior beside them."""
        x = self.x[part]
        weight = self.matrix if clone is None else self.weight[clone]
        z = x.new_empty((x.size(0), weight.size(0)), dtype=self.dtype)
        matmul(x, weight.t(), z)
        return z, z if self.bias is None else self.bias, self.log_posterior

    def chunks(self, bytes_per_sample: int, memory_budget: int) -> list[slice]:
        """The samples whose logits are held at a time."""
        samples = self.x.size(0)
        most = max(min(samples, memory_budget // max(bytes_per_sample, 1)), 1)
        # Chunks of a size, in tiles of the products where there is room.
        even = triton.cdiv(samples, max(triton.cdiv(samples, most), 1))
        size = max(min(triton.cdiv(even, 128) * 128, most), 1)
        return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]


class Loss:
    """One call of the loss, from the arguments of the op in the order of its schema."""

    def __init__(self, kind: type[Likelihood], *arguments: Any) -> None:
        x, weight, bias, log_posterior, target, option, *needs = arguments
        self.mean, self.need_dx, self.need_dw, self.memory_budget, *more_options = needs
        self.inputs = Inputs.of(x, weight, bias, log_posterior)
        self.target = target.contiguous()
        num_samples, _, num_clones, num_classes = self.inputs.sizes
        options = kind(option, *more_options)
        self.gaussian = isinstance(options, Values)
        inv_sigma2, log_normaliser = options.density(num_classes) if self.gaussian else (0.0, 0.0)
        given = options.options()
        if given.get("make_factors"):
            given = self._with_factors(option, given)
        soft = None
        if not self.gaussian and self.target.is_floating_point():
            # The target's class, which counts in the accuracy alone, is the likeliest.
            likeliest = given["likeliest"]
            classes = self.target.argmax(1) if likeliest is None else likeliest.contiguous()
            soft, self.target, option = self.target, classes, -1
        self.per_sample: bool = given["per_sample"]
        # What a sum is divided by: a number, and a tensor of one.
        self.divisor: float = given["divisor"]
        self.has_items = given["num_items"] is not None
        self.items = given["num_items"] if self.has_items else x
        self.row_weight, class_weight = given["row_weight"], given.get("class_weight")
        added = {k: given.get(k, 0.0) for k in ("label_smoothing", "z_loss", "softcap")}
        any_option = soft is not None or class_weight is not None or any(added.values())
        # What kernels take of the options of the loss, by their names there.
        self.options = {
            "row_weight_ptr": x if self.row_weight is None else self.row_weight.contiguous(),
            "class_weight_ptr": x if class_weight is None else class_weight.contiguous(),
            "soft_ptr": x if soft is None else soft,
            "smoothing": added["label_smoothing"],
            "z_loss": added["z_loss"],
            "softcap": added["softcap"],
            "OPTIONS": any_option or self.row_weight is not None,
            "HAS_ROW_WEIGHT": self.row_weight is not None,
            "HAS_CLASS_WEIGHT": class_weight is not None,
            "SOFT": soft is not None,
            "CAPPED": added["softcap"] != 0,
        }
        # Of the likelihood, likewise.
        self.likelihood = {
            "ignore_index": 0 if self.gaussian else option,
            "inv_sigma2": inv_sigma2,
            "log_normaliser": log_normaliser,
            "GAUSSIAN": self.gaussian,
        }

        def empty(*shape: int, dtype: torch.dtype = self.inputs.dtype) -> Tensor:
            return x.new_empty(shape, dtype=dtype)

        self.norm, self.count = empty(1), empty(1, dtype=torch.float64)
        # The clones, and whether anything was not finite.
        self.dead = empty(num_clones + 1, dtype=torch.int32)
        self.nll, self.score = empty(num_clones, num_samples), empty(num_clones, num_samples)
        self.mix = empty(num_samples)
        self.dx = empty(*(x.shape if self.need_dx else (0,)))
        self.dweight = empty(
            *(weight.shape if self.need_dw else (0,)), dtype=weight_gradient_dtype(x.dtype)
        )
        need_db = self.need_dw and bias is not None
        self.dbias = empty(*(weight.shape[:2] if need_db else (0,)))
        # What a bfloat16 gradient is summed in over chunks of samples.
        self.sum: Tensor | None = None

    def _with_factors(self, ignore_index: int, given: dict[str, Any]) -> dict[str, Any]:
        """The options with the factors of the losses, and a target that sums to 1."""
        found, factors, class_weight, likeliest = switch_mixture_weights(
            self.target,
            given["row_weight"],
            given["class_weight"],
            ignore_index,
            given["label_smoothing"],
            self.mean,
            given["divisor"],
            given["num_items"],
        )
        soft = self.target.is_floating_point()
        if soft:
            self.target = found
        self.mean = False
        made = {
            "row_weight": factors,
            "class_weight": class_weight if class_weight.numel() else None,
            "divisor": 1.0,
            "num_items": None,
            "likeliest": likeliest if soft else None,
        }
        return given | made

    def add_weight_gradient(self, g: Tensor, x: Tensor, part: slice, clone: int = -1) -> None:
        """Take a chunk's logits' gradient, of one clone or of all, into those of the weights, g^T x, and biases."""
        dweight = self.dweight.flatten(0, 1) if clone < 0 else self.dweight[clone]
        add, is_last = part.start > 0, part.stop >= self.inputs.x.size(0)
        if self.dbias.numel():
            sum_rows(g, self.dbias.view(-1) if clone < 0 else self.dbias[clone], add=add)
        if dweight.dtype == self.inputs.dtype or (is_last and not add):
            matmul(g.t(), x, dweight, add=add)
            return
        if self.sum is None:
            self.sum = torch.empty_like(dweight, dtype=self.inputs.dtype)
        matmul(g.t(), x, self.sum, add=add)
        if is_last:
            dweight.copy_(self.sum)

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every regime leaves for the finishing kernel."""
        return self.nll, self.score, self.mix, self.dead

    @property
    def folds(self) -> bool:
        """Whether the logits' gradient carries the norm; among the subnormals of float16 it would lose its digits."""
        return self.inputs.x.dtype != torch.float16


def regime(inputs: Inputs, gaussian: bool, options: bool = False) -> str:
    """How the clones are gone through: "tile", "fused", "exponential" or "stream"; two of them have no options."""
    _, num_features, num_clones, num_classes = inputs.sizes
    if tile_of(num_clones, num_classes) is not None:
        return "tile"
    if not (gaussian or options) and is_fused(inputs.x.dtype, num_features):
        return "fused"
    if not (gaussian or options or inputs.bias is not None) and is_exponential(inputs):
        return "exponential"
    return "stream"


# The fewest classes for which it is worth more launches, and exponentials in place of logits.
MANY_CLASSES = 8192


def is_exponential(inputs: Inputs) -> bool:
    """Whether the logits stay in the product that makes them (exponential.py): where tiles are copied as such."""
    x, num_classes = inputs.x, inputs.weight.size(1)
    if x.dtype != torch.bfloat16 or num_classes < MANY_CLASSES or x.size(1) % 8:
        return False
    # Tiles are copied from whole accesses on.
    if x.data_ptr() % 16 or inputs.weight.data_ptr() % 16:
        return False
    # Later ones have other products, of which these kernels ask for more registers than there are.
    return INTERPRETED or (
        torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def tile_of(num_clones: int, num_classes: int) -> tuple[int, int, int] | None:
    """(N_P, C_P, warps) of the tile kernels, or None where the clones are streamed."""
    n, c = triton.next_power_of_2(num_clones), max(triton.next_power_of_2(num_classes), 16)
    if n * c > TILE:
        return None
    return n, c, 1 if n * c <= 256 else 4 if n * c <= 2048 else 8


def is_fused(dtype: torch.dtype, num_features: int) -> bool:
    """Whether recomputing the logits of a large output layer costs less than their traffic (the floors in fused.py)."""
    if dtype in (torch.bfloat16, torch.float16):
        return num_features <= 128
    return tf32(dtype) and num_features <= 64


def row_block(num_classes: int, dtype: torch.dtype, options: bool = False) -> tuple[int, int]:
    """(BLOCK, warps) of the row kernels; with the loss's options they need more registers."""
    # Entries of a thread: as many as stay in its registers.
    largest, share = (1024, 256) if dtype == torch.float64 else (4096, 512)
    block = min(max(triton.next_power_of_2(num_classes), 128), largest // 2 if options else largest)
    return block, max(block // share, 1)


def lowest(dtype: torch.dtype) -> float:
    return torch.finfo(accumulator(dtype)).min
