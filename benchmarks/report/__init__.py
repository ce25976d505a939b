"""`python benchmarks report`: one self-contained page from the result files of the other commands."""

from __future__ import annotations


def main(arguments: list[str]) -> None:
    from report.command import main

    main(arguments)
