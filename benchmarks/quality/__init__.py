"""`python benchmarks quality`: Alrao without tuning against tuned and tuning-free rivals."""

from __future__ import annotations


def main(arguments: list[str]) -> None:
    from quality.command import main

    main(arguments)
