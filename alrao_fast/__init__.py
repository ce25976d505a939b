"""Alrao, all learning rates at once, at the price of plain SGD (arXiv 1810.01322)."""

__version__ = "0.1.0"
