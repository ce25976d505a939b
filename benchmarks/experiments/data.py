"""The data that is read from files: CIFAR-10, decoded once and augmented on the device, and text as tokens.

CIFAR-10 comes as the official python batches, the folder of data_batch_1 to data_batch_5 and test_batch, or as JPEG
files in one .npz. That holds, for each of `train` and `test`: `train_jpeg` (uint8, all files joined), `train_offsets`
(int64, n + 1: image i is `train_jpeg[offsets[i]:offsets[i + 1]]`, 32x32 RGB) and `train_labels` (uint8). Text is
characters or words of the Penn Treebank, of any text file or folder, or of Python's own help.
"""

import hashlib
import io
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

SIZE, PADDING, CLASSES = 32, 4, 10
WHERE = (
    "CIFAR-10 is at https://www.cs.toronto.edu/~kriz/cifar.html: fetch and unpack the python version, and pass "
    "--data cifar-10-batches-py (or a .npz of JPEG files, see docs/paper.md)"
)
BATCHES = [f"data_batch_{k}" for k in range(1, 6)]


class DataMissing(Exception):
    """There is no such data; the message says where to get it."""


class Images(NamedTuple):
    """Images `[n, 3, 32, 32]` uint8 and labels `[n]` int64 of both official parts, and a name for what they hold."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    name: str


def is_images(path: Path) -> bool:
    """Whether `path` is what `load_images` reads."""
    return path.suffix == ".npz" or (path.is_dir() and (path / BATCHES[0]).exists())


def load_images(path: Path, cache: Path) -> Images:
    """Read CIFAR-10; what was decoded is kept in the folder `cache` as uint8, by the content of `path`.

    Raises DataMissing where `path` is not there, ValueError where it holds something else.
    """
    if not path.exists():
        raise DataMissing(f"{path} does not exist. {WHERE}")
    files = [path] if path.is_file() else [path / name for name in [*BATCHES, "test_batch"]]
    digest = hashlib.sha256()
    for file in files:
        if not file.exists():
            raise DataMissing(f"{file} does not exist. {WHERE}")
        digest.update(file.read_bytes())
    name = digest.hexdigest()[:12]
    decoded = cache / f"images-{name}.npz"
    if decoded.exists():
        arrays = dict(np.load(decoded))
    else:
        arrays = _decode_npz(path) if path.is_file() else _read_batches(path)
        cache.mkdir(parents=True, exist_ok=True)
        partial = decoded.with_suffix(".partial.npz")
        np.savez(partial, **arrays)
        partial.replace(decoded)
    parts = {key: torch.from_numpy(array) for key, array in arrays.items()}
    parts |= {key: parts[key].long() for key in ("train_y", "test_y")}
    return Images(**parts, name=f"images {name}")


def _decode_npz(path: Path) -> dict[str, np.ndarray]:
    from PIL import Image

    arrays = {}
    with np.load(path) as stored:
        for part in ("train", "test"):
            wanted = [f"{part}_{key}" for key in ("jpeg", "offsets", "labels")]
            if missing := ", ".join(key for key in wanted if key not in stored):
                expected = "train_ and test_ jpeg, offsets and labels"
                raise ValueError(f"{path} has no {missing}; expected {expected}")
            joined, offsets = stored[f"{part}_jpeg"], stored[f"{part}_offsets"]
            images = np.empty((len(offsets) - 1, 3, SIZE, SIZE), np.uint8)
            for i in tqdm(range(len(images)), desc=f"decoding {part}", unit="image"):
                file = io.BytesIO(joined[offsets[i] : offsets[i + 1]].tobytes())
                pixels = np.asarray(Image.open(file).convert("RGB"))
                if pixels.shape != (SIZE, SIZE, 3):
                    found = f"{path}: {part} image {i} has shape {pixels.shape}"
                    raise ValueError(f"{found}; expected (32, 32, 3)")
                images[i] = pixels.transpose(2, 0, 1)
            arrays[f"{part}_x"] = images
            arrays[f"{part}_y"] = stored[f"{part}_labels"].astype(np.uint8)
    return arrays


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled containers and numpy arrays, and runs nothing else that a file may name."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        allowed: dict[tuple[str, str], Any] = {
            ("numpy._core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.empty(0))[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a CIFAR-10 batch")
        return allowed[module, name]


def _read_batches(folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for part, names in (("train", BATCHES), ("test", ["test_batch"])):
        files = (io.BytesIO((folder / name).read_bytes()) for name in names)
        batches = [_ArraysOnly(file, encoding="bytes").load() for file in files]
        pixels = np.concatenate([batch[b"data"] for batch in batches])
        arrays[f"{part}_x"] = pixels.reshape(-1, 3, SIZE, SIZE)
        labels = np.concatenate([batch[b"labels"] for batch in batches])
        arrays[f"{part}_y"] = labels.astype(np.uint8)
    return arrays


def epoch_seed(seed: int, epoch: int) -> int:
    """What the random draws of a run's epoch start from. torch's CPU generator heeds 32 bits of a seed only."""
    return (seed * 1_000_003 + epoch) % 2**32


class Crops:
    """Training batches by random crops of the images padded by 4 black pixels, flipped half of the time.

    Order, crops and flips of an epoch are drawn on the CPU from (seed, epoch): the same on every device, and a run that
    goes on at an epoch needs no generator's state.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch: int) -> None:
        self.padded = torch.nn.functional.pad(images, (PADDING,) * 4)
        self.labels = labels
        self.batch = batch
        self.normalize = Normalize(images)
        self._span = torch.arange(SIZE, device=images.device)

    def __len__(self) -> int:
        # The incomplete last batch is dropped: batch normalisation is unstable on a few images.
        return len(self.labels) // self.batch

    def epoch(self, seed: int, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of normalised images `[B, 3, 32, 32]` float32 and labels `[B]`."""
        n, device = len(self.labels), self.padded.device
        generator = torch.Generator().manual_seed(epoch_seed(seed, number))
        order = torch.randperm(n, generator=generator)
        top, left = torch.randint(2 * PADDING + 1, (2, n), generator=generator)
        flipped = torch.rand(n, generator=generator) < 0.5
        order, top, left, flipped = (t.to(device) for t in (order, top, left, flipped))
        for k in range(len(self)):
            part = slice(k * self.batch, (k + 1) * self.batch)
            yield self.crop(order[part], top[part], left[part], flipped[part])

    def crop(
        self, index: Tensor, top: Tensor, left: Tensor, flipped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The images `index` from row `top` and column `left` of the padded ones, mirrored where `flipped`."""
        rows = top[:, None] + self._span
        columns = left[:, None] + torch.where(flipped[:, None], SIZE - 1 - self._span, self._span)
        # Advanced indices around a slice put the channels last: [B, 32, 32, 3].
        pixels = self.padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return self.normalize(pixels.movedim(-1, 1)), self.labels[index]


class Normalize:
    """uint8 images to float32 with mean 0 and deviation 1 of each channel over the training images."""

    def __init__(self, images: Tensor) -> None:
        # Sums of small pieces: float32 copies of all images would take gigabytes.
        parts = [part.double() for part in images.split(1000)]
        count = images.numel() / images.size(1)
        mean = sum(part.sum((0, 2, 3)) for part in parts) / count
        square = sum((part**2).sum((0, 2, 3)) for part in parts) / count
        deviation = (square - mean**2).sqrt()
        self.mean = mean.float().view(3, 1, 1)
        self.scale = (1 / deviation).float().view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return ((images.float() - self.mean) * self.scale).contiguous()


TEXTS = (
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
        raise DataMissing(f"{path} is no text file and no folder with .txt files. {TEXTS}")
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
