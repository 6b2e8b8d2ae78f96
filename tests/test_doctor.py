"""The doctor: what it says where all is there, and where something is missing."""

import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from importlib import metadata

import pytest
from checkout import ROOT
from packaging.requirements import Requirement

from refkl_lib import doctor
from refkl_lib.doctor import CHECKS, NO, NOTE, OK, Finding, examined, main, package_faults
from refkl_lib.memory.meters import machine
from refkl_lib.ranks.job import RankError
from refkl_lib.units import GIB


def test_here_nothing_is_missing(tmp_path):
    run = subprocess.run([sys.executable, "-m", "refkl_lib.doctor"], cwd=tmp_path, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stdout
    assert [line[6:20].strip() for line in lines[: len(CHECKS)]] == list(CHECKS)
    assert all(line.split()[0] in (OK, NOTE) for line in lines[: len(CHECKS)])
    assert lines[-1] == "All is there."


def test_a_line_each_and_what_is_missing_decides_the_exit_status(capsys):
    checks = {
        "one": lambda: Finding(OK, "2"),
        "two": lambda: Finding(NO, "buy one"),
        "three": lambda: Finding(NOTE, ""),
    }
    assert main(checks) == 1
    assert capsys.readouterr().out.splitlines()[:2] == ["ok    one           2", "no    two           buy one"]
    assert main({"three": checks["three"]}) == 0


def test_what_a_check_raises_is_said_and_ends_nothing(capsys):
    def broken():
        raise OSError("the disk\nhas a long story")

    assert main({"disk": broken}) == 1
    assert "no    disk          OSError: the disk\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("required", "locked", "fault"),
    [
        ("torch", "torch==0.4", f"torch is {metadata.version('torch')}, not ==0.4"),
        ("no-such-package>=1", "torch", "no-such-package is not installed"),
        ("torch==0.4", "", f"torch is {metadata.version('torch')}, not ==0.4"),
        ("no-such-package; python_version < '3'", "torch==0.4; python_version < '3'", None),
        ("torch", "no-such-package==1", None),
        ("no-such-package; extra == 'test'", "torch", None),
    ],
)
def test_packages_that_drifted_are_named(required, locked, fault):
    lock = [Requirement(locked)] if locked else []
    assert list(package_faults([Requirement(required)], lock)) == ([fault] if fault else [])


def test_without_a_lock_the_release_says_what_it_requires(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKOUT", tmp_path)
    assert doctor.packages() == Finding(OK, f"Python {machine().python}, and the versions of this release")
    (tmp_path / "constraints.txt").write_text("# a lock\ntorch==0.4\n")
    assert doctor.packages().state == NO
    assert "make lab" in doctor.packages().says


@pytest.mark.parametrize(
    ("available", "state", "way_out"),
    [(2 * GIB, NO, "close other programs"), (5 * GIB, NOTE, 'model="pocket"'), (16 * GIB, OK, "16.00 GiB")],
)
def test_memory_says_what_it_is_enough_for(monkeypatch, available, state, way_out):
    monkeypatch.setattr(doctor, "machine", lambda: replace(machine(), available=available))
    finding = doctor.memory()
    assert finding.state == state
    assert way_out in finding.says


@pytest.mark.parametrize(("cores", "state"), [(1, NOTE), (2, OK)])
def test_one_core_is_slow_and_enough(monkeypatch, cores, state):
    monkeypatch.setattr(doctor, "machine", lambda: replace(machine(), cores=cores))
    assert doctor.cores().state == state


@pytest.mark.parametrize("has_compiler", [True, False])
def test_no_compiler_is_needed(monkeypatch, has_compiler):
    monkeypatch.setattr(doctor, "machine", lambda: replace(machine(), has_compiler=has_compiler))
    assert doctor.compiler().state == OK


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("REFKL_CACHE", str(tmp_path / "not" / "made" / "yet"))
    assert doctor.disk().state == OK
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(2**20))
    assert doctor.disk() == Finding(NO, f"1.0 MiB free in {tmp_path}, 1.00 GiB are needed: free some there")


def test_a_missing_model_comes_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("REFKL_CACHE", str(tmp_path))
    finding = examined(doctor.model)
    assert finding.state == NO
    assert "python -m refkl_lib.models fetch smollm2" in finding.says


def test_a_damaged_model_is_to_be_deleted(monkeypatch, tmp_path):
    monkeypatch.setenv("REFKL_CACHE", str(tmp_path))
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{")
    finding = examined(doctor.model)
    assert finding.state == NO
    assert "delete that folder" in finding.says


def test_another_system_than_linux_is_no_fault(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert doctor.ranks().state == NOTE


def test_ranks_that_fail_say_why(monkeypatch):
    def fail(**_):
        raise RankError("rank 1 died: no memory\nand much more", 1, "")

    monkeypatch.setattr(doctor, "launch_zero3", fail)
    assert examined(doctor.ranks) == Finding(NO, "RankError: rank 1 died: no memory")


def test_a_jupyterlab_that_does_not_start_is_noticed(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    finding = examined(doctor.lab)
    assert finding.state == NO
    assert "python -m jupyterlab says why" in finding.says


def test_a_jupyterlab_that_is_not_installed_is_noticed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    assert doctor.lab() == Finding(NO, "JupyterLab is not installed: make lab, or pip install refkl-lib[lab]")


def test_the_readme_names_the_same_amounts():
    readme = (ROOT / "README.md").read_text()
    assert f"Memory: {doctor.MEMORY // GIB} GB free, and {doctor.MEMORY_FOR_RANKS // GIB} GB" in readme
