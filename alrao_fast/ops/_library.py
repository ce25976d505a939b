"""The dispatcher library of the package: schemas and fakes stand in Python, compiled backends add their kernels.

Defining the schemas here, whether or not the extension is built, keeps one definition for every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "alrao_fast"
LIB = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, fake: Callable[..., Any] | None = None) -> str:
    """Define an op by its schema, with its fake implementation; return the qualified name."""
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"{NAMESPACE}::{schema.split('(', 1)[0].strip()}"
    if fake is not None:
        torch.library.register_fake(qualified, fake, lib=LIB)
    return qualified
