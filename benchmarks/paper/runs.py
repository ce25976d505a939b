"""Running cases: those with a record are not run again, the others go on from their checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from results import Results
from tqdm import tqdm

from paper.cases import Case
from paper.tasks import Task
from paper.training import Runtime, train

Record = dict[str, Any]
# By network, as the command names it.
Tasks = dict[str, Task]


def run(
    cases: Iterable[Case], tasks: Tasks, results: Results, runtime: Runtime
) -> dict[Case, Record]:
    """The record of every case, in the order given.

    A finished run counts wherever it was done, on another machine or by another version of the kernels: its result is
    a sample of what the method does, and its record says where it comes from.
    """
    wanted = list(dict.fromkeys(cases))
    records: dict[Case, Record] = {}
    with tqdm(total=len(wanted), unit="run", desc="runs") as runs:
        for case in wanted:
            record = results.find(case.record(), any_machine=True)
            if record is None:
                with tqdm(total=case.epochs, unit="epoch", desc=_title(case), leave=False) as bar:
                    values = train(case, tasks[case.network], runtime, bar)
                record = results.append(case.record(), **values)
                (runtime.checkpoints / f"{case.key()}.pt").unlink(missing_ok=True)
            records[case] = record
            runs.update()
    return records


def _title(case: Case) -> str:
    width = "" if case.width == 1 else f" x{case.width:g}"
    return f"{case.network}{width} {case.label()} seed {case.seed}"
