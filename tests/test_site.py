"""The site as a reader has it: built without a warning, then opened from a folder, with and without JavaScript."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from checkout import ROOT
from playwright.sync_api import Browser, Page, sync_playwright
from test_room import block

import refkl_lib
from refkl_lib.lessons.course import exercises, solution
from tools.pdf import CHROMIUM
from tools.site import TITLES, anchor, with_links, with_solutions

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [f"notebooks/{path.stem}.html" for path in NOTEBOOKS]
MIB = 2**20
# One page of each kind.
KINDS = [
    "docs/index.html",
    "docs/library.html",
    "docs/practitioners.html",
    "docs/instructor/mistakes.html",
    LESSONS[-1],
    "zh/docs/practitioners.html",
    f"zh/{LESSONS[0]}",
]
TESTED_BY_AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}

LEAD_ON = {"index.html", "zh/index.html"}  # to the page of this name in docs, at once

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)")


@dataclass
class Visit:
    """What was seen of a page."""

    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    widths: dict[int, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_every_notebook_and_page_is_in_it(pages):
    sources = [*NOTEBOOKS, *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    assert {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in sources} <= pages.keys()


def test_its_first_page_leads_to_the_course(site, pages):
    assert pages["index.html"].find("a")["href"] == "docs/index.html"
    linked = {link.get("href") for link in pages["docs/index.html"].find("article").find_all("a")}
    assert {f"../{lesson}" for lesson in LESSONS} <= linked


def test_no_link_is_dead(site, pages):
    ids = {name: {tag["id"] for tag in page.find_all(id=True)} for name, page in pages.items()}
    dead = [f"{name}: {link}" for name, page in pages.items() for link in links(page) if is_dead(link, name, site, ids)]
    assert dead == []


def links(page: BeautifulSoup) -> Iterator[str]:
    for tag in page.find_all(["a", "img", "link", "script"]):
        address = tag.get("href") or tag.get("src") or ""
        if not re.match(r"data:|mailto:|#$", address):
            yield address


def is_dead(link: str, page: str, site: Path, ids: dict[str, set[str]]) -> bool:
    """Tell whether a link leads to no file of the site, or to no place of a page; other sites are not asked."""
    parts = urlsplit(link)
    if parts.scheme:
        return False
    target = ((site / page).parent / unquote(parts.path)).resolve() if parts.path else site / page
    name = target.relative_to(site.resolve()).as_posix() if parts.path else page
    return not target.is_file() or (name in ids and bool(parts.fragment) and unquote(parts.fragment) not in ids[name])


@pytest.mark.parametrize(
    ("link", "dead"),
    [
        ("b.html", False),
        ("b.html#there", False),
        ("#here", False),
        ("https://example.org/nothing", False),
        ("c.html", True),
        ("b.html#here", True),
        ("#there", True),
    ],
)
def test_a_dead_link_is_noticed(tmp_path, link, dead):
    (tmp_path / "b.html").touch()
    (tmp_path / "a.html").touch()
    assert is_dead(link, "a.html", tmp_path, {"a.html": {"here"}, "b.html": {"there"}}) == dead


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_lesson_says_all_that_its_notebook_says(pages, path):
    article = pages[f"notebooks/{path.stem}.html"].find("article")
    text = squeezed(article.get_text())
    for cell in cells(path, "code"):
        assert squeezed(cell.source) in text
        assert all(squeezed(output.text) in text for output in cell.outputs if output.output_type == "stream")
    pictures = sum(
        "<img" in output.get("data", {}).get("text/html", "") for cell in cells(path, "code") for output in cell.outputs
    )
    assert len(article.select(".cell_output img[alt]")) >= pictures
    titles = [
        re.sub(r"^#+ |[*`]", "", line)
        for cell in cells(path, "markdown")
        for line in cell.source.split("\n")
        if re.match("#+ ", line)
    ]
    assert [title for title in titles if squeezed(title) not in text] == []


def test_every_exercise_has_its_hints_and_its_solution_folded(pages):
    for name, exercise in exercises().items():
        lesson = next(lesson for lesson in LESSONS if Path(lesson).name.startswith(name[:2]))
        folded = [part for part in pages[lesson].find_all("details") if name in part.summary.text]
        hints, code = (squeezed(part.get_text()) for part in folded)
        assert not any(part.has_attr("open") for part in folded)
        assert all(squeezed(hint.replace("`", "")) in hints.replace("`", "") for hint in exercise.hints)
        assert squeezed(str(solution(name))) in code


def test_a_solution_goes_below_the_cell_that_checks_it():
    source = 'def k3(p, q):\n    """Return it."""\n    ...\n\n\ncheck("05.k3", k3)'
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1"), nbformat.v4.new_code_cell(source)])
    kinds = [cell.cell_type for cell in with_solutions(made, TITLES).cells]
    assert kinds == ["code", "code", "markdown"]


def test_a_link_in_an_output_leads_to_the_page():
    html = '<a href="02_full_clone.ipynb#Two-locks">2</a> <a href="https://example.org/a.ipynb">b</a> a.ipynb'
    output = nbformat.v4.new_output("display_data", {"text/html": html})
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    [shown] = with_links(made).cells[0].outputs
    assert shown.data["text/html"] == html.replace("clone.ipynb#", "clone.html#")


def test_a_link_finds_a_heading_as_in_jupyter():
    assert anchor("What `eval()` is *for*") == "What-eval()-is-for"


@pytest.mark.parametrize(
    ("host", "binder", "colab"),
    [
        ("github.com", "gh/you/kit", ["colab.research.google.com"]),
        ("gitlab.com", "gl/you%2Fkit", []),
        ("gitee.com", "git/https%3A//gitee.com/you/kit", []),
    ],
)
def test_a_site_with_a_repository_leads_to_the_notebook_with_a_kernel(tmp_path, host, binder, colab):
    *variables, make, target = block("buttons").split()
    assert (make, target) == ("make", "site")
    built = one_page(tmp_path, dict(variable.replace("github.com", host).split("=") for variable in variables))
    assert built.returncode == 0
    assert "Provider" not in built.stderr  # a warning of the theme's, and so the end of `make site`
    page = BeautifulSoup((tmp_path / "notebooks/02_full_clone.html").read_text(), "html.parser")
    found = [link["href"] for link in page.select(".dropdown-launch-buttons a")]
    assert [link for link in found if "02_full_clone.ipynb" not in unquote(link)] == []
    assert [urlsplit(link).netloc for link in found] == ["mybinder.org", "hub.example.org", *colab]
    assert found[0] == f"https://mybinder.org/v2/{binder}/main?urlpath=lab/tree/notebooks/02_full_clone.ipynb"


def test_a_hub_without_a_repository_is_not_overlooked(tmp_path):
    built = one_page(tmp_path, {"REFKL_HUB": "https://hub.example.org"})
    assert built.returncode != 0
    assert "set REFKL_REPOSITORY as well" in built.stderr


def one_page(folder, variables):
    only = ["-D", "include_patterns=docs/index.md,notebooks/02_full_clone.ipynb"]
    command = [sys.executable, "-m", "sphinx", "--quiet", "-c", "docs", *only, ".", folder]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


def test_lessons_follow_each_other(pages):
    for lesson, following in pairwise(LESSONS):
        assert pages[lesson].select_one("a.right-next")["href"] == Path(following).name
        assert pages[following].select_one("a.left-prev")["href"] == Path(lesson).name


def test_the_library_page_has_every_public_name(pages):
    documented = {tag["id"] for tag in pages["docs/library.html"].find_all("dt", id=True)}
    assert {f"refkl_lib.{name}" for name in refkl_lib.__all__} <= documented


def test_a_signature_has_its_parameters_in_order(pages):
    signature = pages["docs/library.html"].find(id="refkl_lib.load_model")
    shown = [parameter.text for parameter in signature.select(".sig-param") if parameter.text != "*"]
    assert [text.split(":")[0] for text in shown] == list(inspect.signature(refkl_lib.load_model).parameters)


def test_the_list_of_mistakes_has_all_of_them(pages):
    text = squeezed(pages["docs/instructor/mistakes.html"].find("article").get_text())
    plain = [
        squeezed(re.sub("[`*]", "", mistake.says)) for exercise in exercises().values() for mistake in exercise.mistakes
    ]
    assert plain
    assert [says for says in plain if says not in re.sub("[`*]", "", text)] == []


@pytest.mark.parametrize(("heading", "minutes"), [("90-minutes", 90), ("Half-a-day", 240)])
def test_a_plan_fills_its_time(pages, heading, minutes):
    table = pages["docs/instructor/plans.html"].find(id=heading).find_next("table")
    assert sum(int(row.td.text) for row in table.tbody.find_all("tr")) == minutes


def test_half_a_day_names_every_notebook(pages):
    table = pages["docs/instructor/plans.html"].find(id="Half-a-day").find_next("table")
    assert [path.stem for path in NOTEBOOKS if path.stem not in table.text] == []


@pytest.fixture(scope="module")
def visits(site: Path, pages: dict[str, BeautifulSoup], browser: Browser) -> dict[str, Visit]:
    """Every page, opened once: what it asked for, what it complained of, and how wide it was in three windows."""
    names, visits = list(pages), {}
    for some in (names[start : start + 6] for start in range(0, len(names), 6)):
        opened = [(browser.new_page(), visits.setdefault(name, Visit())) for name in some]
        for name, (page, visit) in zip(some, opened, strict=True):
            page.on("request", lambda request, visit=visit: visit.asked.append(request.url))
            page.on("console", lambda said, visit=visit: visit.complaints.extend([said.text] * (said.type == "error")))
            page.goto((site / name).as_uri())
        opened[-1][0].wait_for_timeout(500)  # for what a page asks late
        for name, (page, visit) in zip(some, opened, strict=True):
            if name not in LEAD_ON:
                visit.widths = {width: width_in(page, width) for width in (390, 800, 1280)}
            page.close()
    return visits


def width_in(page: Page, window: int) -> int:
    page.set_viewport_size({"width": window, "height": 900})
    return page.evaluate("document.documentElement.scrollWidth")


@in_a_browser
def test_a_page_asks_nothing_of_a_network_and_weighs_little(visits):
    for name, visit in visits.items():
        files = {urlsplit(address).path for address in visit.asked if address.startswith("file:")}
        assert [address for address in visit.asked if not address.startswith(("file:", "data:"))] == []
        assert visit.complaints == [], name
        assert files, name
        assert sum(Path(unquote(file)).stat().st_size for file in files) < 2 * MIB, name


@in_a_browser
def test_no_page_is_wider_than_its_window(visits):
    wide = [(name, visit.widths) for name, visit in visits.items() if any(w > at for at, w in visit.widths.items())]
    assert wide == []
    assert {name for name, visit in visits.items() if not visit.widths} == LEAD_ON


@in_a_browser
def test_without_javascript_text_and_pictures_are_there(site, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    for path, lesson in zip(NOTEBOOKS, LESSONS, strict=True):
        page.goto((site / lesson).as_uri())
        text = squeezed(page.locator("article").inner_text())
        assert all(squeezed(cell.source) in text for cell in cells(path, "code"))
        for picture in page.locator(".cell_output img").all():
            assert picture.is_visible()
            assert picture.evaluate("picture => picture.naturalWidth") > 0
    page.locator("summary").first.click()
    assert page.locator("details[open]").count() == 1
    context.close()


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_accessible(site, browser, scheme):
    page = browser.new_page(color_scheme=scheme)
    for name in KINDS:
        page.goto((site / name).as_uri())
        assert page.locator("html").get_attribute("data-theme") == scheme
        violations = Axe().run(page, options=TESTED_BY_AXE).response["violations"]
        serious = [one for one in violations if one["impact"] in ("serious", "critical")]
        assert [(name, one["id"], one["nodes"][0]["html"]) for one in serious] == []
    page.close()


@in_a_browser
def test_the_search_finds_a_word_of_a_lesson(site, browser):
    page = browser.new_page()
    page.goto(f"{(site / 'search.html').as_uri()}?q=leash")
    page.locator("#search-results a", has_text="Why a reference").first.wait_for()
    page.close()


@in_a_browser
def test_lessons_are_printed_and_the_cheat_sheet_is_one_page(site, tmp_path):
    asked = [site / LESSONS[0], site / "docs/instructor/cheat_sheet.html"]
    subprocess.run([sys.executable, "-m", "tools.pdf", *asked, "--to", tmp_path], cwd=ROOT, check=True)
    lesson, sheet = (tmp_path / f"{page.stem}.pdf" for page in asked)
    assert lesson.read_bytes().startswith(b"%PDF")
    assert sheets(lesson) > 3
    assert sheets(sheet) == 1


def sheets(printed: Path) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes()))


@in_a_browser
def test_on_paper_there_is_the_lesson_alone(site, browser):
    page: Page = browser.new_page()
    page.goto((site / LESSONS[-1]).as_uri())
    page.emulate_media(media="print")
    assert page.locator("article h1").is_visible()
    for part in (".bd-sidebar-primary", ".bd-sidebar-secondary", ".bd-header-article", "details"):
        assert not page.locator(part).first.is_visible()
    page.close()
