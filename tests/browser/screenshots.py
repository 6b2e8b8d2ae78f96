"""Photographs of a notebook, for whoever wants to look."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from playwright.sync_api import Page

from .notebook import SECOND

WIDTHS, HEIGHT = (1280, 800), 900


def photograph(page: Page, stem: Path) -> None:
    """Save the notebook screen by screen, at both widths and in both themes, as files that begin with `stem`."""
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
