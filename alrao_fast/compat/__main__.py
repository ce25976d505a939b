"""`python -m alrao_fast.compat SCRIPT [ARGS]`: run a script that imports `alrao`, unmodified, on this package."""

import runpy
import sys
from pathlib import Path

from alrao_fast.compat import _path, install


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m alrao_fast.compat SCRIPT [ARGS]\n\n" + (__doc__ or ""))
        sys.exit(0 if arguments else 2)
    script = Path(arguments[0])
    if not script.is_file():
        print(f"python -m alrao_fast.compat: no such script: {script}", file=sys.stderr)
        sys.exit(2)
    install()
    # As `python SCRIPT ARGS` would have it.
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)
    # Processes that are spawned get this path, and nothing else of what was installed.
    sys.path.insert(0, _path.__path__[0])
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
