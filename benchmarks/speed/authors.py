"""The authors' package, imported from a clone of their repository that the user names: `--authors PATH`."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from benchmarks.speed.case import Missing

# Set by the command line, before anything is measured.
path: Path | None = None


def load() -> ModuleType:
    """Their package `alrao`, with its submodules imported; raises `Missing` where there is no clone."""
    if path is None:
        raise Missing("the authors' repository was not given: --authors PATH to a clone")
    if not (path / "alrao").is_dir():
        raise Missing(f"no package alrao in {path}")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    try:
        package = importlib.import_module("alrao")
        for name in ("alrao_model", "custom_layers", "optim_spec", "switch"):
            importlib.import_module(f"alrao.{name}")
    except ImportError as error:
        raise Missing(f"the authors' package does not import: {error}") from error
    return package


def model(
    package: ModuleType,
    backbone: nn.Module,
    clones: int,
    features: int,
    classes: int,
    last_layer: str = "LinearClassifier",
) -> nn.Module:
    """Their network for classification: the backbone below `clones` last layers of the kind that they name so."""
    kind = getattr(package.custom_layers, last_layer)
    return package.alrao_model.AlraoModel(
        "classification", nn.NLLLoss(), backbone, clones, kind, features, classes
    )
