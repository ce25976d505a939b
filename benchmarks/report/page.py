"""What the page is made of, and its two forms: HTML with everything inside, and Markdown with the figures beside it."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.show import INK, Table, pyplot

# Text and lines in the figures; in the page they take its own colour, in light and in dark.
INKS = re.compile(r"#(010101|000000)\b")
STYLE: dict[str, Any] = {"svg.fonttype": "none", "legend.framealpha": 0.0}
STYLE |= {f"{part}.facecolor": "none" for part in ("figure", "axes", "savefig", "legend")}
STYLE |= {name: INK for name in ("text.color", "xtick.color", "ytick.color")}
STYLE |= {name: INK for name in ("axes.labelcolor", "axes.edgecolor")}


class Picture(NamedTuple):
    """A figure as SVG text, and what it shows in words."""

    name: str
    caption: str
    svg: str


class Section(NamedTuple):
    """One benchmark: what was found, or in `missing` the command that would find it.

    `details` are tables that are folded away at first.
    """

    title: str
    intro: str
    tables: list[Table] = []
    pictures: list[Picture] = []
    details: list[Table] = []
    notes: list[str] = []
    missing: str | None = None


def picture(name: str, caption: str, draw: Callable[[], Any]) -> Picture:
    """The figure that `draw` returns, drawn in the page's own colour on no background."""
    file = io.StringIO()
    # A fixed salt: the same results give the same page.
    with pyplot().rc_context({**STYLE, "svg.hashsalt": name}):
        figure = draw()
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
        pyplot().close(figure)
    svg = file.getvalue()
    svg = INKS.sub("currentColor", svg[svg.index("<svg") :])
    # Ids are the page's: those of one figure must not be those of another.
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'((?:xlink:)?href="#)', rf"\1{prefix}-", svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return Picture(name, caption, svg)


def html(sections: list[Section], machines: Table, made: str) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **blocks)
    template = environment.get_template("page.html.j2")
    return template.render(sections=sections, machines=machines, made=made)


def markdown(sections: list[Section], machines: Table, made: str, folder: str) -> str:
    """The same in Markdown; the figures are files in `folder`."""
    parts = ["# Alrao: what it costs, what it buys", made, machines.markdown()]
    for section in sections:
        parts += [f"## {section.title}", section.intro]
        if section.missing is not None:
            parts.append(f"Not measured: `{section.missing}`")
        parts += [table.markdown() for table in section.tables]
        parts += [f"![{p.caption}]({folder}/{p.name}.svg)\n\n{p.caption}" for p in section.pictures]
        parts += [table.markdown() for table in section.details]
        parts += section.notes
    return "\n\n".join(parts) + "\n"
