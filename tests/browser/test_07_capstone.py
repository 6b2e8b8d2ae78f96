"""A training with its leash in the reader's hand."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from .notebook import SAID, SECOND, By, Notebook, by_keys, by_mouse, find, interrupt, typed


class TestCapstone(Notebook):
    name = "07_capstone.ipynb"
    controls = (
        "combobox reference",
        "combobox sync it",
        "slider beta",
        "button Start",
        "button Pause",
        "button Stop",
    )

    @pytest.fixture
    def panel(self, page: Page) -> Locator:
        """The panel that waits to be started."""
        return page.locator(".jp-Cell").nth(self.cell("TrainPanel(make_run, iterations=10)")[0])

    def test_a_training_is_started_held_and_stopped(self, panel: Locator) -> None:
        said = panel.locator(SAID)
        by_keys(panel, "combobox reference")
        by_keys(panel, "button Start")
        expect(said).to_contain_text("its reference (clone)")
        expect(said).to_contain_text("Done: iteration 1 of 10, beta", timeout=120 * SECOND)
        for by in (by_keys, by_mouse):
            set_beta(panel, by)
        by_keys(panel, "button Pause")
        expect(said).to_contain_text("Paused: iteration", timeout=60 * SECOND)
        expect(panel.get_by_role("img", name="KL, nats a text")).to_be_visible()
        by_mouse(panel, "button Pause")
        expect(said).to_contain_text("Done: iteration", timeout=60 * SECOND)
        by_keys(panel, "button Stop")
        expect(said).to_have_text(re.compile("Done: [0-9]+ iterations."), timeout=60 * SECOND)

    def test_what_cannot_work_says_why_in_the_panel(self, panel: Locator) -> None:
        by_mouse(panel, "combobox reference")
        expect(find(panel, "combobox reference")).to_have_value("adapter")
        sync = find(panel, "combobox sync it")
        for by in (by_keys, by_mouse):
            by(panel, "combobox sync it")
            assert sync.input_value() != "never"
        by_mouse(panel, "button Start")
        alert = panel.get_by_role("alert").filter(has_text="cannot move towards the policy")
        expect(alert).to_be_visible(timeout=120 * SECOND)
        sync.select_option("never")

    def test_an_interrupt_ends_a_training_that_the_start_button_began(self, page: Page, panel: Locator) -> None:
        find(panel, "button Start").click()
        expect(panel.locator(SAID)).to_contain_text("Done: iteration 1 of 10", timeout=120 * SECOND)
        interrupt(page)
        expect(panel.locator(SAID)).to_have_text(re.compile("Interrupted: [0-9] iterations."), timeout=60 * SECOND)

    def test_cells_run_between_the_iterations(self, page: Page, panel: Locator) -> None:
        find(panel, "button Start").click()
        expect(panel.locator(SAID)).to_contain_text("Done: iteration 1 of 10", timeout=120 * SECOND)
        output = typed(page, self.cell("ends = [")[0], "print('meanwhile')")
        expect(output).to_contain_text("meanwhile", timeout=60 * SECOND)
        expect(panel.locator(SAID)).to_contain_text("of 10")
        find(panel, "button Stop").click()
        expect(panel.locator(SAID)).to_have_text(re.compile("Done: [0-9] iterations."), timeout=60 * SECOND)

    def long_training(self, page: Page) -> Locator:
        """Start a cell that trains for long, and return where its outputs are."""
        place, source = self.cell("iterations=10, beta=1.0) as panel")
        output = typed(page, place, source.replace("iterations=10", "iterations=100"))
        expect(output.locator(SAID)).to_contain_text("Done: iteration 1 of 100", timeout=120 * SECOND)
        return output

    def test_its_buttons_work_while_a_cell_trains(self, page: Page) -> None:
        output = self.long_training(page)
        said = output.locator(SAID)
        for by in (by_keys, by_mouse):
            set_beta(output, by)
        by_mouse(output, "button Pause")
        expect(said).to_contain_text("Paused: iteration", timeout=60 * SECOND)
        by_keys(output, "button Pause")
        expect(said).to_contain_text("Done: iteration", timeout=60 * SECOND)
        by_mouse(output, "button Stop")
        expect(output.get_by_role("img", name="A training, iteration by iteration")).to_be_visible(timeout=60 * SECOND)
        expect(page.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(0)
        expect(output).not_to_contain_text("Error")

    def test_an_interrupt_ends_the_training_and_leaves_its_picture(self, page: Page) -> None:
        output = self.long_training(page)
        interrupt(page)
        expect(output).to_contain_text("KeyboardInterrupt", timeout=60 * SECOND)
        expect(output.get_by_role("img", name="A training, iteration by iteration")).to_be_visible()


def set_beta(panel: Locator, by: By) -> None:
    """Expect that the training goes on with the beta that the slider was moved to."""
    by(panel, "slider beta")
    beta = panel.get_by_role("slider").get_attribute("aria-valuetext")
    expect(panel.locator(SAID)).to_contain_text(f", beta {beta}.", timeout=60 * SECOND)
