"""The first notebook in a real JupyterLab, in a real browser, as a learner uses it."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT
from playwright.sync_api import Page, expect, sync_playwright
from test_lab import TOKEN, address, free_port, fresh_environment

NOTEBOOK = "00_start_here.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SECOND = 1000  # Playwright counts in milliseconds
ERRORS = "application/vnd.jupyter.error"
STDERR = "application/vnd.jupyter.stderr"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab on a copy of the notebooks, with a home of its own; gives the notebook's address."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    port = free_port()
    options = ["--no-browser", "--allow-root", f"--port={port}", f"--ServerApp.root_dir={folder}"]
    environment = fresh_environment(folder / "home") | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    command = [sys.executable, "-m", "jupyterlab", *options]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        while not address(port, "api/status"):
            assert server.poll() is None, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/{NOTEBOOK}?token={TOKEN}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(lab: str) -> Iterator[Page]:
    """The notebook, open and run from top to bottom through the menu."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(lab)
        run_all(page)
        yield page
        browser.close()


def run_all(page: Page) -> None:
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60 * SECOND)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60 * SECOND)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    expect(page.locator(".jp-InputPrompt", has_text="[*]").first).to_be_visible()
    expect(page.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(0, timeout=300 * SECOND)


def test_every_cell_runs_without_an_error_or_a_warning(page: Page) -> None:
    assert page.locator(".jp-InputPrompt", has_text="]:").count() > 15
    for kind in (ERRORS, STDERR):
        assert page.locator(f'.jp-OutputArea-output[data-mime-type="{kind}"]').all_inner_texts() == []


def test_the_readouts_leave_pictures_and_the_panel_is_alive(page: Page) -> None:
    expect(page.get_by_role("img", name="Bytes that lived while the cell ran")).to_have_count(2)
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()


def test_the_button_measures_on_the_real_model(page: Page) -> None:
    rows = page.get_by_role("row")
    before = rows.count()
    page.get_by_role("button", name="adapter").click()
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_role("status").filter(has_text="Running adapter")).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="Done: adapter, LoRA 8.")).to_be_visible(timeout=120 * SECOND)
    assert rows.count() == before + 1


def test_what_cannot_work_says_why_in_the_panel(page: Page) -> None:
    page.get_by_label("LoRA rank").select_option("none: train all weights")
    page.get_by_role("button", name="Run", exact=True).click()
    alert = page.get_by_role("alert").filter(has_text="no adapter to switch off")
    expect(alert).to_be_visible(timeout=60 * SECOND)
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()
