"""examples/tutorial.ipynb: the page it is made of, and a run from its first cell to its last."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
nbformat = pytest.importorskip("nbformat")


def load_script():
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notebook_is_the_tutorial():
    script = load_script()
    written = nbformat.read(script.NOTEBOOK, as_version=4)
    assert written == script.notebook(), "write it anew: python docs/notebook.py"


@pytest.mark.long(15)
def test_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    # The kernel's own way of showing plots.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = load_script().notebook()
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
