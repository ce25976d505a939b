"""Whether ranking by Alrao agrees with a search: the records of `python benchmarks ranking`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranking import Comparison
from results import read

from report.page import Section, Table, picture

COMMAND = "python benchmarks ranking"
INTRO = (
    "Networks ranked by one training with Alrao each (alrao_fast.rank), against the order that SGD at the best "
    "rate of a grid gives. Losses are validation losses on scikit-learn's digits, mean over the seeds."
)


def section(folder: Path) -> tuple[Section, list[dict[str, Any]]]:
    records = list(read(folder / "ranking.jsonl"))
    if not records:
        return Section("Ranking architectures", INTRO, missing=COMMAND), []
    comparison = Comparison(records)
    table = comparison.table()
    columns = [str(column.header) for column in table.columns]
    shown = Table(str(table.title), columns, comparison.lines())
    plot = picture(
        "ranking", "Each network's loss by Alrao and by the best SGD of the grid", comparison.plot
    )
    return Section(
        "Ranking architectures", INTRO, [shown], [plot], notes=comparison.verdict()
    ), records
