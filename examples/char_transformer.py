"""A small transformer on characters by Alrao-Adam, and a sample of what it writes.

python examples/char_transformer.py                       # the text of Python's own documentation
python examples/char_transformer.py --text FILE --steps 2000
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import alrao_fast as alrao


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """Features `[B, T, width]` of characters `[B, T]`: everything but the last layer."""

    def __init__(self, characters: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.size(1), device=x.device)
        return self.norm(self.blocks(self.embed(x) + self.position(positions)))


def batches(text: Tensor, size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - context, (size, 1), generator=generator)
        window = text[starts + torch.arange(context + 1)]
        yield window[:, :-1], window[:, 1:]


@torch.no_grad()
def sample(net: alrao.AlraoModel, text: Tensor, length: int, context: int) -> Tensor:
    net.eval()
    for _ in range(length):
        log_probs = net(text[:, -context:])[:, -1]
        text = torch.cat([text, torch.multinomial(log_probs.exp(), 1)], dim=1)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text file; default: Python's help topics")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--clones", type=int, default=6)
    parser.add_argument("--sample", type=int, default=200, help="characters to write at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    raw = args.text.read_text() if args.text else "\n".join(topics.values())
    alphabet = sorted(set(raw))
    number = {c: k for k, c in enumerate(alphabet)}
    text = torch.tensor([number[c] for c in raw], device=args.device)
    train, valid = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]

    torch.manual_seed(0)
    backbone = Transformer(len(alphabet), args.context, args.width, args.depth, args.heads)
    head = alrao.ClassifierClones(args.width, len(alphabet), num_clones=args.clones)
    net = alrao.AlraoModel(backbone, head).to(args.device)
    generator = torch.Generator().manual_seed(0)
    opt = alrao.AlraoAdam(net, total_steps=args.steps, generator=generator)

    progress = tqdm(batches(train, args.batch, args.context, seed=0), total=args.steps)
    for step, (x, y) in enumerate(progress):
        if step == args.steps:
            break
        opt.zero_grad()
        loss = net(x, targets=y)
        loss.backward()
        opt.step()
        if step % 20 == 0:
            progress.set_postfix(bits=f"{loss.item() / math.log(2):.3f}")
    progress.close()

    net.eval()
    losses = []
    with torch.no_grad(), opt.averaged():
        for _, (x, y) in zip(range(50), batches(valid, args.batch, args.context, seed=1)):
            losses.append(net(x, targets=y))
        written = sample(net, valid[None, : args.context], args.sample, args.context)
    print(f"validation: {torch.stack(losses).mean() / math.log(2):.3f} bits per character")
    print(f"posterior of the clones: {[round(p, 3) for p in net.posterior().tolist()]}")
    print("".join(alphabet[k] for k in written[0, args.context :].tolist()))


if __name__ == "__main__":
    main()
