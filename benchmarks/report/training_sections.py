"""What Alrao buys: the records of `python benchmarks quality`, and of `ranking`, which orders networks by it."""

from pathlib import Path
from typing import Any

from benchmarks.experiments.quality import plots
from benchmarks.experiments.quality.summary import stopped_early, summarise
from benchmarks.experiments.quality.tables import detail_tables, main_tables
from benchmarks.experiments.ranking import Comparison
from benchmarks.report.page import Section, picture
from benchmarks.results import read

QUALITY = "python benchmarks quality --quick"
QUALITY_INTRO = (
    "Alrao and methods that promise to need no tuning, each at one fixed setting, on small tasks of different kinds, "
    "against the best of grids of SGD and AdamW. Losses are those of the test set after the last step; the grids' "
    "rates are chosen on validation data; all methods of a seed start alike and see the same data."
)


def quality(folder: Path) -> tuple[Section, list[dict[str, Any]]]:
    """The section, and the records that it is made from: those of the quick runs where there are no others."""
    files = (folder / f"{stem}.jsonl" for stem in ("quality", "quick"))
    records = next((found for file in files if (found := list(read(file)))), [])
    summary = summarise(records)
    if not summary:
        return Section("Quality", QUALITY_INTRO, missing=QUALITY), []
    pictures = [
        picture(f"quality-{name}", caption, draw)
        for name, (caption, draw) in plots.plots(summary).items()
    ]
    used = [run for cells in summary.values() for own in cells.values() for run in own.all]
    missing = [record for record in records if "missing" in record]
    stopped = summarise(stopped_early(records))
    shown = list(main_tables(summary, stopped))
    details = list(detail_tables(summary, stopped, missing))
    return Section("Quality", QUALITY_INTRO, shown, pictures, details), used


RANKING = "python benchmarks ranking"
RANKING_INTRO = (
    "Networks ranked by one training with Alrao each (alrao_fast.rank), against the order that SGD at the best "
    "rate of a grid gives. Losses are validation losses on scikit-learn's digits, mean over the seeds."
)


def ranking(folder: Path) -> tuple[Section, list[dict[str, Any]]]:
    records = list(read(folder / "ranking.jsonl"))
    if not records:
        return Section("Ranking architectures", RANKING_INTRO, missing=RANKING), []
    comparison = Comparison(records)
    caption = "Each network's loss by Alrao and by the best SGD of the grid"
    plots = [picture("ranking", caption, comparison.plot)]
    notes = comparison.verdict()
    return Section(
        "Ranking architectures", RANKING_INTRO, [comparison.table()], plots, notes=notes
    ), records
