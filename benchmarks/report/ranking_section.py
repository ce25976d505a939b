"""Whether ranking by Alrao agrees with a search: the records of `python benchmarks ranking`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.experiments.ranking import Comparison
from benchmarks.report.page import Section, picture
from benchmarks.results import read

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
    caption = "Each network's loss by Alrao and by the best SGD of the grid"
    plots = [picture("ranking", caption, comparison.plot)]
    notes = comparison.verdict()
    return Section(
        "Ranking architectures", INTRO, [comparison.table()], plots, notes=notes
    ), records
