"""One JupyterLab and one browser for all notebooks, and for each test class its notebook's page.

Set REFKL_SCREENSHOTS to a folder, and each notebook is photographed after its run: wide in the light theme,
narrow in the dark one.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from checkout import ROOT
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright
from replay import keep
from test_lab import TOKEN, address, free_port, fresh_environment

from tools.lint import code_cells

from .notebook import CHROMIUM, end_kernels, run_all, save
from .screenshots import HEIGHT, WIDTHS, photograph

OFFLINE = ROOT / "tests" / "offline"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


# While Playwright runs, no other test could start it again, or an event loop of its own; so these end with the folder.


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the notebooks, without outputs: what is saved there was put out there."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*", "ruff.toml"))
    for path in (folder / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in code_cells(notebook):
            cell.update(outputs=[], execution_count=None)
        nbformat.write(notebook, path)
    return folder


@pytest.fixture(scope="package")
def lab(folder: Path) -> Iterator[str]:
    """A JupyterLab on the folder, with a home of its own and no network; gives its address."""
    port = free_port()
    options = ["--no-browser", "--allow-root", f"--port={port}", f"--ServerApp.root_dir={folder}"]
    environment = fresh_environment(folder / "home")
    environment |= {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(OFFLINE)}
    environment["REFKL_DATA"] = str(folder / "data")  # what is typed here stays out of the next kernels
    command = [sys.executable, "-m", "jupyterlab", *options]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        while not address(port, "api/status"):
            assert server.poll() is None, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="class")
def page(request: pytest.FixtureRequest, folder: Path, lab: str, browser: Browser) -> Iterator[Page]:
    """The class's notebook, open and run from top to bottom through the menu; nothing may be wrong in the console.

    What the run put out is kept for nbval to compare.
    """
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": WIDTHS[0], "height": HEIGHT})
    page = context.new_page()
    page.on("console", lambda message: complaints.extend(complaint(message)))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{lab}/lab/tree/notebooks/{request.cls.name}?reset&token={TOKEN}")  # without what was open before
    run_all(page)
    save(page)
    keep(folder / "notebooks" / request.cls.name)
    if "REFKL_SCREENSHOTS" in os.environ:
        photograph(page, Path(os.environ["REFKL_SCREENSHOTS"]) / Path(request.cls.name).stem)
    yield page
    page.close()
    end_kernels(context.request, lab)
    context.close()
    assert complaints == []


def complaint(message: ConsoleMessage) -> Iterator[str]:
    if message.type == "error":
        yield f"{message.text} ({message.location['url']})"
