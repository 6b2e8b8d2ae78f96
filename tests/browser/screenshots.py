"""Photographs of a notebook, for whoever wants to look."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from playwright.sync_api import Page

from .notebook import SECOND

WIDTHS, HEIGHT = (1280, 800), 900
TALL = 2400  # few screens, so little time


def photograph(page: Page, stem: Path) -> None:
    """Save the notebook screen by screen, wide in the light theme and narrow in the dark, as files named `stem`-…"""
    for width, theme in zip(WIDTHS, ("Light", "Dark"), strict=True):
        choose_theme(page, theme)
        if width < 1000:
            page.keyboard.press("Control+b")  # the list of files would take a third of the window
        page.set_viewport_size({"width": width, "height": TALL})
        for number in scrolled(page):
            page.screenshot(path=f"{stem}-{width}-{theme.lower()}-{number:02}.png")
    page.keyboard.press("Control+b")
    choose_theme(page, "Light")
    page.set_viewport_size({"width": WIDTHS[0], "height": HEIGHT})


def choose_theme(page: Page, name: str) -> None:
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.get_by_text("Theme", exact=True).hover()
    page.get_by_text(f"JupyterLab {name}", exact=True).click()


def scrolled(page: Page) -> Iterator[int]:
    """Scroll the notebook from its top to its end, and count the screens."""
    notebook = page.locator(".jp-WindowedPanel-outer:visible")
    last = page.locator(".jp-Cell").last
    for number in count():
        notebook.evaluate("(panel, top) => panel.scrollTo({top, behavior: 'instant'})", number * (TALL - 200))
        page.wait_for_timeout(SECOND / 2)  # cells are drawn when they come into sight
        yield number
        if last.evaluate("cell => cell.getBoundingClientRect().bottom < window.innerHeight"):
            return
