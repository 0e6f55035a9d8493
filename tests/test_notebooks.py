"""Every notebook runs from top to bottom, and is kept without what it printed."""

import os
import pathlib
import sys

import pytest

LONG = ("01_first_run", "04_hugging_face_parity", "06_read_an_ablation")  # run under `-m slow`
NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat", reason="the extra `test` is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra `test` is not installed")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_without_outputs_and_says_what_it_needs(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    for cell in book.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    needs = any("import torch" in cell.source for cell in book.cells)
    assert ("`pip install -e '.[notebooks,test]'`" in book.cells[0].source) is needs


@pytest.mark.filterwarnings("ignore")  # of the kernel's libraries
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in NOTEBOOKS], ids=lambda path: path.stem
)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(tmp_path / "cache"))
    book = nbformat.read(path, 4)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    assert any(
        output.output_type == "display_data" or "image/png" in output.get("data", {}) for c in book.cells for output in c.get("outputs", [])
    )
