"""Protects docs/recipes/clipping.md: its blocks run in order, as a reader would run them."""

import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

import alrao_fast as alrao

TEXT = Path(__file__).resolve().parent.parent.joinpath("docs/recipes/clipping.md").read_text()
SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
BLOCKS = {
    section.splitlines()[0]: re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    for section in SECTIONS
}
NEEDS = {
    "Lightning": "lightning",
    "Hugging Face Trainer": "transformers",
    "Accelerate": "accelerate",
}


def test_every_section_has_code():
    assert all(BLOCKS.values())
    assert set(NEEDS) < set(BLOCKS)


@pytest.mark.parametrize("section", [name for name in BLOCKS if name != "In a loop"])
def test_section_runs(section, tmp_path, monkeypatch):
    needed = NEEDS.get(section)
    if needed and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    monkeypatch.chdir(tmp_path)
    scope, calls, clip = {}, [], alrao.clip_grad_norm_

    def counted(*arguments, **options):
        calls.append(clip(*arguments, **options))
        return calls[-1]

    monkeypatch.setattr(alrao, "clip_grad_norm_", counted)
    with warnings.catch_warnings():
        # Of the other packages: about workers, logging and dependencies of their own.
        warnings.simplefilter("ignore")
        for block in [*BLOCKS["In a loop"], *BLOCKS[section]]:
            exec(compile(block, section, "exec"), scope)
    # That of the loop, and at least one of its own.
    assert len(calls) > 1 and all(norm > 0 for norm in calls)
