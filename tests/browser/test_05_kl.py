"""Sliders, a prediction and an exercise that are answered, and a notebook that is opened again on another day."""

import re

from playwright.sync_api import Page, expect
from solved import solve

from .notebook import (
    SAID,
    SECOND,
    Notebook,
    controls_of,
    end_kernels,
    find,
    outputs,
    restart,
    run_all,
    save,
    try_setting,
    typed,
)


class TestKl(Notebook):
    name = "05_kl.ipynb"
    controls = ("slider mean", "slider width")

    def test_it_runs_again_in_the_same_kernel(self, page: Page) -> None:
        run_all(page)
        self.test_every_cell_runs_without_an_error_or_a_warning(page)

    def test_each_slider_changes_the_numbers_and_the_picture(self, page: Page) -> None:
        [panel] = filter(controls_of, outputs(page))
        for slider in self.controls:
            for part in (SAID, "img"):
                try_setting(panel, slider, part)

    def test_a_prediction_is_typed_and_revealed(self, page: Page) -> None:
        place, source = self.cell('predict("05.share-of-five"')
        expect(typed(page, place, source.replace("...", "50"))).to_contain_text("05.share-of-five: your guess is 50.")
        expect(typed(page, *self.cell('reveal("05.share-of-five"'))).to_contain_text("measured / guess")

    def test_a_solution_is_typed_and_progress_is_a_picture(self, page: Page) -> None:
        place, source = self.cell('check("05.k3"')
        expect(typed(page, place, solve(source))).to_contain_text("05.k3: solved.")
        shown = typed(page, place, "from refkl_lib import progress\n\nprogress()").get_by_role("img")
        expect(shown).to_have_accessible_name(re.compile("^Predictions: 1 of .* Exercises: 1 of .* solved"))

    def test_a_slider_says_why_nothing_follows(self, page: Page) -> None:
        place, source = self.cell("DirectionPanel(")
        busy = (
            source.replace("DirectionPanel(", "panel = DirectionPanel(")
            + "\ndisplay(panel)\nimport time; time.sleep(5)"
        )
        waits, ended = "waits for the kernel, which is busy", "its kernel has ended: run the cell again"
        panel = typed(page, place, busy)
        slider = find(panel, self.controls[0])
        said = slider.locator("xpath=ancestor::*[contains(@class, 'refkl-choice')]").get_by_role("status").last
        slider.press("ArrowRight")
        before = panel.locator(SAID).text_content()
        expect(said).to_have_text(waits)
        expect(said).to_have_text("")
        expect(panel.locator(SAID)).not_to_have_text(before)
        restart(page)
        slider.press("ArrowRight")
        expect(said).to_have_text(ended)
        typed(page, place, busy.replace("sleep(5)", "sleep(600)"))
        expect(said).to_have_text("")
        slider.press("ArrowRight")
        expect(said).to_have_text(waits)
        restart(page)
        expect(said).to_have_text(ended)

    def test_on_another_day_its_panels_are_pictures_until_their_cells_run(self, page: Page, lab: str) -> None:
        pictures = page.locator(".jp-OutputArea-output img").count()
        for _ in range(2):  # what is opened and saved without a run is also found again
            save(page)
            end_kernels(page.context.request, lab)
            page.reload()
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60 * SECOND)
            expect(page.locator(".jp-OutputArea-output img")).to_have_count(pictures, timeout=60 * SECOND)
            expect(page.get_by_text("Error displaying widget")).to_have_count(0)
            expect(page.get_by_role("slider")).to_have_count(0)
        place, source = self.cell("DirectionPanel(")
        expect(typed(page, place, source).get_by_role("slider")).to_have_count(len(self.controls), timeout=60 * SECOND)
