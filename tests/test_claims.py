"""The article under test: every claim has a row and the verdict of its figures, and each can come out otherwise."""

import copy
import re
import sys
from functools import cache
from html.parser import HTMLParser

import nbformat
import pytest
from checkout import ROOT
from replay import CLAIMS_FIGURES, kept

from refkl_lib import article_claims, examine_claims, verdicts_picture
from refkl_lib.lessons.claims.article import SECTIONS, Findings
from refkl_lib.lessons.claims.claim import CONDITION, FAILS, GB, HOLDS, VERDICTS, Claim, Figures, Finding, within
from refkl_lib.view import claims as view
from refkl_lib.view.claims import LOOKS, ClaimsTable, claims_html, verdicts_figure
from tools.lint import anchors

# What a first look at the article expected, or, where the measurement said otherwise, what it said.
EXPECTED = {
    "A1": HOLDS,
    "A2": CONDITION,
    "A3": HOLDS,
    "A4": CONDITION,
    "A5": FAILS,
    "A6": CONDITION,
    "B1": CONDITION,
    "B2": FAILS,
    "B3": CONDITION,
    "B4": HOLDS,
    "B5": CONDITION,
    "B6": HOLDS,
    "C1": HOLDS,
    "C2": FAILS,
    "C3": CONDITION,
    "C4": CONDITION,
    "C5": FAILS,
    "C6": CONDITION,
    "D1": HOLDS,
    "D2": FAILS,
    "D3": FAILS,
    "D4": CONDITION,
    "D5": HOLDS,
    "E1": FAILS,
    "E2": CONDITION,
}
RAISED = "RuntimeError: Cannot access full parameter outside of forward/backward"
# Figures that nobody measured, in place of those that were, and the verdict that they must give.
DOCTORED = [
    ("A1", {"shared": 1}, FAILS),
    ("A1", {"trains": 1}, FAILS),
    ("A1", {"in training mode": 1}, FAILS),
    ("A1", {"storages of the copy": 59}, CONDITION),
    ("A2", {"graph from embeddings": False}, HOLDS),
    ("A2", {"reference weights with a gradient": 56}, FAILS),
    ("A2", {"graph from token ids": True}, FAILS),
    ("A3", {"eval": 0.2}, FAILS),
    ("A3", {"running mean moved": 0.1}, FAILS),
    ("A3", {"train": 0.0}, CONDITION),
    ("A4", {"step": 2.0}, HOLDS),
    ("A4", {"weights": 1.0}, FAILS),
    ("A5", {"fp32": 14 * GB}, HOLDS),
    ("A6", {"β = 1, synced": 1.3, "buffers left behind": 0}, HOLDS),
    ("A6", {"gap after a sync": 0.5}, FAILS),
    ("B1", {"SmolLM2-135M": 5.0, "Qwen2.5-7B": 5.0, "least": 4.8, "most": 5.2}, HOLDS),
    ("B1", {"most": 0.9}, FAILS),
    ("B2", {"another forward": 42}, HOLDS),
    ("B2", {"another forward": 6}, CONDITION),
    ("B3", {"PiSSA": 0.0, "OLoRA": 0.0, "biases train": 0.0, "embeddings train": 0.0, "merged in bf16": 0.0}, HOLDS),
    ("B3", {"LoRA": 1e-9}, FAILS),
    ("B4", {"clone": 2**20}, FAILS),
    ("B5", {"clone": 14 * GB, "adapter": 7 * GB}, HOLDS),
    ("B5", {"adapter": 2 * GB}, FAILS),
    ("B6", {"others with a gradient": 1}, FAILS),
    ("B6", {"base unchanged": False}, FAILS),
    ("B6", {"off by, no_grad": 1.5}, CONDITION),
    ("C1", {"shares": {1: (1.0, 1.0), 2: (0.5, 0.5), 4: (0.25, 1.0)}}, FAILS),
    ("C2", {"deepcopy": [RAISED, RAISED]}, HOLDS),
    ("C2", {"deepcopy": ["succeeds", RAISED]}, CONDITION),
    ("C3", {"device_map, ZeRO-3": "succeeds"}, HOLDS),
    ("C3", {"the same weights": False}, FAILS),
    ("C4", {"ranks": {"before": 8, "after": 0, "written": 8, "forward": "succeeds"}}, HOLDS),
    ("C4", {"same logits": False}, FAILS),
    ("C4", {"kept": 6 * 2**20}, FAILS),
    ("C5", {"files that name it": 1}, HOLDS),
    ("C5", {"files that name it": 1, "models on two ranks": 2}, CONDITION),
    ("C6", {"plain": 0.5}, HOLDS),
    ("C6", {"partitioned": 1.0}, FAILS),
    ("D1", {"mean": 0.0}, FAILS),
    ("D2", {"as printed": 3.0, "KL(π‖π_ref)": 3.0}, HOLDS),
    ("D3", {"batchmean": [2.0, 2.1], "per token": [2.0, 2.1], "padding": 0.0}, HOLDS),
    ("D3", {"padding": 0.0}, CONDITION),
    ("D4", {"all under no_grad": 0.1}, HOLDS),
    ("D4", {"the reference alone": 0.0}, FAILS),
    ("D5", {"kl": {"clone": (0.0, 0.1), "adapter": (0.0, 0.1), "zero3": (0.0, 0.2)}}, FAILS),
    ("D5", {"kl": {"clone": (0.0, 0.0), "adapter": (0.0, 0.0), "zero3": (0.0, 0.0)}}, FAILS),
    ("E1", {"the rule is right": {"below 20B": True, "above": True}}, HOLDS),
    ("E1", {"the rule is right": {"below 20B": True, "above": False}}, CONDITION),
    ("E2", {"peak": {"full": 3, "PEFT": 2, "ZeRO-3": 1}, "pass": {"full": 1.0, "PEFT": 2.0, "ZeRO-3": 3.0}}, HOLDS),
    ("E2", {"pass": {"full": 9.0, "PEFT": 2.0, "ZeRO-3": 3.0}}, FAILS),
]
CLAIMS = {claim.id: claim for claim in article_claims()}
NEEDS_RANKS = pytest.mark.skipif(sys.platform != "linux", reason="real ranks need Linux")

