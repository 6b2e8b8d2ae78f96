"""The Chinese edition: its catalogues say what the pages say, no more and no less, and the site shows it."""

import inspect
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po
from bs4 import Tag
from checkout import ROOT
from playwright.sync_api import sync_playwright

import refkl_lib
from tools.pdf import CHROMIUM
from tools.site import Chinese

CATALOGUES = ROOT / "docs/locale/zh_CN/LC_MESSAGES"
# A page is translated if it has a catalogue.
TRANSLATED = sorted(path.relative_to(CATALOGUES).with_suffix("").as_posix() for path in CATALOGUES.rglob("*.po"))
IN_SCOPE = {
    "docs/index",
    "docs/glossary",
    "docs/practitioners",
    "docs/several_hosts",
    "docs/library",
    "docs/instructor/plans",
    "docs/instructor/rooms",
    "docs/instructor/mistakes",
    "docs/instructor/cheat_sheet",
    "notebooks/00_start_here",
    "notebooks/08_article_under_test",
}
CODE, LINK, NUMBER = re.compile(r"`[^`]+`"), re.compile(r"\]\(([^)]*)\)"), re.compile(r"\d+(?:[.,]\d+)*")
CHINESE = re.compile(r"[一-鿿]")
# Lower-case words that stay: those Chinese practitioners write in English, a name, a formula.
KEPT = {"beta", "eʳ", "logits", "notebook", "rank", "verl"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The sentences of each translated page, extracted as `make translate` does."""
    folder = tmp_path_factory.mktemp("gettext")
    files = [next(ROOT.glob(f"{page}.*")).relative_to(ROOT) for page in TRANSLATED]
    command = [sys.executable, "-m", "sphinx", "--builder", "gettext", "--quiet", "-c", "docs", ".", folder, *files]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {page: [one.id for one in catalogue(folder / f"{page}.pot") if one.id] for page in TRANSLATED}


def catalogue(path: Path) -> Catalog:
    with path.open("rb") as file:
        return read_po(file)


def faults(sources: list[str], catalogue: Catalog) -> Iterator[str]:
    """What a page says and its catalogue does not, and the other way round."""
    known = {one.id: one for one in catalogue if one.id}
    for sentence in sources:
        if sentence not in known:
            yield f"missing: {sentence}"
        elif known[sentence].fuzzy:
            yield f"fuzzy, compare it with the page: {sentence}"
        elif not known[sentence].string:
            yield f"not translated: {sentence}"
    yield from (f"stale, the page no longer says: {sentence}" for sentence in known if sentence not in sources)
    yield from (f"obsolete: {one.id}" for one in catalogue.obsolete.values())


def losses(source: str, translation: str) -> Iterator[str]:
    """What a translation has to keep, and does not."""
    for kind, kept in [("code", code), ("links", targets), ("numbers", numbers)]:
        if kept(source) != kept(translation):
            yield f"{kind} {kept(source)} became {kept(translation)}: {source}"
    if not CHINESE.search(translation) and not (is_name(source) and words(source) == words(translation)):
        yield f"not Chinese: {translation}"


def code(text: str) -> set[str]:
    return set(CODE.findall(text))


def targets(text: str) -> list[str]:
    return sorted(LINK.findall(text))


def numbers(text: str) -> set[str]:
    return set(NUMBER.findall(prose(text)))


def is_name(text: str) -> bool:
    """Tell whether there is nothing to translate: code, numbers, formulas, names with a capital or a digit."""
    plain = [word for word in words(re.sub(r"KL\(.*?\)", "", prose(text))) if word.isalpha() and word.islower()]
    return all(word in KEPT or len(word) == 1 for word in plain)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def prose(text: str) -> str:
    """A text without its code and without the addresses of its links."""
    return LINK.sub("]", CODE.sub("", text))


def test_the_pages_that_are_to_be_translated_have_a_catalogue():
    assert set(TRANSLATED) >= IN_SCOPE


@pytest.mark.parametrize("page", TRANSLATED)
def test_a_catalogue_says_what_its_page_says(sources, page):
    assert sources[page]
    behind = list(faults(sources[page], catalogue(CATALOGUES / f"{page}.po")))
    assert not behind, "`make translate`, then look at\n" + "\n".join(behind)


@pytest.mark.parametrize("page", TRANSLATED)
def test_a_translation_keeps_code_links_and_numbers(page):
    sentences = [one for one in catalogue(CATALOGUES / f"{page}.po") if one.id and one.string]
    lost = [loss for one in sentences for loss in losses(one.id, one.string)]
    assert not lost, "\n".join(lost)


def test_a_catalogue_that_fell_behind_is_noticed():
    behind = Catalog()
    behind.add("The policy.", "策略模型。")
    behind.add("The reference.", "")
    behind.add("The bill.", "账本。", flags=["fuzzy"])
    behind.add("The ledger.", "账本。")
    behind.obsolete["The meter."] = behind.add("The meter.", "仪表。")
    behind.delete("The meter.")
    assert list(faults(["The policy.", "The reference.", "The bill.", "The KL."], behind)) == [
        "not translated: The reference.",
        "fuzzy, compare it with the page: The bill.",
        "missing: The KL.",
        "stale, the page no longer says: The ledger.",
        "obsolete: The meter.",
    ]


@pytest.mark.parametrize(
    ("source", "translation", "lost"),
    [
        ("Call `eval()` 3 times.", "调用 `eval()` 3 次。", None),
        ("Call `eval()`.", "调用 `train()`。", "code"),
        ("See [01](01.ipynb).", "见 [01](02.ipynb)。", "links"),
        ("513 MiB, 1.5 GiB", "513 MiB，15 GiB 内存", "numbers"),
        ("OpenRLHF", "OpenRLHF", None),
        ("KL(policy‖reference)", "KL(policy‖reference)", None),
        ("`beta`, 0.1", "`beta`, 0.1", None),
        ("in the loss", "in the loss", "not Chinese"),
        ("TRL GRPO", "TRL RLOO", "not Chinese"),
    ],
)
def test_what_a_translation_lost_is_noticed(source, translation, lost):
    assert [loss.startswith(lost) for loss in losses(source, translation)] == ([True] if lost else [])


@pytest.mark.parametrize("page", TRANSLATED)
def test_every_translation_is_on_its_page(pages, page):
    text = squeezed(pages[f"zh/{page}.html"].get_text())
    said = [one.string for one in catalogue(CATALOGUES / f"{page}.po") if one.id]
    assert [sentence for sentence in said if squeezed(sentence) not in text] == []


def squeezed(text: str) -> str:
    """A text without spaces, the addresses of its links and the marks of code and emphasis."""
    return re.sub(r"[\s*`\[\]]", "", LINK.sub("", text))


@pytest.mark.parametrize("page", TRANSLATED)
def test_code_outputs_and_pictures_are_shared(site, pages, page):
    english, chinese = (pages[name].find("article") for name in (f"{page}.html", f"zh/{page}.html"))
    for part in ("pre", ".cell_output"):
        assert [one.get_text() for one in chinese.select(part)] == [one.get_text() for one in english.select(part)]
    assert pictures(chinese, site / f"zh/{page}.html") == pictures(english, site / f"{page}.html")


def pictures(article: Tag, page: Path) -> list[str]:
    """A picture may be a file beside the page, or written into it."""
    sources = [image["src"] for image in article.find_all("img")]
    return [source if source.startswith("data:") else digest(page.parent / source) for source in sources]


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_notebooks_have_pictures_to_share(pages):
    assert all(pages[f"zh/{page}.html"].select(".cell_output img") for page in TRANSLATED if "notebooks" in page)


def test_each_page_tells_its_language(pages):
    for name, page in pages.items():
        article = page.find("article")
        if article is None:  # the first page, which leads on, and the search
            continue
        inside = name.removeprefix("zh/").removesuffix(".html")
        assert page.html["lang"] == ("zh-CN" if name.startswith("zh/") else "en")
        [whole] = article.find_all("section", recursive=False)
        assert whole.get("lang") == ("en" if name.startswith("zh/") and inside not in TRANSLATED else None), name


@pytest.mark.parametrize("page", ["docs/library", "docs/instructor/mistakes"])
def test_lists_that_stay_in_english_say_so(pages, page):
    parts = pages[f"zh/{page}.html"].select('section[lang="en"]')
    assert parts
    assert not any(CHINESE.search(part.get_text()) for part in parts)
    english = pages[f"{page}.html"]
    assert english.select("section[lang]") == []
    assert [part.get_text() for part in parts] == [english.find(id=part["id"]).get_text() for part in parts]


@pytest.mark.parametrize("edition", ["", "zh/"])
def test_signatures_are_whole(pages, edition):
    page = pages[f"{edition}docs/library.html"]
    functions = {name: getattr(refkl_lib, name) for name in refkl_lib.__all__}
    for name in filter(lambda name: inspect.isfunction(functions[name]), functions):
        shown = squeezed(page.find(id=f"refkl_lib.{name}").get_text())
        assert [one for one in inspect.signature(functions[name]).parameters if f"{one}:" not in shown] == []


def test_each_page_leads_to_the_same_page_in_the_other_language(pages):
    for name in pages.keys() - {"index.html", "zh/index.html"}:  # those lead on at once
        link = pages[name].select_one("a.language")
        other = name.removeprefix("zh/") if name.startswith("zh/") else f"zh/{name}"
        assert posixpath.normpath(posixpath.join(posixpath.dirname(name), link["href"])) == other
        assert link["hreflang"] == pages[other].html["lang"]


def test_what_is_folded_below_an_exercise_is_named_in_the_language_of_its_page(pages):
    def titles(page: str) -> list[str]:
        return [title for one in pages[page].select("details > summary") if "08." in (title := one.get_text())]

    english, chinese = titles("notebooks/08_article_under_test.html"), titles("zh/notebooks/08_article_under_test.html")
    assert english[0].startswith("Hints for 08.")
    assert [title for title in chinese if not CHINESE.search(title)] == []
    assert [re.findall(r"08\.\S+", title) for title in chinese] == [re.findall(r"08\.\S+", title) for title in english]


def test_the_site_is_named_in_its_language(pages):
    assert pages["zh/docs/glossary.html"].title.get_text() == "术语表 — 参考模型工具包"
    assert pages["docs/glossary.html"].title.get_text() == "Glossary — The reference-model kit"


def test_a_chinese_text_is_cut_into_what_a_query_asks_for():
    found = Chinese({}).split("参考模型，KL 惩罚")
    assert {"参考模型", "参考", "考模", "模型", "KL", "惩罚"} <= set(found)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)")
@pytest.mark.parametrize("query", ["参考模型", "分片", "KL 惩罚", "leash"])
def test_the_search_finds_chinese_words(site, query):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"{(site / 'zh/search.html').as_uri()}?q={query}")
        page.locator("#search-results a", has_text="术语表").first.wait_for()
        browser.close()
