"""`python -m alrao_fast doctor [--json]`."""

import argparse
import sys

from alrao_fast import doctor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alrao_fast", description="Alrao for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="what runs here, and why not what does not")
    command.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(arguments)
    return doctor.main(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
