"""`python -m alrao_fast doctor [--json]`."""

import argparse
import sys

from alrao_fast import doctor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m alrao_fast",
        description="Alrao for PyTorch. The doctor is the only command; the rest is for Python: architectures are "
        "ranked by alrao_fast.rank (examples/rank_digits.py), scripts of the authors' package run by "
        "python -m alrao_fast.compat.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="what runs here, and why not what does not")
    command.add_argument("--json", action="store_true", help="print the report as one JSON object")
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["rank"]:
        parser.error(
            "there is no command rank: call alrao_fast.rank in Python, see examples/rank_digits.py"
        )
    options = parser.parse_args(given)
    return doctor.main(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
