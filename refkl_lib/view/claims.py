"""The article under test: its claims as a table and as one picture, each with the verdict of its measurement."""

from collections.abc import Callable
from html import escape
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from refkl_lib.lessons.claims.article import SECTIONS, Findings, article_claims
from refkl_lib.lessons.claims.claim import CONDITION, FAILS, HOLDS, Finding, Verdict
from refkl_lib.ranks.launch import check_system
from refkl_lib.view.panel import Picture

# Okabe and Ito's colours, each with a sign and a line of its own: colour is never the only carrier.
LOOKS: dict[Verdict, tuple[str, str, str]] = {
    HOLDS: ("✓", "#009E73", "-"),
    CONDITION: ("±", "#E69F00", "--"),
    FAILS: ("✗", "#D55E00", ":"),
}
# Each column with its share of the width, in percent.
COLUMNS = {"claim": 9, "the article says": 27, "verdict": 17, "measured here": 30, "lesson": 17}
CELL = "text-align:left;vertical-align:top;padding:4px 12px 4px 0;border-top:1px solid #8884"
WIDTH, HEIGHT = 1.5, 0.62  # of a claim's box, in the picture's units


class ClaimsTable(Findings):
    """`Findings` as a table with links to the lessons; its plain text has the verdicts and no figures."""

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        plain = [f"{row.claim.id}  {row.verdict:<22}  {row.claim.says}" for row in self.rows]
        return {"text/html": claims_html(self), "text/plain": "\n".join([*plain, self.summary])}


def examine_claims(*ids: str, tell: Callable[[Finding], object] = lambda finding: None) -> ClaimsTable:
    """Test the article's claims, all or those with these ids ("B" for a section), and return the table of them.

    `tell` is called with each finding as it comes (`tell=print`). Where no real ranks can run, the claims that take
    some are left out unless they are named. Raises ValueError for an unknown id, and what a measurement raises.
    """
    claims = article_claims(*ids)
    if not ids and not _ranks_run_here():
        claims = tuple(claim for claim in claims if not claim.ranks)
    return ClaimsTable.of(claims, tell)


def _ranks_run_here() -> bool:
    try:
        check_system()
    except (RuntimeError, ImportError):
        return False
    return True


def claims_html(findings: Findings) -> str:
    """Return findings as an HTML table, with a row for each claim below its section's heading."""
    head = "".join(f'<th scope="col" style="{CELL}">{text}</th>' for text in COLUMNS)
    shares = "".join(f'<col style="width:{share}%">' for share in COLUMNS.values())
    body = "".join(
        f'<tbody><tr><th scope="rowgroup" colspan="{len(COLUMNS)}" style="{CELL}">'
        f"{letter}. {SECTIONS[letter]}</th></tr>{''.join(map(_row, rows))}</tbody>"
        for letter, rows in groupby(findings.rows, lambda row: row.claim.id[0])
    )
    return (
        '<table style="border-collapse:collapse;line-height:1.4;table-layout:fixed;width:100%;max-width:1100px">'
        f'<caption style="text-align:left;padding-bottom:4px">{findings.summary}</caption>'
        f"<colgroup>{shares}</colgroup><thead><tr>{head}</tr></thead>{body}</table>"
    )


def _row(row: Finding) -> str:
    claim, (sign, color, line) = row.claim, LOOKS[row.verdict]
    border = f"border-left:4px {'solid' if line == '-' else 'dashed' if line == '--' else 'dotted'} {color}"
    words = f'<span aria-hidden="true">{sign}</span> {row.verdict}'
    verdict = f'<span style="{border};padding-left:6px;display:inline-block">{words}</span>'
    name = claim.lesson.partition(".")[0].replace("_", "_<wbr>")  # a narrow column breaks it there
    lesson = f'<a href="{escape(claim.lesson)}">{name}</a>'
    texts = (escape(claim.says), verdict, escape(row.number), lesson)
    cells = "".join(f'<td style="{CELL};overflow-wrap:anywhere">{text}</td>' for text in texts)
    return f'<tr><th scope="row" style="{CELL}">{claim.id}</th>{cells}</tr>'


def verdicts_figure(findings: Findings) -> Figure:
    """Return a box for each claim, by section, with its verdict as a colour, a line and a sign. ValueError for none."""
    if not findings.rows:
        raise ValueError("there are no findings: examine at least one claim")
    sections = [(letter, list(rows)) for letter, rows in groupby(findings.rows, lambda row: row.claim.id[0])]
    widest = max(len(rows) for _, rows in sections)
    figure = Figure(figsize=(0.4 + 1.36 * widest, 0.8 + 0.92 * len(sections)), layout="constrained")
    axes = figure.add_subplot()
    for line, (letter, rows) in enumerate(sections):
        axes.text(0, line, f"{letter}. {SECTIONS[letter]}", fontsize=9, color="#333333", va="bottom")
        for column, row in enumerate(rows):
            _box(axes, column * (WIDTH + 0.1), line + 0.06, row)
    axes.set(xlim=(-0.05, widest * (WIDTH + 0.1)), ylim=(len(sections) - 0.2, -0.25))
    axes.set_axis_off()
    key = "   ".join(f"{sign} {verdict}" for verdict, (sign, _, _) in LOOKS.items())
    axes.set_title(f"{findings.summary}\n{key}", loc="left", fontsize=10)
    return figure


def verdicts_picture(findings: Findings) -> Picture:
    """Return `verdicts_figure` as notebook output."""
    said = "; ".join(
        f"{verdict}: {', '.join(row.claim.id for row in findings.rows if row.verdict == verdict) or 'none'}"
        for verdict in LOOKS
    )
    return Picture(verdicts_figure(findings), f"{findings.summary} A box for each claim, by section. {said}.")


def _box(axes: Axes, left: float, top: float, row: Finding) -> None:
    sign, color, line = LOOKS[row.verdict]
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(
        FancyBboxPatch(
            (left, top), WIDTH, HEIGHT, boxstyle=style, facecolor=f"{color}22", edgecolor=color, linestyle=line, lw=1.6
        )
    )
    axes.text(left + 0.08, top + 0.2, f"{sign} {row.claim.id}", fontsize=9, va="center", fontweight="bold")
    axes.text(left + 0.08, top + 0.45, row.claim.name, fontsize=8.5, va="center")
