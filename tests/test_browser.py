"""Every notebook in a real JupyterLab, in a real browser, as a learner uses it.

Set REFKL_SCREENSHOTS to a folder, and each notebook is photographed after its run: at two widths, in both themes.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import nbformat
import pytest
from checkout import ROOT
from conftest import OFFLINE
from playwright.sync_api import APIRequestContext, Browser, ConsoleMessage, Locator, Page, expect, sync_playwright
from solved import solve
from test_lab import TOKEN, address, free_port, fresh_environment

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SECOND = 1000  # Playwright counts in milliseconds
ERRORS = "application/vnd.jupyter.error"
STDERR = "application/vnd.jupyter.stderr"
AUTHORIZED = {"Authorization": f"token {TOKEN}"}
WIDTHS, HEIGHT = (1280, 800), 900

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    return folder


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="class")
def page(request: pytest.FixtureRequest, lab: str, browser: Browser) -> Iterator[Page]:
    """The class's notebook, open and run from top to bottom through the menu; nothing may be wrong in the console."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": WIDTHS[0], "height": HEIGHT})
    page = context.new_page()
    page.on("console", lambda message: complaints.extend(complaint(message)))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{lab}/lab/tree/notebooks/{request.cls.name}?reset&token={TOKEN}")  # without what was open before
    run_all(page)
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


def end_kernels(request: APIRequestContext, lab: str) -> None:
    for session in request.get(f"{lab}/api/sessions", headers=AUTHORIZED).json():
        request.delete(f"{lab}/api/sessions/{session['id']}", headers=AUTHORIZED)


def run_all(page: Page) -> None:
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60 * SECOND)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60 * SECOND)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    expect(page.locator(".jp-InputPrompt", has_text="[*]").first).to_be_visible()
    expect(page.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(0, timeout=600 * SECOND)


def photograph(page: Page, stem: Path) -> None:
    for theme in ("Dark", "Light"):
        page.get_by_role("menuitem", name="Settings", exact=True).click()
        page.get_by_text("Theme", exact=True).hover()
        page.get_by_text(f"JupyterLab {theme}", exact=True).click()
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": HEIGHT})
            for number in scrolled(page):
                page.screenshot(path=f"{stem}-{width}-{theme.lower()}-{number:02}.png")
            page.keyboard.press("Control+b")  # the list of files would take a third of the narrow window
    page.set_viewport_size({"width": WIDTHS[0], "height": HEIGHT})


def scrolled(page: Page) -> Iterator[int]:
    """Scroll the notebook from its top to its end, and count the screens."""
    notebook = page.locator(".jp-WindowedPanel-outer:visible")
    last = page.locator(".jp-Cell").last
    for number in count():
        notebook.evaluate("(panel, top) => panel.scrollTo({top, behavior: 'instant'})", number * (HEIGHT - 200))
        page.wait_for_timeout(SECOND / 2)  # cells are drawn when they come into sight
        yield number
        if last.evaluate("cell => cell.getBoundingClientRect().bottom < window.innerHeight"):
            return


class Notebook:
    """What holds for every notebook after its run."""

    name: str

    @classmethod
    def cell(cls, part: str) -> tuple[int, str]:
        """Return place and source of the cell that has this part."""
        cells = nbformat.read(ROOT / "notebooks" / cls.name, as_version=4).cells
        [found] = [(place, cell.source) for place, cell in enumerate(cells) if part in cell.source]
        return found

    def test_every_cell_runs_without_an_error_or_a_warning(self, page: Page) -> None:
        stored = nbformat.read(ROOT / "notebooks" / self.name, as_version=4)
        cells = [cell for cell in stored.cells if cell.cell_type == "code"]
        prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()
        assert len(prompts) == len(cells)
        assert all(prompt[1].isdigit() for prompt in prompts)  # "[7]:"
        for kind in (ERRORS, STDERR):
            assert page.locator(f'.jp-OutputArea-output[data-mime-type="{kind}"]').all_text_contents() == []

    def test_every_picture_is_drawn_and_has_a_text(self, page: Page) -> None:
        described = "images => images.map(image => [image.naturalWidth > 0, image.alt.trim() != ''])"
        pictures = page.locator(".jp-OutputArea-output img").evaluate_all(described)
        assert pictures
        assert all(all(picture) for picture in pictures)


class Light(Notebook):
    """A notebook that computes so little that it can run twice here."""

    def test_it_runs_again_in_the_same_kernel(self, page: Page) -> None:
        run_all(page)
        self.test_every_cell_runs_without_an_error_or_a_warning(page)


def typed(page: Page, place: int, source: str) -> Locator:
    """Put a source into the cell at this place, run it, and return where its outputs are."""
    cell = page.locator(".jp-Cell").nth(place)
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(source)
    page.keyboard.press("Shift+Enter")
    return cell.locator(".jp-Cell-outputWrapper")


class TestStartHere(Notebook):
    name = "00_start_here.ipynb"

    def test_the_readouts_leave_pictures_and_the_panel_is_alive(self, page: Page) -> None:
        expect(page.get_by_role("img", name="Bytes that lived while the cell ran")).to_have_count(2)
        expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()

    def test_the_button_measures_on_the_real_model(self, page: Page) -> None:
        rows = page.get_by_role("row")
        before = rows.count()
        page.get_by_role("button", name="adapter").click()
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.get_by_role("status").filter(has_text="Running adapter")).to_be_visible()
        done = page.get_by_role("status").filter(has_text="Done: adapter, LoRA 8.")
        expect(done).to_be_visible(timeout=120 * SECOND)
        assert rows.count() == before + 1

    def test_what_cannot_work_says_why_in_the_panel(self, page: Page) -> None:
        page.get_by_role("button", name="adapter").click()
        page.get_by_label("LoRA rank").select_option("none: train all weights")
        page.get_by_role("button", name="Run", exact=True).click()
        alert = page.get_by_role("alert").filter(has_text="no adapter to switch off")
        expect(alert).to_be_visible(timeout=60 * SECOND)
        expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()


