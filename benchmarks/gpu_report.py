"""The result of `make gpu-check` as a readable table."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def markdown(result: dict[str, Any]) -> str:
    machine, ceilings = result["machine"], result["ceilings"]
    passed = sum(step["verdict"] == "passed" for step in result["steps"])
    lines = [
        f"# {result['name']}",
        "",
        f"{machine['gpu'] or 'No GPU: a dry run, which verifies nothing'}; torch {machine['torch']}, CUDA "
        f"{machine['cuda']}, Triton {machine['triton']}, Python {machine['python']}; commit {machine['commit']}, "
        f"sources {result['source_state']}. {passed} of {len(result['steps'])} steps passed, "
        f"{result['seconds']:.0f} seconds.",
        "",
        "| step | verdict | seconds | |",
        "|---|---|---|---|",
    ]
    for step in result["steps"]:
        lines.append(
            f"| {step['name']} | {step['verdict']} | {step['seconds']:.0f} | {_cell(step['note'])} |"
        )
    if ceilings:
        lines += ["", "| ceiling | 10^12 / s |", "|---|---|"]
        lines += [f"| {name} | {value / 1e12:.3f} |" for name, value in ceilings.items()]
    if result["errors"]:
        lines += [
            "",
            "Largest error against the float64 reference, relative to the largest entry; budgets as in the tests.",
            "",
            "| op | backend | dtype | cases | error | |",
            "|---|---|---|---|---|---|",
        ]
        for row in result["errors"]:
            error = "none" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(
                f"| {row['op']} | {row['backend']} | {row['dtype']} | {row['cases']} | {error} | "
                f"{_cell(row['complaint'] or '')} |"
            )
    lines += _speed(result["speed"])
    return "\n".join(lines) + "\n"


def _speed(records: list[Record]) -> list[str]:
    """The figures to reach, then every candidate of every case."""
    kinds: dict[str, list[Record]] = {"target": [], "candidate": []}
    for record in records:
        kinds.get(record["case"].get("kind"), []).append(record)
    lines = []
    if kinds["target"]:
        lines += [
            "",
            "| row | case | clock | against | ratio | target | |",
            "|---|---|---|---|---|---|---|",
        ]
    for record in sorted(kinds["target"], key=lambda r: r["case"]["row"]):
        case = record["case"]
        verdict = {True: "met", False: "NOT met"}.get(record["met"], record.get("missing", ""))
        cells = [
            case["row"],
            _name(case),
            record["clock"] or case["metric"],
            case["peer"] or "floor",
        ]
        cells += [_number(record["ratio"]), _number(record["limit"]), verdict]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    if kinds["candidate"]:
        lines += [
            "",
            "Medians in microseconds: by graph replay, between events, eager on the wall clock, on the host. % of the "
            "copy bandwidth and of the matrix rate.",
            "",
            "| case | candidate | graph | gpu | wall | host | bytes | % copy | % matrix | peak MB | error |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    for record in kinds["candidate"]:
        case = record["case"]
        cells = [_name(case), case["candidate"]]
        if "missing" in record:
            cells += ["", "", "", "", "", "", "", "", record["missing"]]
        else:
            seconds = record.get("seconds", {})
            medians = [seconds.get(clock, {}).get("median") for clock in CLOCKS]
            cells += [_number(None if m is None else m * 1e6) for m in medians]
            shares = [record.get("copy_share"), record.get("matrix_share")]
            cells += [_number(record.get("bytes"))]
            cells += [_number(None if s is None else 100 * s) for s in shares]
            peak = record.get("peak_memory")
            cells += [_number(None if peak is None else peak / 1e6), _number(record.get("error"))]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


CLOCKS = ("graph", "gpu", "wall", "host")


def _name(case: Record) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in case.get("sizes", {}).items())
    return f"{case['name']} ({case.get('dtype', '')}; {sizes})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
