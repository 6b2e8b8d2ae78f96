"""A training with its leash in the reader's hand."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from .notebook import SAID, SECOND, By, Notebook, by_both, find, interrupt, typed


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

    @by_both
    def test_a_training_is_started_held_and_stopped(self, panel: Locator, by: By) -> None:
        said, reference = panel.locator(SAID), find(panel, "combobox reference")
        by(panel, "combobox reference")
        by(panel, "button Start")
        expect(said).to_contain_text(f"its reference ({reference.input_value()})")
        expect(said).to_contain_text("Done: iteration 1 of 10, beta", timeout=120 * SECOND)
        by(panel, "slider beta")
        beta = panel.get_by_role("slider").get_attribute("aria-valuetext")
        expect(said).to_contain_text(f", beta {beta}.", timeout=60 * SECOND)
        by(panel, "button Pause")
        expect(said).to_contain_text("Paused: iteration", timeout=60 * SECOND)
        expect(panel.get_by_role("img", name="KL, nats a text")).to_be_visible()
        by(panel, "button Pause")
        by(panel, "button Stop")
        expect(said).to_have_text(re.compile("Done: [0-9]+ iterations."), timeout=60 * SECOND)

    @by_both
    def test_what_cannot_work_says_why_in_the_panel(self, panel: Locator, by: By) -> None:
        by(panel, "combobox sync it")
        by(panel, "button Start")
        alert = panel.get_by_role("alert").filter(has_text="cannot move towards the policy")
        expect(alert).to_be_visible(timeout=120 * SECOND)
        find(panel, "combobox sync it").select_option("never")

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

    @by_both
    def test_its_buttons_work_while_a_cell_trains(self, page: Page, by: By) -> None:
        output = self.long_training(page)
        said = output.locator(SAID)
        by(output, "slider beta")
        beta = output.get_by_role("slider").get_attribute("aria-valuetext")
        expect(said).to_contain_text(f", beta {beta}.", timeout=60 * SECOND)
        by(output, "button Pause")
        expect(said).to_contain_text("Paused: iteration", timeout=60 * SECOND)
        by(output, "button Stop")
        expect(output.get_by_role("img", name="A training, iteration by iteration")).to_be_visible(timeout=60 * SECOND)
        expect(page.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(0)
        expect(output).not_to_contain_text("Error")

    def test_an_interrupt_ends_the_training_and_leaves_its_picture(self, page: Page) -> None:
        output = self.long_training(page)
        interrupt(page)
        expect(output).to_contain_text("KeyboardInterrupt", timeout=60 * SECOND)
        expect(output.get_by_role("img", name="A training, iteration by iteration")).to_be_visible()
