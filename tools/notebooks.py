"""Run the notebooks and keep them fit for git.

    python -m tools.notebooks notebooks/*.ipynb            run each and store what it printed and drew
    python -m tools.notebooks --check notebooks/*.ipynb    run nothing, say what is wrong with them

A stored notebook has been run from top to bottom in a fresh kernel. It holds pictures and text, never the
state of a widget: that needs a kernel, and without one a reader sees an error where a picture could be.
"""

import argparse
import copy
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode

from refkl_lib.view.saved import is_bare_widget, keep_faces
from tools.lint import code_cells, course_faults

ROOT = Path(__file__).resolve().parents[1]
CELL_SECONDS = 240
CELL_LINES = 12
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
HOME = re.compile(r"/(?:home|root|Users)/\w|[A-Z]:\\Users\\|" + re.escape(f"{ROOT}/"))
CHECKED = re.compile(r"^\s*#\s*NBVAL_CHECK_OUTPUT\s*$", re.MULTILINE)


def run(path: Path) -> NotebookNode:
    """Return the notebook as `stored` after a run in a fresh kernel, in the notebook's folder.

    Raises CellExecutionError or CellTimeoutError if a cell fails, ValueError if a cell shows a bare widget.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name=METADATA["kernelspec"]["name"],
        resources={"metadata": {"path": str(path.resolve().parent)}},
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,
    )
    with tempfile.TemporaryDirectory() as nobodys:
        client.execute(env=os.environ | {"REFKL_DATA": nobodys})  # what it predicts is not the reader's progress
    for number, cell in enumerate(code_cells(notebook), 1):
        if any(is_bare_widget(output.get("data", {})) for output in cell.outputs):
            raise ValueError(
                f"In [{number}] shows a widget that has no picture for readers without a kernel; "
                "give the object an image/png or text/html beside its widget view"
            )
    return stored(notebook)


def stored(notebook: NotebookNode) -> NotebookNode:
    """Return a copy without what only a running kernel can use and what differs from one run to the next."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    keep_faces(notebook)
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)  # the first to give cells an id
    for number, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{number}")
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
        for output in cell.get("outputs", []):
            if "text" in output:  # a command that was run can be pasted into a shell in the project's folder
                output.text = output.text.replace(f"{ROOT}/", "")
    return notebook


def faults(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """Yield, a sentence each, what is wrong with a notebook that is stored at `path`."""
    cells = code_cells(notebook)
    if stored(notebook) != notebook:
        yield "it holds widgets or metadata that `make notebooks` would remove"
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        yield "its cells were not run once each, from top to bottom"
    if not any(is_checked(cell) for cell in cells):
        yield "none of its outputs is checked: mark those that prove something with NBVAL_CHECK_OUTPUT"
    for number, cell in enumerate(cells, 1):
        yield from (f"In [{number}] {fault}" for fault in cell_faults(cell))
    yield from course_faults(notebook, path)


def cell_faults(cell: NotebookNode) -> Iterator[str]:
    """Yield what is wrong with one code cell and its outputs."""
    lines = sum(bool(line.strip()) for line in cell.source.splitlines())
    if lines > CELL_LINES:
        yield f"has {lines} lines, more than the {CELL_LINES} that one idea needs"
    if any(output.output_type == "error" for output in cell.outputs):
        yield "ended with an exception"
    if any(output.get("name") == "stderr" for output in cell.outputs):
        yield "wrote to stderr: a warning that the reader can do nothing about"
    if found := HOME.search("\n".join(texts(cell))):
        yield f"shows a path of the machine it was run on: {found.group()}"


def texts(cell: NotebookNode) -> Iterator[str]:
    """Yield what a code cell's outputs say, without pictures."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (str(value) for kind, value in output.get("data", {}).items() if "image/" not in kind)


def is_checked(cell: NotebookNode) -> bool:
    """Tell whether nbval compares this cell's output (its lax mode checks marked cells only)."""
    return "nbval-check-output" in cell.metadata.get("tags", []) or bool(CHECKED.search(cell.source))


def main(arguments: list[str]) -> int:
    """Run or check the notebooks named on the command line; return 1 if anything is wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="run nothing, only look")
    options = parser.parse_args(arguments)
    found = []
    for path in options.notebooks:
        if not options.check:
            nbformat.write(run(path), path)
        found += [f"{path}: {fault}" for fault in faults(nbformat.read(path, as_version=4), path)]
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (CellExecutionError, CellTimeoutError, ValueError, OSError) as error:
        sys.exit(f"nothing was stored: {error}")
