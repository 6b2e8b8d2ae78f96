"""Every notebook in a real JupyterLab, in a real browser, as a learner uses it.

Set REFKL_SCREENSHOTS to a folder, and each notebook is photographed after its run: at two widths, in both themes.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import nbformat
import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
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
# A cell that holds a MiB more every second.
SLOWLY = """import time
from refkl_lib import MemoryPanel
with MemoryPanel(rate=5) as panel:
    for mib in range(1, 6):
        held = panel.own("policy", torch.ones(mib * 2**18))
        time.sleep(1)"""
AUTHORIZED = {"Authorization": f"token {TOKEN}"}
WIDTHS, HEIGHT = (1280, 800), 900
SAID = "[role=status]"  # not get_by_role: to that, the number beside a slider is a status as well

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*", "ruff.toml"))
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

    def test_readers_of_all_kinds_can_use_what_it_shows(self, page: Page) -> None:
        found = Axe().run(page, context=".jp-OutputArea-output").response["violations"]
        serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
        assert [(fault["id"], fault["nodes"][0]["html"]) for fault in serious] == []


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


def ranks_below(home: Path) -> list[psutil.Process]:
    """Return the running ranks that were started from a kernel with this home."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "refkl_lib.ranks.worker" in process.cmdline() and process.environ().get("HOME") == str(home):
                found.append(process)
    return found


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

    def test_the_price_is_there_at_once_and_nothing_runs(self, page: Page) -> None:
        page.get_by_role("button", name="clone").click()
        page.get_by_role("button", name="Price", exact=True).click()
        done = page.get_by_role("status").filter(has_text="Done: clone, LoRA 8, priced.")
        expect(done).to_be_visible(timeout=60 * SECOND)
        expect(page.get_by_role("row").filter(has_text="clone, LoRA 8, priced")).to_be_visible()

    def test_what_cannot_work_says_why_in_the_panel(self, page: Page) -> None:
        page.get_by_role("button", name="adapter").click()
        page.get_by_label("LoRA rank").select_option("none: train all weights")
        page.get_by_role("button", name="Run", exact=True).click()
        alert = page.get_by_role("alert").filter(has_text="no adapter to switch off")
        expect(alert).to_be_visible(timeout=60 * SECOND)
        expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()

    def test_a_readout_moves_while_its_cell_runs(self, page: Page) -> None:
        place, _ = self.cell("from refkl_lib import machine")
        output = typed(page, place, SLOWLY)
        readout = output.get_by_role("row").filter(has_text="policy")
        seen = {readout.inner_text(timeout=30 * SECOND)}
        while page.locator(".jp-InputPrompt", has_text="[*]").count():
            if readout.count():
                seen.add(readout.inner_text())
            page.wait_for_timeout(SECOND / 10)
        assert len(seen) > 2
        expect(output.get_by_role("img", name="Bytes that lived while the cell ran")).to_be_visible()


class TestWhy(Light):
    name = "01_why_a_reference.ipynb"

    def test_a_text_is_walked_through_by_keys_and_measured_otherwise_by_mouse(self, page: Page) -> None:
        token = page.get_by_role("slider").first
        token.press("Home")
        for _ in range(9):
            token.press("ArrowRight")
        said = page.get_by_role("status").filter(has_text="Token 9, “ her”: ").first
        expect(said).to_be_visible()
        exact = said.inner_text()
        page.get_by_label("measure").first.select_option("k1, an estimate")
        expect(said).not_to_have_text(exact)
        estimate = said.inner_text()
        page.get_by_role("button", name="KL(reference‖policy)").first.click()
        expect(said).not_to_have_text(estimate)  # the other sign


class TestClone(Light):
    name = "02_full_clone.ipynb"


class TestAdapter(Light):
    name = "03_adapter_switch.ipynb"


class TestZero3(Notebook):
    name = "04_zero3_reload.ipynb"

    def test_an_interrupt_ends_a_job_and_its_ranks(self, page: Page, folder: Path) -> None:
        place, _ = self.cell('check("04.owner"')
        output = typed(page, place, "launch_zero3(ranks=2, steps=100_000)")
        expect(page.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(1)
        while len(ranks_below(folder / "home")) < 2:
            page.wait_for_timeout(SECOND / 5)
        page.get_by_role("menuitem", name="Kernel", exact=True).click()
        page.get_by_text("Interrupt Kernel", exact=True).click()
        expect(output).to_contain_text("KeyboardInterrupt", timeout=60 * SECOND)
        assert ranks_below(folder / "home") == []


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
        page.get_by_role("slider").nth(0).click(position={"x": 20, "y": 8})
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

    def test_it_is_found_again_as_it_was_left(self, page: Page, lab: str) -> None:
        pictures = page.locator(".jp-OutputArea-output img").count()
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2 * SECOND)
        end_kernels(page.context.request, lab)  # as if it were another day
        page.reload()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60 * SECOND)
        expect(page.locator(".jp-OutputArea-output img")).to_have_count(pictures, timeout=60 * SECOND)
        expect(page.get_by_role("slider")).to_have_count(2)
        expect(page.get_by_text("Error displaying widget")).to_have_count(0)


