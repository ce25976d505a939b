"""Rounding float32 results into bf16 and fp16 parameters: stochastic, by a counter-based generator.

With learning rates down to 1e-5 most round-to-nearest updates of a bf16 parameter vanish (1 - 1e-3 == 1); rounding up
with the probability of the remainder keeps the mean displacement. The random bits depend only on (seed, step,
element), so every backend draws the same ones: Philox4x32-7, the fewest rounds that pass all of BigCrush (Salmon et
al., SC 2011, table 2).
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-7 of four int64 tensors that hold 32-bit words; returns four of the same kind."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        # The int64 products wrap modulo 2^64; their bits are right, the shift's sign extension is masked off.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def random_bits16(numel: int, seed: int, step: int, device: torch.device) -> Tensor:
    """16 random bits for each of `numel` elements, int64 in [0, 65536).

    One Philox call serves eight neighbouring elements, in order: low and high half of each of its four words.
    """
    block = torch.arange((numel + 7) // 8, device=device)
    step_words = [torch.full_like(block, (step >> shift) & _MASK) for shift in (0, 32)]
    counter = (block & _MASK, (block >> 32) & _MASK, *step_words)
    words = torch.stack(philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()[:numel]


def stochastic_round(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 `value` to bf16 or fp16, up in magnitude with the probability of the remainder; NaN, inf pass.

    `bits` are the 16 random bits of each element.
    """
    if dtype == torch.bfloat16:
        pattern = value.view(torch.int32).to(torch.int64) & _MASK
        rounded = ((pattern + bits) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    else:
        # The spacing of fp16: 2^(e - 10) for 2^e <= |value|, 2^-24 among the subnormals.
        _, exponent = torch.frexp(value)
        spacing = torch.ldexp(torch.ones_like(value), (exponent - 11).clamp(min=-24))
        units = (value / spacing).abs()
        below = units.floor()
        magnitude = (below + (units - below + bits / 65536 >= 1)) * spacing
        rounded = torch.copysign(magnitude, value)
    return torch.where(value.isfinite(), rounded, value).to(dtype)
