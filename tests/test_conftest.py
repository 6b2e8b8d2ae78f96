"""What holds for all tests: their own variables, no network in kernels, notebooks in any order, and in CI no skips."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import conftest
import pytest
from checkout import ROOT
from nbclient import NotebookClient
from solved import cells

TESTS = {
    "test_one.py": """
import os, pytest
def test_skipped(): pytest.skip("no compiler")
@pytest.mark.xfail
def test_known(): assert False
def test_sets_a_variable(): os.environ["LEFT_BEHIND"] = "1"
def test_sees_none(): assert not {"LEFT_BEHIND", "WORLD_SIZE"} & os.environ.keys()
""",
    "test_whole_file.py": "import pytest; pytest.importorskip('no_such_module')",
}


@pytest.fixture
def run_pytest(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    for name, source in TESTS.items():
        (tmp_path / name).write_text(source)

    def run(**variables):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            os.devnull,
            "--rootdir=.",
            "--continue-on-collection-errors",
        ]
        environment = {k: v for k, v in os.environ.items() if k != "REFKL_NO_SKIP"} | variables
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    return run


def test_a_skip_is_a_skip_on_a_machine_that_lacks_something(run_pytest):
    assert "2 passed, 2 skipped, 1 xfailed" in run_pytest(WORLD_SIZE="8")


def test_a_skip_is_a_failure_where_nothing_may_lack(run_pytest):
    output = run_pytest(REFKL_NO_SKIP="1")
    assert "1 failed, 2 passed, 1 xfailed, 1 error" in output
    assert "no compiler" in output
    assert "no_such_module" in output


ASKS = """
import socket, urllib.request
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
for ask in (lambda: socket.create_connection(("192.0.2.1", 80)), lambda: urllib.request.urlopen("http://192.0.2.1")):
    try:
        ask()
    except OSError as error:
        print(error)
"""


def test_a_kernel_reaches_this_machine_and_no_other():
    notebook = cells(ASKS)
    NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
    said = notebook.cells[0].outputs[0].text
    assert said.count("the network is off in tests: nothing may be asked of 192.0.2.1") == 2


NOTEBOOKS = ["00_a", "01_b", "02_c", "03_d", "04_e"]


def collected(order, monkeypatch):
    monkeypatch.setattr(conftest, "ORDER", order)
    browser = [conftest.BROWSER / f"test_{name}.py" for name in ("every_notebook", *NOTEBOOKS)]
    paths = [Path(f"{name}.ipynb") for name in NOTEBOOKS] + browser + [Path("test_y.py"), Path("test_x.py")]
    items = [mock.Mock(path=path, cell=cell) for path in paths for cell in range(2)]
    conftest.pytest_collection_modifyitems(items)
    assert [item.cell for item in items] == [0, 1] * len(paths)  # a file's own tests stay together
    return [item.path.name for item in items[::2]]


def test_the_browser_comes_first_and_nbval_last_in_an_order_that_the_header_names(monkeypatch):
    one, again, other = (collected(order, monkeypatch) for order in ("1", "1", "2"))
    assert "REFKL_ORDER=2" in conftest.pytest_report_header()
    assert one == again != other
    for names in (one, other):
        assert sorted(names[:5]) == [f"test_{name}.py" for name in NOTEBOOKS]
        assert names[5:8] == ["test_every_notebook.py", "test_y.py", "test_x.py"]
        assert sorted(names[8:]) == [f"{name}.ipynb" for name in NOTEBOOKS]
