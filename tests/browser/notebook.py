"""What every notebook's tests are made of: a base class, and the hands that type, press and move."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from checkout import ROOT
from playwright.sync_api import APIRequestContext, Locator, Page, expect
from replay import keep
from test_lab import TOKEN

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECOND = 1000  # Playwright counts in milliseconds
AUTHORIZED = {"Authorization": f"token {TOKEN}"}
ERRORS = "application/vnd.jupyter.error"
STDERR = "application/vnd.jupyter.stderr"
SAID = ".widget-html [role=status]"  # what a panel says; what one of its controls says is a status as well
# A line of an ARIA snapshot that has a control: its role and its name. Radio buttons are one control, their group.
ROLES = "button|checkbox|combobox|link|listbox|menuitem|radiogroup|searchbox|slider|spinbutton|switch|tab|textbox"
CONTROL = re.compile(rf"""^\s*- '?({ROLES})\b(?: "(.*?)")?""", re.MULTILINE)
# Of a control, what a screen reader says that it is set to.
SET_TO = """control => ({
  range: () => control.getAttribute("aria-valuetext"),
  "select-one": () => control.selectedOptions[0].text,
  checkbox: () => String(control.checked),
}[control.type] ?? (() => control.querySelector(":checked").closest("label").innerText))()"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)")
@pytest.mark.timeout(1500)
class Notebook:
    """What holds for every notebook after its run.

    `controls` are those of a panel, in the order of the Tab key, as role and name. There are `panels` of it.
    """

    name: str
    controls: Sequence[str] = ()
    panels = 1

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

    def test_it_has_the_controls_that_are_tried_here_and_the_tab_key_reaches_each(self, page: Page) -> None:
        panels = [(panel, controls) for panel in outputs(page) if (controls := controls_of(panel))]
        assert [controls for _, controls in panels] == [list(self.controls)] * (self.panels if self.controls else 0)
        for panel, controls in panels:
            enter(panel)
            reached = [focused(page)]
            for _ in controls[1:]:
                page.keyboard.press("Tab")
                reached.append(focused(page))
            assert reached == controls


def run_all(page: Page) -> None:
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60 * SECOND)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60 * SECOND)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    expect(page.locator(".jp-InputPrompt", has_text="[*]").first).to_be_visible()
    expect(page.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(0, timeout=1200 * SECOND)


def save(page: Page) -> None:
    with page.expect_request(lambda request: request.method == "PUT" and "/api/contents/" in request.url) as saving:
        page.get_by_role("menuitem", name="File", exact=True).click()
        page.get_by_text("Save Notebook", exact=True).click()
    answer = saving.value.response()
    assert answer is not None
    assert answer.ok


def interrupt(page: Page) -> None:
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Interrupt Kernel", exact=True).click()


def restart(page: Page) -> None:
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Restart Kernel…", exact=True).click()
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60 * SECOND)


def end_kernels(request: APIRequestContext, lab: str) -> None:
    for session in request.get(f"{lab}/api/sessions", headers=AUTHORIZED).json():
        request.delete(f"{lab}/api/sessions/{session['id']}", headers=AUTHORIZED)


def typed(page: Page, place: int, source: str) -> Locator:
    """Put a source into the cell at this place, run it, and return where its outputs are."""
    cell = page.locator(".jp-Cell").nth(place)
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(source)
    page.keyboard.press("Shift+Enter")
    return cell.locator(".jp-Cell-outputWrapper")


def take(page: Page, place: int, expression: str, file: Path) -> None:
    """Keep what an expression gives in the notebook's kernel, for tests that need not measure it again."""
    write = f"with open({str(file)!r}, 'wb') as file:\n    pickle.dump({expression}, file)"
    expect(typed(page, place, f"import pickle\n\n{write}\nprint('kept')")).to_have_text("kept", timeout=60 * SECOND)
    keep(file)


# Controls, each by its role and name: "slider memory"


