"""Panels that show a text's KL, token by token."""

from playwright.sync_api import Page, expect

from .notebook import Light, Notebook, controls_of, find, outputs, try_setting


class TestWhy(Light, Notebook):
    name = "01_why_a_reference.ipynb"
    controls = ("radiogroup direction", "combobox measure", "slider token")
    panels = 3

    def test_each_control_of_each_panel_changes_what_is_said(self, page: Page) -> None:
        for panel in filter(controls_of, outputs(page)):
            for control in self.controls:
                try_setting(panel, control)

    def test_a_text_is_walked_through_and_measured_otherwise(self, page: Page) -> None:
        panel = next(filter(controls_of, outputs(page)))
        find(panel, "slider token").press("Home")
        for _ in range(9):
            find(panel, "slider token").press("ArrowRight")
        find(panel, "combobox measure").select_option("exact")
        panel.get_by_role("radio", name="KL(policy‖reference)").click()
        nats = panel.get_by_role("status").filter(has_text="Token 9, “ her”: ")
        expect(nats).to_be_visible()
        exact = nats.inner_text()
        find(panel, "combobox measure").select_option("k1, an estimate")
        expect(nats).not_to_have_text(exact)
        estimate = nats.inner_text()
        panel.get_by_role("radio", name="KL(reference‖policy)").click()
        expect(nats).not_to_have_text(estimate)
        assert number(nats.inner_text()) == -number(estimate)


def number(said: str) -> float:
    """Return the nats of a line that ends with them."""
    return float(said.split()[-2])
