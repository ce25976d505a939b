"""What the paper reports (arXiv 1810.01322): printed beside our figures, never mixed with them."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A cell of table 1: loss (nats per image, bits per character) and accuracy in percent, mean and deviation."""

    loss: float
    loss_spread: float
    accuracy: float
    accuracy_spread: float


# Table 1: network -> method -> test loss and accuracy.
_ROWS = {
    "mobilenet": ((0.37, 0.01, 90.2, 0.3), (1.01, 0.95, 78, 11), (0.42, 0.02, 88.1, 0.6)),
    "googlenet": ((0.45, 0.05, 89.6, 1.0), (0.47, 0.04, 89.8, 0.4), (0.47, 0.03, 88.9, 0.8)),
    "vgg19": ((0.42, 0.02, 89.5, 0.2), (0.43, 0.02, 88.9, 0.4), (0.45, 0.03, 87.5, 0.4)),
    "lstm-chars": ((1.566, 0.003, 66.1, 0.1), (1.587, 0.005, 65.6, 0.1), (1.67, 0.01, 64.1, 0.2)),
}
TABLE1 = {
    network: dict(zip(("sgd", "adam", "alrao"), map(Entry._make, entries)))
    for network, entries in _ROWS.items()
}
# The rate of the best SGD of its grid.
BEST_LR = {"mobilenet": 1e-1, "googlenet": 1e-2, "vgg19": 1e-1, "lstm-chars": 1.0}
# Table 2: network -> parameters with one last layer, and with Alrao's clones.
TABLE2 = {
    "googlenet": (6_166_250, 6_258_500),
    "vgg19": (20_040_522, 20_086_692),
    "mobilenet": (2_296_922, 2_412_212),
    "lstm-chars": (171_650, 196_900),
    "lstm-words": (2_171_600, 7_221_600),
}
# Tokens of the Penn Treebank.
TOKENS = {"lstm-chars": 50, "lstm-words": 10_000}
