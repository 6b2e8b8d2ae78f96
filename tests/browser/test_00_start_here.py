"""Readouts that move while a cell runs, and a panel that prices and runs each way to keep the reference."""

from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect
from replay import THREE_RUNS

from .notebook import SECOND, Notebook, by_keys, by_mouse, find, take, typed

BY_MOUSE = {
    "combobox model": "smollm2",
    "combobox LoRA rank": "4",
    "combobox batch": "1",
    "combobox sequence": "32",
    "combobox ranks": "4 (zero3)",
}
# A cell that holds a MiB more every second.
SLOWLY = """import time
from refkl_lib import MemoryPanel
with MemoryPanel(rate=5) as panel:
    for mib in range(1, 6):
        held = panel.own("policy", torch.ones(mib * 2**18))
        time.sleep(1)"""


class TestStartHere(Notebook):
    name = "00_start_here.ipynb"
    controls = ("radiogroup strategy", *BY_MOUSE, "button Price", "button Run")

    @pytest.fixture
    def panel(self, page: Page) -> Locator:
        return page.locator(".jp-Cell").nth(self.cell("StrategyPanel(runs=runs)")[0])

    def test_its_runs_can_be_taken_elsewhere(self, page: Page, tmp_path: Path) -> None:
        """Elsewhere is test_smollm2.py, which need not run them again."""
        take(page, self.cell("print(bill_table(runs))")[0], "(run, runs)", tmp_path / THREE_RUNS)

    def test_the_readouts_leave_pictures(self, page: Page) -> None:
        expect(page.get_by_role("img", name="Bytes that lived while the cell ran")).to_have_count(2)

    def test_what_is_chosen_by_keys_is_priced_and_run(self, panel: Locator) -> None:
        for setting in ("radiogroup strategy", *BY_MOUSE):
            by_keys(panel, setting)  # the next of each
        for button, run in (("button Price", "adapter, LoRA 16, priced"), ("button Run", "adapter, LoRA 16")):
            by_keys(panel, button)
            expect(said(panel, f"Done: {run}.")).to_be_visible(timeout=60 * SECOND)
            expect(panel.get_by_role("row", name=f"{run} 2 × 128")).to_be_visible()

    def test_what_is_chosen_by_mouse_is_priced_and_nothing_runs(self, panel: Locator) -> None:
        panel.get_by_role("radio", name="zero3").click()
        for menu, option in BY_MOUSE.items():
            find(panel, menu).select_option(option)
        by_mouse(panel, "button Price")
        expect(said(panel, "Done: zero3, LoRA 4, each of 4, priced.")).to_be_visible(timeout=60 * SECOND)
        expect(panel.get_by_role("row", name="zero3, LoRA 4, each of 4, priced 1 × 32")).to_be_visible()

    def test_the_button_measures_on_the_real_model(self, panel: Locator) -> None:
        panel.get_by_role("radio", name="adapter").click()
        rows, picture = panel.get_by_role("row").count(), panel.locator("img").get_attribute("src")
        by_mouse(panel, "button Run")
        expect(said(panel, "Running adapter")).to_be_visible()
        expect(said(panel, "Done: adapter, LoRA 4.")).to_be_visible(timeout=120 * SECOND)
        expect(panel.get_by_role("row")).to_have_count(rows + 1)
        expect(panel.locator("img")).not_to_have_attribute("src", picture)

    def test_what_cannot_work_says_why_in_the_panel(self, panel: Locator) -> None:
        find(panel, "combobox LoRA rank").select_option("none: train all weights")
        by_mouse(panel, "button Run")
        alert = panel.get_by_role("alert").filter(has_text="no adapter to switch off")
        expect(alert).to_be_visible(timeout=60 * SECOND)
        expect(find(panel, "button Run")).to_be_enabled()

    def test_a_readout_moves_while_its_cell_runs(self, page: Page) -> None:
        place, _ = self.cell("from refkl_lib import machine")
        output = typed(page, place, SLOWLY)
        readout = output.get_by_role("row").filter(has_text="policy")
        seen = {readout.inner_text(timeout=30 * SECOND)}
        while page.locator(".jp-InputPrompt", has_text="[*]").count():
            seen.update(readout.all_inner_texts())  # none once the cell has ended
            page.wait_for_timeout(SECOND / 10)
        assert len(seen) > 2
        expect(output.get_by_role("img", name="Bytes that lived while the cell ran")).to_be_visible()


def said(panel: Locator, text: str) -> Locator:
    return panel.get_by_role("status").filter(has_text=text)
