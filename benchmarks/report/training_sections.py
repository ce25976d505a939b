"""What Alrao buys: the records of `python benchmarks quality`, and of `ranking`, which orders networks by it."""

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiments.demo import posterior_plot
from benchmarks.experiments.quality import plots
from benchmarks.experiments.quality.summary import Summary, all_tables, ran, summarise
from benchmarks.experiments.ranking import Comparison
from benchmarks.report.page import Picture, Section, picture
from benchmarks.results import read

QUALITY = "python benchmarks quality --quick"
QUALITY_INTRO = (
    "Alrao without tuning against SGD over a grid of learning rates, Adam, tuned AdamW, and methods that promise "
    "to need no learning rate. Figures are those of the last epoch on the test set, mean and standard deviation "
    "over the seeds; rates are chosen on the validation set; runs, steps and seconds are what one seed costs, the"
    " whole grid included."
)


def quality(folder: Path) -> tuple[Section, list[dict[str, Any]]]:
    """The section, and the records that it is made from. Of a task's full and quick runs the full ones are shown."""
    files = sorted(folder.glob("*.jsonl"))
    full = {file.stem for file in files}
    hidden = {f"{stem}-quick" for stem in full}
    records = [record for file in files if file.stem not in hidden for record in read(file)]
    if not any("curves" in record for record in records):
        return Section("Quality", QUALITY_INTRO, missing=QUALITY), []
    summary = summarise(records)
    found = list(all_tables(summary))
    pictures = [shown for task in summary for shown in pictures_of(task, summary)]
    used = [run for cells in summary.values() for own in ran(cells).values() for run in own.all]
    return Section("Quality", QUALITY_INTRO, found[:-1], pictures, found[-1:]), used


def pictures_of(task: str, summary: Summary) -> list[Picture]:
    """Final losses, learning curves, and the posterior of Alrao's first run."""
    cells = summary[task]
    if not ran(cells):
        return []
    captions = {
        "final": f"{task}: final test loss, a dot for each seed, best method on top",
        "curves": f"{task}: test loss by epoch, first seed, each method at its best rate",
    }
    found = [
        picture(f"quality-{task}-{name}", captions[name], partial(draw, task, cells))
        for name, draw in plots.PLOTS.items()
    ]
    own = ran(cells).get("alrao")
    if own is not None:
        run = own.best[0]
        draw = partial(posterior_plot, run["curves"]["posterior"], run["clone_rates"])
        caption = f"{task}: which clone's learning rate the switch trusts, by epoch"
        found.append(picture(f"quality-{task}-posterior", caption, draw))
    return found


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
