"""What JupyterLab's kernel put out is compared by nbval as what its own kernel puts out would be."""

import os
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import nbformat
import pytest
from checkout import ROOT
from nbformat.v4 import new_code_cell, new_notebook, new_output

SOURCES = ["# NBVAL_CHECK_OUTPUT\nprint(6 * 7)", "# NBVAL_CHECK_OUTPUT\n6 * 7", "import random\nrandom.random()"]
PRINTED, RESULT, ANY = (
    new_output("stream", text="42\n"),
    new_output("execute_result", {"text/plain": "42"}, execution_count=2),
    new_output("stream", text="anything"),
)
ERROR = new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
PICTURE = new_output("display_data", {"image/svg+xml": "42"})


def notebook(outputs, sources=SOURCES):
    """Return a notebook whose cells had these outputs; those without were not run."""
    pairs = zip(sources, outputs, strict=True)
    cells = [new_code_cell(s, outputs=[out] if out else [], execution_count=1 if out else None) for s, out in pairs]
    return new_notebook(cells=cells)


RUNS = {
    "same": notebook([PRINTED, RESULT, ANY]),
    "other": notebook([new_output("stream", text="43\n"), RESULT, ANY]),
    "kind": notebook([PRINTED, PICTURE, ANY]),
    "raised": notebook([PRINTED, ERROR, None]),
    "edited": notebook([PRINTED, RESULT, ANY], [*SOURCES[:2], "1"]),
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """By notebook, what nbval said of each cell: None if it passed."""
    folder = tmp_path_factory.mktemp("nbval")
    (folder / "ran").mkdir()
    for name in ("conftest.py", "replay.py"):
        shutil.copy(ROOT / "tests" / name, folder)
    for name in (*RUNS, "not_run"):
        nbformat.write(notebook([PRINTED, RESULT, ANY]), folder / f"{name}.ipynb")
    for name, run in RUNS.items():
        nbformat.write(run, folder / "ran" / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir=.", "--junitxml=said.xml"]
    options = ["--nbval-lax", "--nbval-current-env", *(f"{name}.ipynb" for name in (*RUNS, "not_run"))]
    # As a worker: only who starts a run makes the folder.
    worker = {"PYTEST_XDIST_WORKER": "gw0", "PYTEST_XDIST_WORKER_COUNT": "2", "REFKL_RAN": str(folder / "ran")}
    subprocess.run([*command, *options], cwd=folder, env=os.environ | worker, capture_output=True)
    said = {name: [] for name in (*RUNS, "not_run")}
    for case in ElementTree.parse(folder / "said.xml").iter("testcase"):
        failure = case.find("failure")
        name = case.get("classname").removesuffix(".ipynb")
        said[name].append(None if failure is None else failure.text)
    return said


def test_the_same_outputs_pass_and_what_is_not_compared_may_differ(compared):
    assert compared["same"] == [None, None, None]


def test_another_output_fails_as_nbval_says_it(compared):
    [failed, *passed] = compared["other"]
    assert "mismatch 'stdout'" in failed
    assert passed == [None, None]


def test_an_output_of_another_kind_fails(compared):
    [_, failed, _] = compared["kind"]
    assert "Missing output fields" in failed


def test_a_cell_that_raised_fails_and_so_do_those_that_were_not_run(compared):
    passed, raised, not_run = compared["raised"]
    assert passed is None
    assert "ValueError: no" in raised
    assert "a cell above ended the run" in not_run


def test_a_run_of_other_cells_fails(compared):
    *passed, failed = compared["edited"]
    assert passed == [None, None]
    assert "JupyterLab ran another version" in failed


def test_what_jupyterlab_did_not_run_nbval_runs(compared):
    assert compared["not_run"] == [None, None, None]
