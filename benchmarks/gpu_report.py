"""The result of `make gpu-check` as a readable table."""

from __future__ import annotations

from typing import Any

# Of a record of the speed benchmark, what its table does not repeat.
_IDENTITY = ("case", "machine")


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


def _speed(records: list[dict[str, Any]]) -> list[str]:
    """One table of all records: what identifies them, then every value that any of them has."""
    if not records:
        return []
    values = list(dict.fromkeys(k for r in records for k in r if k not in _IDENTITY))
    lines = ["", f"| case | {' | '.join(values)} |", f"|{'---|' * (len(values) + 1)}"]
    for record in records:
        case = record["case"]
        text = ", ".join(_text(v) for v in case.values()) if isinstance(case, dict) else str(case)
        lines.append(
            f"| {_cell(text)} | {' | '.join(_cell(_text(record.get(v, ''))) for v in values)} |"
        )
    return lines


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(own)}" for key, own in value.items())
    if isinstance(value, list):
        return ", ".join(_text(own) for own in value)
    return str(value)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
