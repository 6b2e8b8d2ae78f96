"""In CI a skipped test is a failed one; no test inherits a launcher's variables or leaves its own behind."""

import os
import shutil
import subprocess
import sys

import pytest
from checkout import ROOT

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
