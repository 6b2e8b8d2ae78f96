"""`make lab`, as a person runs it: from nothing, and again later with the network off."""

import os
import pty
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkout import ROOT, copy_to

NOTEBOOK = "notebooks/00_start_here.ipynb"
TOKEN = "only-for-this-test"
# What a fresh machine's shell does not have set.
OF_THIS_SHELL = ("JUPYTER", "IPYTHON", "HF_", "XDG_", "VIRTUAL_ENV", "PYTHON", "CONDA", "MAKE", "PYTEST")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def address(port: int, path: str) -> str | None:
    """Where a request for a page of Jupyter ends; None if there is no Jupyter or no such page."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", headers={"Authorization": f"token {TOKEN}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return direct.open(request, timeout=10).url
    except OSError:
        return None


def fresh_environment(home: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_THIS_SHELL)}
    paths = [p for p in environment["PATH"].split(os.pathsep) if not Path(p).is_relative_to(ROOT)]
    home.mkdir()
    return environment | {"HOME": str(home), "PATH": os.pathsep.join(paths), "JUPYTER_TOKEN": TOKEN}


def without_network(environment: dict[str, str]) -> dict[str, str]:
    nowhere = "http://127.0.0.1:9"  # the discard port
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)
    return environment | proxies | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}


@contextmanager
def make_lab(folder: Path, environment: dict[str, str], seconds: float) -> Iterator[int]:
    """Run `make lab` until it answers on the port that this gives; press Ctrl-C twice at the end."""
    port = free_port()
    options = f"--no-browser --port={port} --ServerApp.port_retries=0"
    log = Path(environment["HOME"]) / "make-lab.log"
    keyboard, terminal = pty.openpty()  # Jupyter asks before it stops if it has a terminal to ask at
    with log.open("w") as output:
        lab = subprocess.Popen(
            ["make", "lab", f"LAB_ARGS={options}"],
            cwd=folder,
            env=environment,
            stdin=terminal,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + seconds
        while not address(port, "api/status"):
            assert lab.poll() is None, f"`make lab` ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"Jupyter did not answer:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)
        yield port
        os.killpg(lab.pid, signal.SIGINT)
        while "Shut down this Jupyter server" not in log.read_text():
            time.sleep(0.1)
        os.killpg(lab.pid, signal.SIGINT)
        lab.wait(timeout=30)
    finally:
        if lab.poll() is None:
            os.killpg(lab.pid, signal.SIGKILL)
            lab.wait()
        os.close(keyboard)
        os.close(terminal)


def test_lab_starts_again_without_network_and_ends_on_ctrl_c(tmp_path):
    if not (ROOT / ".venv" / ".lab").exists():
        pytest.skip("this environment was not made by `make lab` or `make test`")
    with make_lab(ROOT, without_network(fresh_environment(tmp_path / "home")), seconds=60) as port:
        assert address(port, "").endswith(f"/lab/tree/{NOTEBOOK}")
        assert address(port, f"api/contents/{NOTEBOOK}")
    assert not address(port, "api/status")


@pytest.mark.fresh
@pytest.mark.timeout(1200)
def test_lab_from_an_empty_folder_with_an_empty_home(tmp_path):
    kit = tmp_path / "kit"
    copy_to(kit)
    environment = fresh_environment(tmp_path / "home")
    environment.pop("REFKL_CACHE", None)
    with make_lab(kit, environment, seconds=1100) as port:
        assert address(port, f"api/contents/{NOTEBOOK}")
    imported = subprocess.check_output(
        [kit / ".venv/bin/python", "-c", "import refkl_lib; print(refkl_lib.__file__)"],
        cwd=tmp_path,
        env=environment,
        text=True,
    )
    assert Path(imported.strip()).is_relative_to(kit)
    with make_lab(kit, without_network(environment), seconds=60):
        pass