class TestChoose(Notebook):
    name = "06_choose.ipynb"

    @pytest.fixture
    def path(self, page: Page) -> Locator:
        return page.get_by_role("status").filter(has_text="Does an adapter train (LoRA)?")

    def test_a_key_on_the_memory_changes_the_path(self, page: Page, path: Locator) -> None:
        expect(path).to_contain_text("Nothing fits")
        page.get_by_role("slider", name="memory").first.press("ArrowRight")
        expect(path).to_contain_text("adapter: switch the adapter off.", timeout=60 * SECOND)

    def test_the_mouse_on_the_memory_changes_the_path(self, page: Page, path: Locator) -> None:
        page.get_by_role("slider", name="memory").first.click(position={"x": 4, "y": 8})  # the smallest GPU
        expect(path).to_contain_text("Nothing fits", timeout=60 * SECOND)

    def test_what_trains_changes_the_path(self, page: Page, path: Locator) -> None:
        page.get_by_role("slider", name="trains").press("Home")
        expect(path).to_contain_text("No: all weights do.", timeout=60 * SECOND)

    def test_all_bills_are_shown(self, page: Page) -> None:
        page.get_by_role("button", name="All bills").click()
        expect(page.get_by_text("What would change it:").last).to_be_visible(timeout=120 * SECOND)


class TestCapstone(Notebook):
    name = "07_capstone.ipynb"

    @pytest.fixture
    def panel(self, page: Page) -> Locator:
        """The panel that waits to be started."""
        return page.locator(".jp-Cell").nth(self.cell("TrainPanel(make_run, iterations=10)")[0])

    def test_a_training_is_started_held_and_stopped_by_hand(self, page: Page, panel: Locator) -> None:
        said, pause = panel.locator(SAID), panel.get_by_role("button", name="Pause")
        panel.get_by_role("button", name="Start").click()
        expect(said).to_contain_text("Done: iteration 1 of 10, beta 1.", timeout=120 * SECOND)
        panel.get_by_role("slider").press("ArrowRight")
        expect(said).to_contain_text(", beta 2.", timeout=60 * SECOND)
        pause.click()
        expect(said).to_contain_text("Paused: iteration", timeout=60 * SECOND)
        expect(panel.get_by_role("img", name="KL, nats a text")).to_be_visible()
        pause.click()
        panel.get_by_role("button", name="Stop").click()
        expect(said).to_have_text(re.compile("Done: [0-9]+ iterations."), timeout=60 * SECOND)

    def test_what_cannot_work_says_why_in_the_panel(self, page: Page, panel: Locator) -> None:
        panel.get_by_label("sync it").select_option("every 5 iterations")
        panel.get_by_role("button", name="Start").click()
        alert = panel.get_by_role("alert").filter(has_text="cannot move towards the policy")
        expect(alert).to_be_visible(timeout=120 * SECOND)
        panel.get_by_label("sync it").select_option("never")

    def test_an_interrupt_ends_the_training_and_leaves_its_picture(self, page: Page) -> None:
        place, source = self.cell("iterations=10, beta=1.0) as panel")
        output = typed(page, place, source.replace("iterations=10", "iterations=100"))
        expect(output.locator(SAID)).to_contain_text("Done: iteration 1 of 100", timeout=120 * SECOND)
        page.get_by_role("menuitem", name="Kernel", exact=True).click()
        page.get_by_text("Interrupt Kernel", exact=True).click()
        expect(output).to_contain_text("KeyboardInterrupt", timeout=60 * SECOND)
        expect(output.get_by_role("img", name="A training, iteration by iteration")).to_be_visible()


class TestArticle(Notebook):
    name = "08_article_under_test.ipynb"

    def test_the_table_has_a_row_for_each_claim_and_leads_to_the_lessons(self, page: Page) -> None:
        claims = page.get_by_role("table").filter(has_text="the article says")
        expect(claims.get_by_role("rowheader", name=re.compile(r"^[A-E]\d$"))).to_have_count(25)
        expect(claims.get_by_role("link", name="05_kl").first).to_have_attribute("href", re.compile(r"05_kl\.ipynb"))


def test_every_notebook_is_opened() -> None:
    opened = TestStartHere, TestWhy, TestClone, TestAdapter, TestZero3, TestKl, TestChoose, TestCapstone, TestArticle
    assert [case.name for case in opened] == NOTEBOOKS


def test_the_runs_left_nothing_beside_the_notebooks(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "notebooks").glob("[!.]*")) == NOTEBOOKS