pytestmark = pytest.mark.usefixtures("nothing_left")


def case(id: str, *values: object) -> object:
    return pytest.param(id, *values, marks=NEEDS_RANKS if CLAIMS[id].ranks else ())


@cache
def found(id: str) -> Finding:
    """Each claim is measured once, however many tests look at it: in the browser, by notebook 08, or else here."""
    figures = measured_in_the_browser().get(id)
    return CLAIMS[id].examine() if figures is None else Finding(CLAIMS[id], figures)


@cache
def measured_in_the_browser() -> dict[str, Figures]:
    return kept(CLAIMS_FIGURES) or {}


def test_every_claim_of_the_article_has_a_row_in_its_order():
    assert list(CLAIMS) == list(EXPECTED)
    assert {id for id, _, _ in DOCTORED} == set(EXPECTED)
    assert {claim.id[0] for claim in CLAIMS.values()} == SECTIONS.keys()


def test_no_two_claims_say_the_same():
    for what in ("says", "name", "measure", "judge"):
        assert len({getattr(claim, what) for claim in CLAIMS.values()}) == len(CLAIMS)


@pytest.mark.parametrize("id", [case(id) for id in EXPECTED])
def test_a_measured_claim_has_the_verdict_of_its_figures(id):
    assert found(id).verdict == EXPECTED[id]
    assert 20 < len(found(id).number) < 240
    assert "nan" not in found(id).number


@pytest.mark.parametrize(("id", "changes", "verdict"), [case(*doctored) for doctored in DOCTORED])
def test_other_figures_give_another_verdict(id, changes, verdict):
    measured, judge = found(id), CLAIMS[id].judge
    before = copy.deepcopy(measured.figures)
    assert changes.keys() <= measured.figures.keys()
    assert judge(measured.figures | changes) == verdict != measured.verdict
    assert measured.figures == before


def test_which_figures_decide_is_said():
    figures = found("A4").figures
    assert "5.4 N at the peak" in found("A4").number
    assert "2.0 N at the peak" in CLAIMS["A4"].shows(figures | {"step": 2.0})


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_lesson_is_there(claim):
    name, _, heading = claim.lesson.partition("#")
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    assert heading in anchors(notebook)


def test_claims_are_chosen_by_id_and_by_section():
    assert [claim.id for claim in article_claims("B", "A5")] == ["A5", "B1", "B2", "B3", "B4", "B5", "B6"]
    with pytest.raises(ValueError, match="there is no claim 'F1'; there are A, A1, "):
        article_claims("A1", "F1")


@pytest.mark.parametrize(("value", "near"), [(9.1, True), (10.9, True), (8.9, False), (11.1, False), (-10, False)])
def test_within_has_two_sides(value, near):
    assert within(value, 10) is near


# The table, of claims that take no time


def made_up(id="A1", verdict=HOLDS, number="1.0 GiB", ranks=False):
    lesson = "02_full_clone.ipynb#Two-locks"
    return Claim(id, "name", "a < b", lesson, lambda: {"n": number}, lambda f: verdict, lambda f: f["n"], ranks)


