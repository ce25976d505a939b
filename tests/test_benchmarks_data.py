"""The data of the paper's experiments, apart from where it is read from. Protects:

- crops and flips against slicing; seeded;
- vocabulary and streams by hand; the text that is there without any file.
"""

import benchmarks_package
import torch

benchmarks_package.load()


def test_crops_are_slices():
    from benchmarks.experiments.data import Crops

    x = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    crops = Crops(x, torch.arange(5), batch=2)
    index, top, left = torch.tensor([3, 1, 4]), torch.tensor([0, 4, 8]), torch.tensor([8, 4, 1])
    flipped = torch.tensor([False, False, True])
    out, labels = crops.crop(index, top, left, flipped)
    assert labels.tolist() == [3, 1, 4]
    for k in range(3):
        cut = torch.nn.functional.pad(x[index[k]], (4,) * 4)
        cut = cut[:, top[k] : top[k] + 32, left[k] : left[k] + 32]
        expected = crops.normalize(cut.flip(-1) if flipped[k] else cut)
        assert torch.equal(out[k], expected)
    pixels = crops.normalize(x)
    assert pixels.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(
        pixels.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-4, atol=0
    )
    first, again, other = (next(crops.epoch(seed, 1))[0] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    assert sum(len(labels) for _, labels in crops.epoch(0, 0)) == 4


def test_vocabulary_and_streams_by_hand(tmp_path):
    from benchmarks.experiments.data import Streams, load_text

    for part, content in (("train", "b a b\nb c\n"), ("valid", "a d\n"), ("test", "c\n")):
        (tmp_path / f"ptb.{part}.txt").write_text(content)
    words = load_text(tmp_path, "words", max_tokens=4)
    assert words.vocabulary == ["b", "<eos>", "a", "<unk>"]
    assert words.train.tolist() == [0, 2, 0, 1, 0, 3, 1]
    assert words.valid.tolist() == [2, 3, 1] and words.test.tolist() == [3, 1]
    streams = Streams(torch.arange(14), 2, 3)
    pieces = [(x.tolist(), y.tolist()) for x, y in streams.pieces(whole=True)]
    assert pieces[0] == ([[0, 6], [1, 7], [2, 8]], [[1, 7], [2, 8], [3, 9]])
    assert pieces[1][1] == [[4, 10], [5, 11], [6, 12]] and len(pieces) == len(streams) == 2


def test_default_text():
    from benchmarks.experiments.data import load_text

    text = load_text(None, "chars")
    total = len(text.train) + len(text.valid) + len(text.test)
    assert total > 400_000 and len(text.train) == total * 8 // 10
    assert text.vocabulary[0] == " "
