"""Results as JSON lines: written one record at a time, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Results:
    """The records of one file, one JSON object a line. What identifies a record stands under its key "case".

    Each record says where it was measured: `append` adds the caller's machine record under "machine". A last line that
    an interruption cut short is dropped when the file is read.
    """

    def __init__(self, path: Path, machine: Record) -> None:
        self.path = path
        self.machine = machine
        self._records = list(read(path))

    def find(self, case: Record, *, any_machine: bool = False) -> Record | None:
        """The latest record of this case with the same machine, versions and sources (whatever the commit), or None.

        With `any_machine`, for what does not depend on them: the latest record of this case.
        """
        for record in reversed(self._records):
            if record["case"] == case and (
                any_machine or _comparable(record["machine"]) == _comparable(self.machine)
            ):
                return record
        return None

    def append(self, case: Record, **values: Any) -> Record:
        """Write a record and flush it to the disk; values must be what JSON holds."""
        record = {"case": case, **values, "machine": self.machine}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() and not _ends_with_newline(file.fileno(), file.tell()):
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._records.append(record)
        return record


def read(path: Path) -> Iterator[Record]:
    """The complete records of a file; none where there is no file."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # cut short by an interruption


def finite(value: float, digits: int = 17) -> float | None:
    """The value as JSON holds it, to so many digits; None where it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """The items by their key, in the order in which the keys come first."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _comparable(machine: Record) -> Record:
    return {key: value for key, value in machine.items() if key != "commit"}


def _ends_with_newline(descriptor: int, size: int) -> bool:
    return os.pread(descriptor, 1, size - 1) == b"\n"
