"""Text as tokens: characters or words of the Penn Treebank, of any text file or folder, or of Python's own help."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.experiments.images import DataMissing

WHERE = (
    "The Penn Treebank's ptb.train.txt, ptb.valid.txt and ptb.test.txt are in simple-examples.tgz at "
    "http://www.fit.vutbr.cz/~imikolov/rnnlm/; any text file, or a folder of .txt files, will do: --data PATH"
)
UNKNOWN, END = "<unk>", "<eos>"
PARTS = ("train", "valid", "test")


class Text(NamedTuple):
    """Tokens `[n]` int64 of the three parts, the vocabulary in order of frequency, and a name for what they hold."""

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: list[str]
    name: str


def load_text(path: Path | None, level: str, max_tokens: int = 10_000) -> Text:
    """Read a text as tokens; `level` is "chars" or "words".

    A folder with files named like *train.txt, *valid.txt and *test.txt is taken as it is split; any other text is cut
    in order into 80 % for training, 10 % and 10 %. None is `pydoc_data.topics`, the language reference inside Python.
    The vocabulary is that of the training part, the `max_tokens` most frequent; where something is left out, in any
    part, the last place is <unk>. Words are what stands between spaces, and <eos> for the end of a line.
    """
    parts = _cut(_topics()) if path is None else _read(path)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    split = [list(part) if level == "chars" else _words(part) for part in parts]
    if min(len(tokens) for tokens in split) < 2:
        raise ValueError(f"{path} holds {len(split[0])} tokens; expected a text to train on")
    # Equally frequent tokens in alphabetical order, so that the vocabulary depends on nothing else.
    ordered = sorted(Counter(split[0]).items(), key=lambda item: (-item[1], item[0]))
    vocabulary = [token for token, _ in ordered[:max_tokens]]
    if UNKNOWN not in vocabulary and not set().union(*split) <= set(vocabulary):
        vocabulary = [*vocabulary[: max_tokens - 1], UNKNOWN]
    index = {token: k for k, token in enumerate(vocabulary)}
    unknown = index.get(UNKNOWN, 0)
    train, valid, test = (
        torch.tensor([index.get(token, unknown) for token in tokens]) for tokens in split
    )
    return Text(train, valid, test, vocabulary, f"text {digest}")


def _words(text: str) -> list[str]:
    return [word for line in text.splitlines() if line.strip() for word in [*line.split(), END]]


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _cut(text: str) -> list[str]:
    first, second = len(text) * 8 // 10, len(text) * 9 // 10
    return [text[:first], text[first:second], text[second:]]


def _read(path: Path) -> list[str]:
    if path.is_file():
        return _cut(path.read_text(encoding="utf-8"))
    files = sorted(path.glob("*.txt"))
    if not files:
        raise DataMissing(f"{path} is no text file and no folder with .txt files. {WHERE}")
    own = [[file for file in files if file.name.endswith(f"{part}.txt")] for part in PARTS]
    if all(len(matching) == 1 for matching in own):
        return [matching[0].read_text(encoding="utf-8") for matching in own]
    return _cut("\n".join(file.read_text(encoding="utf-8") for file in files))


class Streams:
    """A text as `count` streams side by side, read in pieces of `length` tokens one after the other."""

    def __init__(self, tokens: Tensor, count: int, length: int) -> None:
        count = max(1, min(count, (len(tokens) - 1) // length))
        # Each stream takes its first target from where the next one begins.
        self.steps = (len(tokens) - 1) // count
        used = self.steps * count
        self.inputs = tokens[:used].view(count, -1).t().contiguous()
        self.targets = tokens[1 : used + 1].view(count, -1).t().contiguous()
        self.length = length

    def __len__(self) -> int:
        return self.steps // self.length

    def pieces(self, *, whole: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets `[length, count]` in order; with `whole`, what remains as a shorter piece."""
        for start in range(0, self.steps if whole else len(self) * self.length, self.length):
            part = slice(start, start + self.length)
            yield self.inputs[part], self.targets[part]
