"""Loads the compiled kernels, `alrao_fast._C`, if they are there and fit this torch.

Importing `_C` registers its kernels with torch's dispatcher; nothing else is taken from it. A missing or unfit
binary is not an error here: `ERROR` keeps the reason, and whoever asks for the backend by name is told.
"""

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_REBUILD = "reinstall with `pip install --no-build-isolation --force-reinstall --no-deps` from the source tree"
_MINIMUM_TORCH = (2, 11)


@functools.cache
def build_info() -> dict[str, Any]:
    """What the build recorded about itself: torch, compiler, instruction sets, CUDA or why it was left out."""
    path = Path(__file__).with_name("_build_info.json")
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _load() -> str | None:
    """Import `_C`; return None, or the reason why there are no compiled kernels and the cure."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MINIMUM_TORCH:
        return f"needs torch >= 2.11, this is torch {torch.__version__}: upgrade torch, then {_REBUILD}"
    try:
        importlib.import_module("alrao_fast._C")
    except ModuleNotFoundError:
        reason = build_info().get("extension_skipped")
        return f"the compiled extension was not built ({reason or 'no build record'}): {_REBUILD}"
    except (ImportError, OSError, RuntimeError) as error:
        built_for = build_info().get("torch", "an unknown torch")
        return (
            f"the compiled extension was built for torch {built_for} and does not load under torch "
            f"{torch.__version__} ({error}): {_REBUILD}"
        )
    return None


ERROR: str | None = _load()


def reject(reason: str) -> None:
    """Use none of the compiled kernels: they were built from other sources."""
    global ERROR
    ERROR = f"the compiled extension was built from other sources ({reason}): {_REBUILD}"


def function(name: str) -> Callable[..., Any] | None:
    """A function of `_C` that touches no tensor, or None where there is none."""
    return getattr(importlib.import_module("alrao_fast._C"), name, None) if ERROR is None else None
