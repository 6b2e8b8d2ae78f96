"""The stored notebooks are fit to read, and what makes them so can tell."""

from pathlib import Path

import nbformat
import pytest
from checkout import ROOT
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from refkl_lib.view.saved import WIDGET_VIEW
from tools.notebooks import CELL_LINES, METADATA, faults, main, run, stored

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_stored_notebook_has_no_fault(path):
    assert list(faults(nbformat.read(path, as_version=4), path)) == []


SMALL = Path("small.ipynb")


def notebook(source="# NBVAL_CHECK_OUTPUT\n1 + 1", output=None, count=1, **metadata):
    outputs = [output or new_output("execute_result", {"text/plain": "2"}, execution_count=1)]
    cell = new_code_cell(source, execution_count=count, outputs=outputs)
    return new_notebook(cells=[new_markdown_cell("# Small"), cell], metadata={**METADATA, **metadata})


def test_a_good_notebook_has_no_fault():
    assert list(faults(notebook(), SMALL)) == []


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (
            notebook(widgets={"application/vnd.jupyter.widget-state+json": {}}),
            "`make notebooks` would remove",
        ),
        (notebook(output=new_output("display_data", {WIDGET_VIEW: {}, "text/html": ""})), "would remove"),
        (notebook(kernelspec={"name": "my-env", "display_name": "Mine"}), "would remove"),
        (notebook(count=None), "not run once each, from top to bottom"),
        (notebook(count=2), "not run once each, from top to bottom"),
        (notebook("1 + 1"), "none of its outputs is checked"),
        (notebook("# NBVAL_CHECK_OUTPUT\n" + "1\n" * CELL_LINES), "more than the 12"),
        (notebook(output=new_output("error", ename="E", evalue="", traceback=[])), "ended with an exception"),
        (notebook(output=new_output("stream", name="stderr", text="Warning")), "wrote to stderr"),
        (notebook(output=new_output("stream", text="/home/ada/kit/x.py")), "a path of the machine"),
        (notebook(output=new_output("display_data", {"text/html": f"in {ROOT}/x"})), "a path of the machine"),
        (notebook(output=new_output("display_data", {"image/png": ""})), "a picture without an alt text"),
    ],
)
def test_a_fault_is_named(bad, fault):
    [found] = faults(bad, SMALL)
    assert fault in found


def saved(folder, *sources):
    path = folder / "small.ipynb"
    cells = [new_markdown_cell("# Small"), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


FACE = f"""
class Panel:
    def _repr_mimebundle_(self, **_):
        return {{{WIDGET_VIEW!r}: {{}}, "text/html": "<img alt='a panel'>", "text/plain": "a panel"}}
Panel()
"""


def test_a_run_keeps_numbers_and_pictures_and_no_widgets(tmp_path):
    result = run(saved(tmp_path, "import os; os.getcwd()", FACE, "# NBVAL_CHECK_OUTPUT\n6 * 7"))
    here, panel, number = [cell.outputs[0].data for cell in result.cells[1:]]
    assert here["text/plain"] == repr(str(tmp_path))
    assert panel == {"text/html": "<img alt='a panel'>", "text/plain": "a panel"}
    assert number["text/plain"] == "42"
    assert list(faults(result, SMALL)) == []


def test_running_twice_stores_the_same(tmp_path):
    path = saved(tmp_path, "# NBVAL_CHECK_OUTPUT\nprint('a')\nprint('b')")
    first = run(path)
    nbformat.write(first, path)
    assert run(path) == first


def test_a_cell_that_raises_stops_the_run(tmp_path):
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(saved(tmp_path, "1 / 0"))


def test_a_notebook_whose_run_fails_is_left_as_it_was(tmp_path):
    path = saved(tmp_path, "1 / 0")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError):
        main([str(path)])
    assert path.read_bytes() == before


def test_check_says_which_notebook_has_which_fault(tmp_path, capsys):
    path = saved(tmp_path, "# NBVAL_CHECK_OUTPUT\n6 * 7")
    assert main(["--check", str(path)]) == 1
    assert f"{path}: its cells were not run once each" in capsys.readouterr().err
    assert main([str(path)]) == 0
    assert main(["--check", str(path)]) == 0


def test_a_widget_without_a_picture_is_refused(tmp_path):
    bare = FACE.replace('"text/html": "<img alt=\'a panel\'>", ', "")
    with pytest.raises(ValueError, match=r"In \[2\] shows a widget that has no picture"):
        run(saved(tmp_path, "1", bare))


def test_notes_of_the_editor_are_not_stored():
    edited = notebook()
    edited.cells[1].metadata.update(collapsed=True, execution={"iopub.status.busy": "now"}, tags=["hide-input"])
    assert stored(edited).cells[1].metadata == {"tags": ["hide-input"]}
