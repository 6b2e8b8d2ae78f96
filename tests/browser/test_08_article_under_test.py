"""A table of claims, whose links lead to the lessons."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect
from replay import CLAIMS_FIGURES, COPIES

from refkl_lib.lessons.claims.article import article_claims

from .notebook import SECOND, Notebook, take
from .screenshots import HEIGHT, WIDTHS

LESSONS = [claim.lesson.partition(".")[0] for claim in article_claims()]


class TestArticle(Notebook):
    name = "08_article_under_test.ipynb"
    controls = tuple(f"link {lesson}" for lesson in LESSONS)

    @pytest.fixture
    def table(self, page: Page) -> Locator:
        return page.get_by_role("table").filter(has_text="the article says")

    def test_its_figures_can_be_taken_elsewhere(self, page: Page, tmp_path: Path) -> None:
        """Elsewhere are test_claims.py and test_copies.py, which need not measure them again."""
        place, _ = self.cell('print(table["C5"].number)')
        take(page, place, "{row.claim.id: row.figures for row in table.rows}", tmp_path / CLAIMS_FIGURES)
        # As claim C2 calls it, so that the kernel still knows the answers.
        copies = "[copied('model'), copied('engine.module'), copied('model', gathered=True)]"
        copied = "__import__('refkl_lib.lessons.claims.trials', fromlist=['copied']).copied"
        take(page, place, f"(lambda copied: {copies})({copied})", tmp_path / COPIES)

    def test_the_table_has_a_row_for_each_claim(self, table: Locator) -> None:
        expect(table.get_by_role("rowheader", name=re.compile(r"^[A-E]\d$"))).to_have_count(len(LESSONS))

    def test_the_table_fits_a_narrow_window(self, page: Page, table: Locator) -> None:
        page.keyboard.press("Control+b")  # without the list of files
        page.set_viewport_size({"width": WIDTHS[1], "height": HEIGHT})
        area = table.locator("xpath=ancestor::*[contains(@class, 'jp-OutputArea-output')]")
        assert area.evaluate("area => area.scrollWidth <= area.clientWidth")
        page.set_viewport_size({"width": WIDTHS[0], "height": HEIGHT})

    def test_each_link_leads_to_a_notebook_that_is_there(self, table: Locator, folder: Path) -> None:
        targets = table.get_by_role("link").evaluate_all("links => links.map(link => new URL(link.href).pathname)")
        assert {Path(target).name for target in targets} == {f"{lesson}.ipynb" for lesson in LESSONS}
        assert all((folder / "notebooks" / Path(target).name).exists() for target in targets)

    def test_a_click_and_the_enter_key_open_it(self, page: Page, table: Locator) -> None:
        for lesson, follow in (("02_full_clone", Locator.click), ("05_kl", lambda link: link.press("Enter"))):
            page.get_by_role("tab", name=self.name).click()
            follow(table.get_by_role("link", name=lesson).first)
            opened = page.get_by_role("tab", name=f"{lesson}.ipynb")
            expect(opened).to_have_attribute("aria-selected", "true", timeout=60 * SECOND)
