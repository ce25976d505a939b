"""The folder benchmarks/ as a package, for the tests of its commands."""

import runpy
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def load():
    """Make it importable as `python benchmarks` does, without the repository's root on sys.path."""
    runpy.run_path(str(FOLDER / "__main__.py"))["load_package"](FOLDER)
