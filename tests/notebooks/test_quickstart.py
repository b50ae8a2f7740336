"""The notebook runs from its first cell to its last, in shortened form."""

import os
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after its run, without the cell that installs."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    folder = tmp_path_factory.mktemp("notebook")
    book = nbformat.read(NOTEBOOK, as_version=4)
    book.cells = [c for c in book.cells if "install" not in c.metadata.get("tags", ())]
    environment = {
        **os.environ,
        "TOKJAX_NOTEBOOK_SHORT": "1",
        "TOKJAX_NOTEBOOK_DIR": str(folder),
        "JAX_PLATFORMS": "cpu",
    }
    client = nbclient.NotebookClient(book, timeout=600, kernel_name="python3")
    client.execute(cwd=str(folder), env=environment)
    return book


def text_of(cell) -> str:
    """What a cell shows: its streams and the plain text of its results."""
    shown = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
    return "".join(shown)


def test_every_cell_runs_and_shows_what_it_says(executed):
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    shown = "".join(map(text_of, cells))
    assert re.search(r"sample \| 'def __init__\(self' -> ", shown)
    assert re.search(r" dola \| 'Return the number of' -> ", shown)
    assert "nll" in shown
    html = [
        out["data"]["text/html"]
        for cell in cells
        for out in cell.outputs
        if "text/html" in out.get("data", {})
    ]
    assert any("<style>" in page and "<span" in page for page in html), "the heat map"
    assert all(out.output_type != "error" for cell in cells for out in cell.outputs)


def test_the_notebook_is_kept_without_results():
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "install" in code[0].metadata["tags"]