class TestWhy(Light):
    name = "01_why_a_reference.ipynb"


class TestClone(Light):
    name = "02_full_clone.ipynb"


class TestAdapter(Light):
    name = "03_adapter_switch.ipynb"


class TestZero3(Notebook):
    name = "04_zero3_reload.ipynb"


class TestKl(Light):
    name = "05_kl.ipynb"

    @pytest.fixture
    def readout(self, page: Page) -> Locator:
        return page.get_by_role("status").filter(has_text="KL(policy‖reference)")

    def test_keys_move_the_sliders(self, page: Page, readout: Locator) -> None:
        for slider in (page.get_by_role("slider").nth(0), page.get_by_role("slider").nth(1)):
            before = readout.inner_text()
            slider.press("ArrowRight")
            expect(readout).not_to_have_text(before)

    def test_the_mouse_moves_a_slider(self, page: Page, readout: Locator) -> None:
        before = readout.inner_text()
        page.locator(".noUi-base").first.click(position={"x": 20, "y": 2})
        expect(readout).not_to_have_text(before)

    def test_a_prediction_is_typed_and_revealed(self, page: Page) -> None:
        place, source = self.cell('predict("05.share-of-five"')
        expect(typed(page, place, source.replace("...", "50"))).to_contain_text("05.share-of-five: your guess is 50.")
        expect(typed(page, *self.cell('reveal("05.share-of-five"'))).to_contain_text("measured / guess")

    def test_a_solution_is_typed_and_progress_is_a_picture(self, page: Page) -> None:
        place, source = self.cell('check("05.k3"')
        expect(typed(page, place, solve(source))).to_contain_text("05.k3: solved.")
        shown = typed(page, place, "from refkl_lib import progress\n\nprogress()").get_by_role("img")
        expect(shown).to_have_accessible_name(re.compile("^Predictions: 1 of .* Exercises: 1 of .* solved"))


def test_every_notebook_is_opened() -> None:
    opened = TestStartHere, TestWhy, TestClone, TestAdapter, TestZero3, TestKl
    assert [case.name for case in opened] == NOTEBOOKS


def test_the_runs_left_nothing_beside_the_notebooks(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "notebooks").glob("[!.]*")) == NOTEBOOKS
