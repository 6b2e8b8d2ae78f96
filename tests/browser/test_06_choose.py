"""The decision tree, whose path follows nine controls."""

import pytest
from playwright.sync_api import Locator, Page, expect

from .notebook import SECOND, By, Notebook, by_both, find, try_setting

# An adapter's peak follows everything else. Host memory and data are asked for when all weights train, where the mouse
# leaves `trains`; and it leaves the smallest model, which always fits.
LAST = ("slider trains", "slider host memory", "checkbox data known before training", "slider model")


class TestChoose(Notebook):
    name = "06_choose.ipynb"
    controls = (
        "slider model",
        "slider GPUs",
        "slider memory",
        "slider sequence",
        "slider batch",
        "slider trains",
        "slider host memory",
        "checkbox gradient checkpointing",
        "checkbox data known before training",
        "button All bills",
    )

    @pytest.fixture
    def panel(self, page: Page) -> Locator:
        return page.locator(".jp-Cell").nth(self.cell('TreePanel("Qwen/Qwen2.5-7B"')[0])

    @pytest.fixture
    def path(self, panel: Locator) -> Locator:
        return panel.get_by_role("status").filter(has_text="Does an adapter train (LoRA)?")

    def test_a_larger_gpu_leads_elsewhere(self, panel: Locator, path: Locator) -> None:
        expect(path).to_contain_text("Nothing fits")
        find(panel, "slider memory").press("ArrowRight")
        expect(path).to_contain_text("adapter: switch the adapter off.", timeout=60 * SECOND)

    @by_both
    def test_all_bills_are_shown_until_something_changes(self, panel: Locator, by: By) -> None:
        by(panel, "button All bills")
        bills = panel.locator("pre").filter(has_text="precomputed")
        expect(bills).to_be_visible(timeout=120 * SECOND)
        find(panel, "checkbox gradient checkpointing").click()
        expect(bills).to_have_count(0, timeout=60 * SECOND)

    def test_each_setting_changes_the_picture(self, panel: Locator) -> None:
        for setting in (*filter(lambda control: control not in LAST, self.controls[:-1]), *LAST):
            try_setting(panel, setting, "img")
