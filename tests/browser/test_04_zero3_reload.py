"""Real ranks, and an interrupt that ends them."""

from contextlib import suppress
from pathlib import Path

import psutil
from playwright.sync_api import Page, expect

from .notebook import SECOND, Notebook, interrupt, typed


class TestZero3(Notebook):
    name = "04_zero3_reload.ipynb"

    def test_an_interrupt_ends_a_job_and_its_ranks(self, page: Page, folder: Path) -> None:
        place, _ = self.cell('check("04.owner"')
        output = typed(page, place, "launch_zero3(ranks=2, steps=100_000)")
        expect(page.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(1)
        while len(ranks_below(folder / "home")) < 2:
            page.wait_for_timeout(SECOND / 5)
        interrupt(page)
        expect(output).to_contain_text("KeyboardInterrupt", timeout=60 * SECOND)
        assert ranks_below(folder / "home") == []


def ranks_below(home: Path) -> list[psutil.Process]:
    """Return the running ranks that were started from a kernel with this home."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "refkl_lib.ranks.worker" in process.cmdline() and process.environ().get("HOME") == str(home):
                found.append(process)
    return found
