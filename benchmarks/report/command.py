"""The command line of `python benchmarks report`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from benchmarks.report import paper_section, speed_section, training_sections
from benchmarks.report.page import Section, html, markdown
from benchmarks.show import Table

Make = Callable[[Path], tuple[Section, list[dict[str, Any]]]]
# The folder of a command's results -> its section.
SECTIONS: dict[str, Make] = {
    "speed": speed_section.section,
    "quality": training_sections.quality,
    "ranking": training_sections.ranking,
    "paper": paper_section.section,
}
FIELDS = ("cpu", "gpu", "cores", "threads", "torch", "cuda", "python", "sources", "commit")


DESCRIPTION = """One page, without links to anything outside, from the files that speed, quality, ranking and paper
wrote under RESULTS. What was not run says so, with its command."""


def machines_table(records: dict[str, list[dict[str, Any]]]) -> Table:
    """What was measured where: a row for each section and machine."""
    rows = []
    for name, own in records.items():
        seen = {tuple(str(record["machine"].get(field)) for field in FIELDS) for record in own}
        rows += [[name, *(value.replace("None", "-") for value in line)] for line in sorted(seen)]
    return Table("Measured on", ["", *FIELDS], rows)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks report", description=DESCRIPTION)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--output", type=Path, help="default: RESULTS/report")
    options = parser.parse_args(arguments)
    output = options.output or options.results / "report"
    sections, records = [], {}
    for name, make in SECTIONS.items():
        section, records[name] = make(options.results / name)
        sections.append(section)
    if not any(records.values()):
        missing = f"no results under {options.results}; `make bench` makes some"
        parser.exit(2, f"{parser.prog}: {missing}\n")
    here = machine.describe()
    made = (
        f"Made by python benchmarks report at commit {here['commit'] or 'unknown'}, sources {here['sources']}. "
        "Times of one table were taken side by side; on a shared machine only their ratios mean anything."
    )
    machines = machines_table(records)
    figures = output / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for picture in section.pictures:
            (figures / f"{picture.name}.svg").write_text(picture.svg)
    page, text = output / "report.html", output / "report.md"
    page.write_text(html(sections, machines, made))
    text.write_text(markdown(sections, machines, made, figures.name))
    Console().print(f"report: {page}, {text}", highlight=False)
