"""What is shown: tables of text cells, for the terminal, Markdown and the report's page; what all plots share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# Imported where it is used, as matplotlib is: a GPU is checked without them too.
if TYPE_CHECKING:
    from rich.table import Table as RichTable

# Not quite black: an SVG file leaves out the colour of what is black, and then nothing can change it.
INK = "#010101"


class Table(NamedTuple):
    """Cells are text; the first column stands left, the others right."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(
        self, *, words: int = 1, whole: bool = False, bold: str | None = None, plain: bool = False
    ) -> RichTable:
        """For the terminal: the first `words` columns stand left; the row that begins with `bold` stands out.

        In a narrow terminal `whole` numbers do not wrap, the words do. A `plain` one is drawn as Markdown.
        """
        from rich.box import HEAVY_HEAD, MARKDOWN
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, box=MARKDOWN if plain else HEAVY_HEAD)
        folded = "fold" if whole else "ellipsis"
        for k, column in enumerate(self.columns):
            justify = "left" if k < words else "right"
            table.add_column(column, justify=justify, no_wrap=whole and k >= words, overflow=folded)
        for row in self.rows:
            table.add_row(*row, style="bold" if row[0] == bold else None)
        return table

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        lines.insert(1, rule)
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(table: RichTable, path: Path) -> None:
    """A rich table as text."""
    from rich.console import Console

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        Console(file=file, width=160).print(table)


def pyplot() -> Any:
    """matplotlib's pyplot without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path, dpi: int = 130) -> Path:
    """Write a figure as a PNG and let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    pyplot().close(figure)
    return path


def legend_beside(axes: Any, *entries: Any, x: float = 1.0, **options: Any) -> None:
    """Right of the axes, where it hides nothing."""
    axes.legend(*entries, loc="center left", bbox_to_anchor=(x, 0.5), **options)
