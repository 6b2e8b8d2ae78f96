"""What docs/instructor/rooms.md says, done."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, copy_to
from conftest import OFFLINE
from IPython.core.interactiveshell import InteractiveShell
from test_lab import NOTEBOOK, address, fresh_environment, make_lab, without_network

ROOMS = (ROOT / "docs" / "instructor" / "rooms.md").read_text()


def block(name: str) -> str:
    """The page's code block of that name."""
    [found] = re.findall(rf"^```\w+ {re.escape(name)}\n(.*?)^```", ROOMS, re.MULTILINE | re.DOTALL)
    return found


def test_a_shared_cache_is_read_and_not_written(tmp_path):
    """As the page says: the pocket model is built once, by who may write; then the folder may be read-only."""
    [build] = re.findall(r'python -c "(.*)"', block("server"))
    environment = os.environ | {"REFKL_CACHE": str(tmp_path / "shared"), "PYTHONPATH": str(OFFLINE)}

    def loaded() -> list[Path]:
        subprocess.run([sys.executable, "-c", build], env=environment, check=True)
        return sorted(path for path in (tmp_path / "shared").rglob("*") if path.is_file())

    first = loaded()
    times = [path.stat().st_mtime_ns for path in first]
    assert loaded() == first
    assert [path.stat().st_mtime_ns for path in first] == times


def test_colabs_first_cell_installs_nothing_where_the_kit_is(monkeypatch):
    ran = []
    shell = InteractiveShell()
    monkeypatch.setattr(InteractiveShell, "system", lambda _, command: ran.append(command))
    shell.register_magic_function(lambda line: ran.append(line), magic_name="pip")
    shell.run_cell(block("first-cell")).raise_error()
    assert ran == []
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    shell.run_cell(block("first-cell")).raise_error()
    assert ran == ["install --quiet --constraint kit/constraints.txt ./kit", "python -m refkl_lib.models fetch smollm2"]


def test_binder_is_set_up_as_make_lab_does():
    commands = (ROOT / "postBuild").read_text().splitlines()
    assert commands[0] == "#!/bin/bash"
    assert commands[-2:] == ["python -m refkl_lib.models fetch smollm2", "python -m refkl_lib.view.saved"]
    assert os.access(ROOT / "postBuild", os.X_OK)


@pytest.mark.parametrize("name", ["server", "hub", "one-lab-each", "in-the-room", "gather"])
def test_commands_are_well_formed(name):
    assert subprocess.run(["bash", "-n"], input=block(name), text=True, check=False).returncode == 0


def test_the_hubs_configuration_is_python():
    compile(block("jupyterhub_config.py"), "jupyterhub_config.py", "exec")


@pytest.mark.fresh
@pytest.mark.timeout(1800)
def test_a_room_without_network(tmp_path):
    """`make room` with a network, then a copy of the folder, an empty home, and no network."""
    kit = tmp_path / "kit"
    copy_to(kit)
    gatherer = fresh_environment(tmp_path / "gatherer")
    gatherer.pop("REFKL_CACHE", None)
    subprocess.run(["bash", "-ec", block("gather")], cwd=kit, env=gatherer, check=True, timeout=1200)
    room = tmp_path / "room"
    copy_to(room)
    (kit / "build").rename(room / "build")
    shown = subprocess.run(
        ["bash", "-ec", block("in-the-room").replace("make lab", "env")],
        cwd=room,
        capture_output=True,
        text=True,
        check=True,
    )
    exported = dict(
        line.split("=", 1) for line in shown.stdout.splitlines() if line.startswith(("PIP_NO", "PIP_FI", "REFKL_C"))
    )
    learner = without_network(fresh_environment(tmp_path / "learner")) | exported
    with make_lab(room, learner, seconds=600) as port:
        assert address(port, f"api/contents/{NOTEBOOK}")
