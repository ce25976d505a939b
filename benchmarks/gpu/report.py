"""The result of `make gpu-check` as readable tables."""

from collections.abc import Iterator
from typing import Any

from benchmarks.results import Record, grouped
from benchmarks.show import Table

CLOCKS = ("graph", "gpu", "wall", "host")


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    passed = sum(step["verdict"] == "passed" for step in result["steps"])
    parts = [
        f"# {result['name']}",
        f"{machine['gpu'] or 'No GPU: a dry run, which verifies nothing'}; torch {machine['torch']}, CUDA "
        f"{machine['cuda']}, Triton {machine['triton']}, Python {machine['python']}; commit {machine['commit']}, "
        f"sources {result['source_state']}. {passed} of {len(result['steps'])} steps passed, "
        f"{result['seconds']:.0f} seconds.",
    ]
    return "\n\n".join([*parts, *(table.markdown() for table in tables(result))]) + "\n"


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """What there is: the steps, the ceilings, the errors of the ops, and the speed."""
    steps = [[s["name"], s["verdict"], f"{s['seconds']:.0f}", s["note"]] for s in result["steps"]]
    yield _table("Steps", "step, verdict, seconds, ", steps)
    ceilings = [[name, f"{value / 1e12:.3f}"] for name, value in result["ceilings"].items()]
    errors = []
    for row in result["errors"]:
        error = "none" if row["error"] is None else f"{row['error']:.1e}"
        cells = [row["op"], row["backend"], row["dtype"], str(row["cases"]), error]
        errors.append([*cells, row["complaint"] or ""])
    told = "Largest error against the float64 reference, relative to the largest entry; budgets as in the tests"
    by_kind = grouped(result["speed"], lambda record: record["case"].get("kind"))
    goals = sorted(by_kind.get("target", []), key=lambda record: record["case"]["row"])
    clocks = (
        "Medians in microseconds: by graph replay, between events, eager on the wall clock, on the host. % of the "
        "copy bandwidth and of the matrix rate"
    )
    of_candidate = (
        "case, candidate, graph, gpu, wall, host, bytes, % copy, % matrix, peak MB, error"
    )
    for title, columns, rows in (
        ("Ceilings", "ceiling, 10^12 / s", ceilings),
        (told, "op, backend, dtype, cases, error, ", errors),
        ("Figures to reach", "row, case, clock, against, ratio, target, ", map(_target, goals)),
        (clocks, of_candidate, map(_candidate, by_kind.get("candidate", []))),
    ):
        if found := list(rows):
            yield _table(title, columns, found)


def _table(title: str, columns: str, rows: list[list[str]]) -> Table:
    cleaned = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return Table(title, columns.split(", "), cleaned)


def _target(record: Record) -> list[str]:
    case = record["case"]
    verdict = {True: "met", False: "NOT met"}.get(record["met"], record.get("missing", ""))
    against = case["peer"] or "floor"
    figures = [_number(record["ratio"]), _number(record["limit"]), verdict]
    return [case["row"], _name(case), record["clock"] or case["metric"], against, *figures]


def _candidate(record: Record) -> list[str]:
    case = [_name(record["case"]), record["case"]["candidate"]]
    if "missing" in record:
        return [*case, *[""] * 8, record["missing"]]
    seconds = record.get("seconds", {})
    scaled = [
        *((seconds.get(clock, {}).get("median"), 1e6) for clock in CLOCKS),
        (record.get("bytes"), 1),
        (record.get("copy_share"), 100),
        (record.get("matrix_share"), 100),
        (record.get("peak_memory"), 1e-6),
        (record.get("error"), 1),
    ]
    return [*case, *(_number(value, unit) for value, unit in scaled)]


def _name(case: Record) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in case.get("sizes", {}).items())
    return f"{case['name']} ({case.get('dtype', '')}; {sizes})"


def _number(value: float | None, unit: float = 1) -> str:
    return "" if value is None else f"{value * unit:.4g}"
