"""What the documentation says: its code runs, its links lead somewhere, every public name has a docstring and a place.

Protects against pages that were true once. The site itself is built as `make docs` does.
"""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import alrao_fast

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# The code of one needs the authors' scripts beside it (tests/test_compat_scripts.py runs them), or says what is wrong;
# that of the other needs several packages, section by section (tests/test_recipe_clipping.py).
NOT_RUN = {"migration.md", "clipping.md"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(page: Path) -> str:
    """The page's Python, each line where it stands on the page."""
    text = page.read_text()
    lines = [""] * (text.count("\n") + 1)
    for match in FENCE.finditer(text):
        start = text[: match.start(1)].count("\n")
        for k, line in enumerate(match.group(1).splitlines()):
            lines[start + k] = line
    return "\n".join(lines)


RUNNABLE = [page for page in PAGES if code(page).strip() and page.name not in NOT_RUN]


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    source = code(page)
    for package in re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE):
        pytest.importorskip(package)
    # Plots are drawn, not shown.
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Of the packages used beside ours.
        warnings.simplefilter("ignore")
        exec(compile(source, str(page), "exec"), {"__name__": "__main__"})
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for target, anchor in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target) if target else page
        if not path.exists():
            broken.append(target)
        elif anchor and path.suffix == ".md" and anchor[1:] not in anchors(path):
            broken.append(target + anchor)
    assert not broken


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    pages = [page for page in PAGES if "results" not in page.parts]
    assert [name(p) for p in pages if str(p.relative_to(ROOT / "docs")) not in listed] == []


def public_objects():
    yield from ((f"alrao_fast.{n}", getattr(alrao_fast, n)) for n in alrao_fast.__all__)
    functional = alrao_fast.functional
    yield from ((f"alrao_fast.functional.{n}", getattr(functional, n)) for n in functional.__all__)


def test_every_public_name_is_documented():
    reference = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    without, unlisted = [], []
    for full_name, value in public_objects():
        if not inspect.getdoc(value):
            without.append(full_name)
        if inspect.isclass(value):
            without += [
                f"{full_name}.{n}"
                for n, member in vars(value).items()
                if n[0] != "_"
                and inspect.isfunction(member)
                and not inspect.getdoc(getattr(value, n))
            ]
        if not full_name.startswith("alrao_fast.functional.") and full_name not in reference:
            unlisted.append(full_name)
    assert not without
    assert not unlisted


def test_every_module_says_what_it_is():
    modules = [
        module.name
        for module in pkgutil.walk_packages(alrao_fast.__path__, "alrao_fast.")
        if not module.name.startswith(
            ("alrao_fast.kernels", "alrao_fast._C", "alrao_fast.integrations")
        )
        and not module.name.endswith("__main__")
    ]
    assert [m for m in modules if not importlib.import_module(m).__doc__] == []


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "api" / "modules" / "index.html").exists()