def outputs(page: Page) -> list[Locator]:
    return page.locator(".jp-OutputArea-output").all()


def controls_of(panel: Locator) -> list[str]:
    """Return all that can be moved, pressed or followed in a panel; without a name, only its role."""
    return [f"{role} {name}" for role, name in CONTROL.findall(panel.aria_snapshot())]


def find(panel: Locator, control: str) -> Locator:
    role, _, name = control.partition(" ")
    return panel.get_by_role(role, name=name, exact=True)


def focused(page: Page) -> str:
    element = page.locator(":focus")
    group = page.get_by_role("radiogroup").filter(has=element)
    return ", ".join(controls_of(group if group.count() else element))


def enter(panel: Locator) -> None:
    """Go from a cell's source to the first control below it, as one does without a mouse: Escape, then Tab."""
    page, cell = panel.page, panel.locator("xpath=ancestor::*[contains(@class, 'jp-CodeCell')]")
    cell.locator(".cm-content").click()
    page.keyboard.press("Escape")
    for _ in range(4):  # the cell's own buttons come first
        page.keyboard.press("Tab")
        if panel.evaluate("panel => panel.contains(document.activeElement)"):
            return
    pytest.fail("the Tab key does not lead from the cell to its panel")


def by_keys(panel: Locator, control: str) -> None:
    """Move or press a control with a key."""
    found, role = find(panel, control), control.split()[0]
    if role == "combobox":
        is_last = found.evaluate("menu => menu.selectedIndex == menu.length - 1")
        found.press("ArrowUp" if is_last else "ArrowDown")
    elif role == "radiogroup":
        found.get_by_role("radio", checked=True).press("ArrowRight")
    else:
        found.press({"slider": "ArrowRight", "checkbox": "Space", "button": "Enter"}[role])


def by_mouse(panel: Locator, control: str) -> None:
    """Move or press a control with the mouse; a slider is dragged to its start, or if it is there, to its middle."""
    found, role = find(panel, control), control.split()[0]
    if role == "slider":
        away = found.evaluate("slider => slider.value > slider.max / 20")
        drag(found, to=0.0 if away else 0.5)
    elif role == "radiogroup":
        found.get_by_role("radio", checked=False).last.click()
    elif role == "combobox":  # the list that opens is the system's; Playwright chooses from it without a click
        found.select_option(index=found.evaluate("menu => (menu.selectedIndex + 1) % menu.length"))
    else:
        found.click()


def drag(slider: Locator, to: float) -> None:
    """Take a slider near its end and drag it to a share of its way, past many values, as a hand does."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box is not None
    start, way, y = box["x"] + 8, box["width"] - 16, box["y"] + box["height"] / 2  # half a handle at either side
    mouse = slider.page.mouse
    mouse.move(start + 0.9 * way, y)
    mouse.down()
    mouse.move(start + to * way, y, steps=20)
    mouse.up()


By = Callable[[Locator, str], None]
by_both = pytest.mark.parametrize("by", [by_keys, by_mouse])


@contextmanager
def changes(panel: Locator, part: str = ".widget-html") -> Iterator[None]:
    """Expect that the kernel then shows something else in a part of the panel."""
    shown = "parts => parts.map(part => part.outerHTML).join()"
    panel.page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60 * SECOND)  # nothing is under way
    before = panel.locator(part).evaluate_all(shown)
    yield
    panel.page.wait_for_function(
        f"([panel, part, before]) => ({shown})([...panel.querySelectorAll(part)]) != before",
        arg=[panel.element_handle(), part, before],
        timeout=60 * SECOND,
    )


def try_setting(panel: Locator, control: str, part: str = ".widget-html") -> None:
    """Expect that a setting moves by keys and by mouse, says so, and each time changes what the kernel shows."""
    for by in (by_keys, by_mouse):
        before = find(panel, control).evaluate(SET_TO)
        with changes(panel, part):
            by(panel, control)
        assert find(panel, control).evaluate(SET_TO) != before
