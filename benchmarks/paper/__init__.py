"""`python benchmarks paper table1 | table2 | figure2 ... figure8`: the paper's experiments on the fused kernels."""

from __future__ import annotations


def main(arguments: list[str]) -> None:
    from paper.command import main

    main(arguments)
