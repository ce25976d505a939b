"""`import alrao` in this interpreter."""

import sys

SUBMODULES = (
    "alrao_model",
    "custom_layers",
    "earlystopping",
    "gen_hyper",
    "learningratesgen",
    "optim_spec",
    "switch",
    "utils",
)


def install(name: str = "alrao") -> None:
    """Make `import alrao`, `from alrao.optim_spec import ...` and so on find this package.

    It stands in for a package of that name that is on the path, but not for one that has been imported already:
    RuntimeError then.
    """
    package = sys.modules[__package__]
    present = sys.modules.get(name)
    if present is not None and present is not package:
        origin = getattr(present, "__file__", None)
        raise RuntimeError(
            f"{name} has already been imported, from {origin}: call install() before"
        )
    sys.modules[name] = package
    for submodule in SUBMODULES:
        sys.modules[f"{name}.{submodule}"] = sys.modules[f"{__package__}.{submodule}"]
