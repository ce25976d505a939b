"""The tutorial as a notebook: `python docs/notebook.py` writes examples/tutorial.ipynb from docs/tutorial.md.

The page is the source. Text becomes cells of Markdown, Python becomes cells of code; links to other pages become their
words, since a notebook travels alone.
"""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "examples" / "tutorial.ipynb"
FENCE = re.compile(r"^```python\n(.*?)\n```\n", re.MULTILINE | re.DOTALL)
PAGE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:)[^)]*\)")


def cells(page: str) -> list[nbformat.NotebookNode]:
    """Text and code in turn. Pictures of the page are left out: the notebook draws them itself."""
    made = []
    for number, part in enumerate(FENCE.split(page)):
        if number % 2:
            made.append(nbformat.v4.new_code_cell(part))
        else:
            text = PAGE_LINK.sub(lambda link: "" if link[1] else link[2], part).strip()
            if text:
                made.append(nbformat.v4.new_markdown_cell(text))
    for number, cell in enumerate(made):
        # Random by default, which would change the file each time it is written.
        cell["id"] = f"cell-{number}"
    return made


def notebook() -> nbformat.NotebookNode:
    """The notebook, without outputs."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(
        cells=cells(PAGE.read_text()),
        metadata={"kernelspec": kernel, "language_info": {"name": "python"}},
    )


if __name__ == "__main__":
    nbformat.write(notebook(), NOTEBOOK)
