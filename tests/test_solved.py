"""Each notebook, solved: every exercise takes its solution where the notebook asks for it, every prediction a number.

What the exercises do not need is left out, so that a notebook takes seconds.
"""

import ast
from collections.abc import Iterator

import nbformat
from checkout import ROOT
from nbclient import NotebookClient
from nbformat import NotebookNode
from solved import cells, solve

from refkl_lib.lessons import course
from tools.lint import Call, calls, code_cells, is_import, trees
from tools.notebooks import texts

NOTEBOOKS = {path.name: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def ids(function: str) -> list[str]:
    return [call.id for notebook in NOTEBOOKS.values() for call in calls(notebook, function)]


def test_the_notebooks_ask_for_every_exercise_and_prediction_of_the_course():
    assert ids("check") == list(course.exercises())
    assert ids("predict") == list(course.PREDICTIONS)


def with_number(call: Call, value: float) -> str:
    """The source of a call with a number in place of the dots, or of what was measured."""
    name, _, *unit = call.node.args
    return ast.unparse(ast.Call(call.node.func, [name, ast.Constant(value), *unit], call.node.keywords))


def solved(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    """The cells that predictions and exercises need, each with what it must say."""
    yield "\n".join(ast.unparse(node) for _, tree in trees(notebook) for node in tree.body if is_import(node)), ""
    for cell in code_cells(notebook):
        one = cells(cell.source)
        for call in calls(one, "predict"):
            yield with_number(call, 2), f"{call.id}: your guess is 2."
        for call in calls(one, "reveal"):
            yield with_number(call, 3), "measured / guess  1.50"
        for call in calls(one, "check"):
            yield solve(cell.source), f"{call.id}: solved."


def test_the_notebooks_take_their_solutions(tmp_path, monkeypatch):
    """One after the other in one kernel, emptied in between."""
    monkeypatch.setenv("REFKL_DATA", str(tmp_path))
    asked = [("%reset -f", "")]
    for notebook in NOTEBOOKS.values():
        asked += [*solved(notebook), asked[0]]
    sources, wanted = zip(*asked, strict=True)
    run = cells(*sources)
    NotebookClient(run, kernel_name="python3", timeout=60).execute()
    for cell, want in zip(run.cells, wanted, strict=True):
        assert want in "".join(texts(cell))
