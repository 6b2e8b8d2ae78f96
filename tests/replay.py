"""A notebook that JupyterLab ran among these tests is not run again: nbval hears what its kernel said there.

So `make test` runs each notebook once, in the browser, and each cell's output is still compared by nbval. Where no
browser ran it (none is installed, or only notebooks are asked for), nbval starts a kernel and runs it as ever.
"""

import os
import pickle
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbval.plugin import IPyNbFile

CLAIMS_FIGURES = "claims.pickle"  # what notebook 08 measured, by claim
COPIES = "copies.pickle"  # what became of the copies that notebook 08 made on ranks
THREE_RUNS = "three_runs.pickle"  # of notebook 00: the job of ranks, and each strategy's run


def ran() -> Path:
    """The folder of what notebooks put out that were run; all workers share it."""
    return Path(os.environ["REFKL_RAN"])


def keep(file: Path) -> None:
    """Keep what a run of a notebook left in this file; whoever looks meanwhile finds all of it or nothing."""
    partly = ran() / f"{file.name}.part"
    shutil.copy(file, partly)
    partly.rename(ran() / file.name)


def kept(name: str) -> Any:
    """Return what a notebook measured in the browser and kept under a name; None if it did not run there."""
    file = ran() / name
    return pickle.loads(file.read_bytes()) if file.exists() else None


def set_up(file: IPyNbFile) -> None:
    """Set up the tests of a notebook: with what its kernel said, or else as nbval does."""
    if (ran() / file.path.name).exists():
        file.kernel = Replay(nbformat.read(ran() / file.path.name, as_version=4))
        file.setup_sanitize_files()
    else:
        IPyNbFile.setup(file)


class Replay:
    """Stands in for nbval's kernel: asked to execute a cell, it says what was put out when that cell was run."""

    def __init__(self, notebook: NotebookNode) -> None:
        self._cells = {cell.source: cell for cell in notebook.cells if cell.cell_type == "code"}
        self._messages: deque[dict[str, Any]] = deque()

    def execute_cell_input(self, source: str, allow_stdin: bool) -> str:
        if source not in self._cells:
            raise KeyError(f"JupyterLab ran another version of the notebook, without this cell:\n{source}")
        cell = self._cells[source]
        if cell.execution_count is None:
            why = "a cell above ended the run"
            outputs = [nbformat.v4.new_output("error", ename="NotRun", evalue=why, traceback=[f"not run: {why}"])]
        else:
            outputs = cell.outputs
        for output in outputs:
            self._say(cell.id, output.output_type, output)
        self._say(cell.id, "status", {"execution_state": "idle"})
        return cell.id

    def _say(self, cell: str, kind: str, content: dict[str, Any]) -> None:
        self._messages.append({"parent_header": {"msg_id": cell}, "msg_type": kind, "content": content})

    def get_message(self, stream: str, timeout: float | None = None) -> dict[str, Any]:
        return self._messages.popleft()

    def await_reply(self, cell: str, timeout: float) -> None:
        """Return at once: all has been said."""

    def await_idle(self, cell: str, timeout: float) -> None:
        self._messages.clear()

    def is_alive(self) -> bool:
        return True

    def stop(self) -> None:
        """Stop nothing; nbval asks for it at the end."""
