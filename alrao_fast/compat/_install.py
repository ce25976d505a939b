"""`import alrao` in this interpreter."""

import sys
from types import ModuleType


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
    for public in package.__all__:
        if isinstance(getattr(package, public), ModuleType):
            sys.modules[f"{name}.{public}"] = getattr(package, public)
