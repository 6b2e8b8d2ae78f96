"""Panels that show a text's KL, token by token."""

import re

from playwright.sync_api import Page, expect

from .notebook import Notebook, controls_of, find, outputs, try_setting


class TestWhy(Notebook):
    name = "01_why_a_reference.ipynb"
    controls = ("radiogroup direction", "combobox measure", "slider token")
    panels = 3

    def test_each_control_of_each_panel_changes_what_is_said(self, page: Page) -> None:
        for panel in filter(controls_of, outputs(page)):
            for control in self.controls:
                try_setting(panel, control)

    def test_a_text_is_walked_through_and_measured_otherwise(self, page: Page) -> None:
        panel = next(filter(controls_of, outputs(page)))
        find(panel, "combobox measure").select_option("k1, an estimate")
        panel.get_by_role("radio", name="KL(policy‖reference)").click()
        for key, presses, token in (("Home", 1, "Token 0,"), ("ArrowRight", 9, "Token 9, “ her”: ")):
            for _ in range(presses):
                find(panel, "slider token").press(key)
            nats = panel.get_by_role("status").filter(has_text=token)
            expect(nats).to_be_visible()  # the kernel hears in turn: it has heard menu and radio button, too
        estimate = nats.inner_text()
        panel.get_by_role("radio", name="KL(reference‖policy)").click()
        expect(nats).to_have_text(f"Token 9, “ her”: {-number(estimate):.2f} nats")
        find(panel, "combobox measure").select_option("exact")
        expect(nats).not_to_have_text(re.compile(f"{abs(number(estimate)):.2f} nats"))


def number(said: str) -> float:
    """Return the nats of a line that ends with them."""
    return float(said.split()[-2])