def table(*claims):
    return ClaimsTable.of(claims)


THREE = tuple(made_up(id, verdict) for id, verdict in zip(("A1", "A2", "C1"), VERDICTS, strict=True))


def test_findings_as_text_are_a_table():
    findings = Findings.of(THREE)
    assert repr(findings).splitlines() == [
        "A1  holds                   a < b",
        "    1.0 GiB (02_full_clone)",
        "A2  holds with a condition  a < b",
        "    1.0 GiB (02_full_clone)",
        "C1  does not hold           a < b",
        "    1.0 GiB (02_full_clone)",
        "Of 3 claims 1 hold, 1 hold with a condition, 1 do not hold.",
    ]
    assert findings["C1"].verdict == FAILS
    assert findings.counts == dict.fromkeys(VERDICTS, 1)
    assert repr(findings["A1"]) == "A1  holds                   1.0 GiB"


class Cells(HTMLParser):
    """The cells of a table: tag, attributes, text."""

    def __init__(self, html):
        super().__init__()
        self.cells, self.links = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag in ("th", "td", "caption"):
            self.cells.append([tag, dict(attrs), ""])
        self.links += [value for name, value in attrs if name == "href"]

    def handle_data(self, data):
        self.cells[-1][2] += data


def test_the_html_is_a_table_whose_headers_have_a_scope():
    found = Cells(claims_html(table(*THREE)))
    headers = [(attributes["scope"], text) for tag, attributes, text in found.cells if tag == "th"]
    assert [text for scope, text in headers if scope == "col"] == list(view.COLUMNS)
    assert [text for scope, text in headers if scope == "row"] == ["A1", "A2", "C1"]
    assert [text for scope, text in headers if scope == "rowgroup"] == [f"{key}. {SECTIONS[key]}" for key in "AC"]
    texts = [text for tag, _, text in found.cells if tag == "td"]
    assert texts[:4] == ["a < b", "✓ holds", "1.0 GiB", "02_full_clone"]
    assert found.links == ["02_full_clone.ipynb#Two-locks"] * 3


def test_the_html_breaks_long_words_and_its_columns_share_the_width():
    html = claims_html(table(*THREE))
    assert html.count("overflow-wrap:anywhere") == html.count("<td")
    assert "table-layout:fixed" in html
    assert sum(int(share) for share in re.findall(r'<col style="width:(\d+)%">', html)) == 100


def test_the_html_can_be_read_in_both_themes():
    html = claims_html(table(*THREE))
    assert "background" not in html
    assert not any(f";color:{color}" in html or f'"color:{color}' in html for _, color, _ in LOOKS.values())


def test_the_plain_text_of_the_table_does_not_change_with_its_figures():
    one, other = (table(made_up(number=number))._repr_mimebundle_() for number in ("1.0 GiB", "2.0 GiB"))
    assert one["text/plain"] == other["text/plain"]
    assert one["text/plain"].startswith("A1  holds                   a < b\nOf 1 claims 1 hold")
    assert one["text/html"] != other["text/html"]


def test_each_finding_is_told_as_it_comes(monkeypatch):
    told = []
    monkeypatch.setattr(view, "article_claims", lambda *ids: THREE)
    assert list(examine_claims(tell=told.append).rows) == told
    assert [finding.claim.id for finding in told] == ["A1", "A2", "C1"]


def test_where_no_ranks_run_their_claims_are_left_out_unless_named(monkeypatch):
    def refuse():
        raise RuntimeError("real ranks need Linux")

    monkeypatch.setattr(view, "check_system", refuse)
    monkeypatch.setattr(view, "article_claims", lambda *ids: (made_up("A1"), made_up("C1", ranks=True)))
    assert [row.claim.id for row in examine_claims().rows] == ["A1"]
    assert [row.claim.id for row in examine_claims("A1", "C1").rows] == ["A1", "C1"]


# The picture


def test_each_claim_has_a_box_with_its_sign_and_a_line_of_its_own():
    [axes] = verdicts_figure(table(*THREE)).axes
    texts = [text.get_text() for text in axes.texts]
    assert {"✓ A1", "± A2", "✗ C1", "A. Full fine-tuning: clone the model"} <= set(texts)
    assert len({box.get_linestyle() for box in axes.patches}) == len(VERDICTS)
    assert axes.get_title(loc="left").startswith("Of 3 claims 1 hold, ")


def test_the_picture_has_a_text():
    alt = verdicts_picture(table(*THREE)).alt
    assert alt.endswith("holds: A1; holds with a condition: A2; does not hold: C1.")


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="examine at least one claim"):
        verdicts_figure(ClaimsTable(()))
