"""`python tests/campaign`: run generated calls and fixed cases, count the verdicts, show the failures."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:
    # `python tests/campaign` puts the folder itself there; its modules are those of a package.
    sys.path[0] = str(HERE.parent)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=600, help="generated calls")
    parser.add_argument(
        "--only", metavar="ID", help="SEED:NUMBER, or the beginning of a case's name"
    )
    parser.add_argument("--report", action="store_true", help="the counts alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--worker", metavar="IDS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(json.loads(arguments.worker))
    from campaign import registry

    ids = [f"{arguments.seed}:{number}" for number in range(arguments.calls)]
    ids += registry.CASES
    if arguments.only:
        named = [name for name in registry.CASES if name.startswith(arguments.only)]
        ids = [arguments.only] if ":" in arguments.only and not named else named
    outcomes = list(isolated(ids, arguments.jobs))
    print(table(outcomes, arguments.report))
    return int(any(outcome.verdict == "FAILURE" for outcome in outcomes))


def work(ids: list[str]) -> int:
    """Run calls in this process; a line for each that begins and one for each outcome."""
    from campaign import registry

    said, sys.stdout = sys.stdout, sys.stderr
    for id in ids:
        print(json.dumps([id]), file=said, flush=True)
        print(json.dumps(registry.run(id)), file=said, flush=True)
    return 0


WORKER = [sys.executable, str(HERE), "--worker"]


def isolated(ids: list[str], jobs: int, command: list[str] = WORKER) -> Iterator:
    """The outcomes from other processes: a crash is the failure of one call, and the next ones still run."""
    from campaign.engine import FAILURE, Outcome

    queues = [ids[k::jobs] for k in range(jobs)]
    running = {}
    while any(queues) or running:
        for k, queue in enumerate(queues):
            if queue and k not in running:
                running[k] = subprocess.Popen(
                    [*command, json.dumps(queue)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
        for k, process in list(running.items()):
            current = None
            for line in process.stdout:
                found = json.loads(line)
                if len(found) == 1:
                    current = found[0]
                    continue
                queues[k].remove(current)
                current = None
                yield Outcome(*found)
            code = process.wait()
            del running[k]
            if current is not None:
                queues[k].remove(current)
                why = f"the process ended with {code}"
                yield Outcome(current, "?", current, FAILURE, "crash", why)
            elif queues[k] and code:
                raise RuntimeError(f"a worker ended with {code} before it began")


def table(outcomes: list, short: bool) -> str:
    from campaign.engine import ERROR, FAILURE, RIGHT

    counts = Counter((outcome.area, outcome.verdict) for outcome in outcomes)
    areas = sorted({outcome.area for outcome in outcomes})
    rows = [["", RIGHT, ERROR, FAILURE]]
    rows += [[a, *(str(counts[a, verdict]) for verdict in rows[0][1:])] for a in areas]
    total = Counter(outcome.verdict for outcome in outcomes)
    rows.append(["all", *(str(total[verdict]) for verdict in rows[0][1:])])
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = [
        row[0].ljust(widths[0]) + "".join(c.rjust(w + 2) for c, w in zip(row[1:], widths[1:]))
        for row in rows
    ]
    failures = [outcome for outcome in outcomes if outcome.verdict == FAILURE]
    if failures and not short:
        lines = [*map(str, failures), "", *lines]
    kinds = Counter(outcome.kind for outcome in failures)
    lines += ["", *(f"{count} {kind}" for kind, count in kinds.most_common())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
