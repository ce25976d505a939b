"""A transformer language model (Vaswani et al. 2017; pre-norm, as GPT-2) up to its features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal self-attention and a perceptron four times as wide, each on normalised features and added to its input."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(features)
        self.attention_in = nn.Linear(features, 3 * features)
        self.attention_out = nn.Linear(features, features)
        self.mlp_norm = nn.LayerNorm(features)
        self.mlp = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
        )

    def forward(self, x: Tensor) -> Tensor:
        joint = self.attention_in(self.attention_norm(x))
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in joint.chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class TransformerLM(nn.Module):
    """Token and position embeddings and `layers` blocks: tokens [B, T] -> features [B, T, features], T <= context.

    With 768 features, 12 layers, 12 heads, a context of 1024 and 50,304 tokens these are the 124 million parameters of
    the smallest GPT-2, whose last layer is its embedding; here the last layer is the caller's.
    """

    def __init__(
        self, num_tokens: int, features: int, layers: int, heads: int, context: int = 1024
    ) -> None:
        super().__init__()
        self.out_features = features
        self.tokens = nn.Embedding(num_tokens, features)
        self.positions = nn.Embedding(context, features)
        self.blocks = nn.Sequential(*(Block(features, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(features)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(-1), device=tokens.device)
        return self.norm(self.blocks(self.tokens(tokens) + self.positions(positions)))
