"""A Sphinx extension for what the site has beside its sources.

It puts hints and a solution below each exercise, turns links to notebooks in a cell's output into links to their pages,
and makes lists that are written elsewhere: the library's names, the exercises' mistakes. In a translated site it marks
what stays in English, and lets the search find Chinese words.
"""

import copy
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

import refkl_lib
from refkl_lib import _HOME_OF
from refkl_lib.lessons.course import exercises, find, solution
from tools.lint import calls, code_cells


def setup(app: Sphinx) -> dict[str, Any]:
    """Tell Sphinx what to do with a page that it has read, and with a docstring."""
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", escape)
    app.connect("doctree-read", leave_in_english)
    app.connect("html-page-context", name_site)
    app.add_search_language(Chinese)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def complete(app: Sphinx, name: str, source: list[str]) -> None:
    """Add to a page's source what is written elsewhere."""
    if name in LISTS:
        source[0] += f"\n% {ENGLISH}\n" + "".join(LISTS[name]())
    elif app.env.doc2path(name).suffix == ".ipynb":
        titles = CHINESE_TITLES if is_translated(app, name) else TITLES
        source[0] = nbformat.writes(with_links(with_solutions(nbformat.reads(source[0], as_version=4), titles)))


def with_solutions(notebook: NotebookNode, titles: tuple[str, str]) -> NotebookNode:
    """Return the notebook with hints and a solution folded under these titles, below each cell that checks an exercise.

    The exercise's name takes the place of {} in a title.
    """
    checked = {call.number: call.id for call in calls(notebook, "check")}
    numbers = {cell.id: number for number, cell in enumerate(code_cells(notebook), 1)}
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if exercise := checked.get(numbers.get(cell.id, 0)):
            cells.append(new_markdown_cell(folded(exercise, titles)))
    return NotebookNode(notebook | {"cells": cells})


def with_links(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook with links in HTML outputs that lead to a notebook's page; Sphinx knows those in Markdown."""
    notebook = copy.deepcopy(notebook)
    for cell in code_cells(notebook):
        for data in (output.data for output in cell.outputs if "data" in output):
            if "text/html" in data:
                data["text/html"] = re.sub(r'(href="[^":]*)\.ipynb\b', r"\1.html", data["text/html"])
    return notebook


def folded(exercise: str, titles: tuple[str, str]) -> str:
    """Return Markdown with an exercise's hints and its solution, each behind a line that opens it."""
    hints = "\n".join(f"{number}. {hint}" for number, hint in enumerate(find(exercise).hints, 1))
    code = f"```python\n{solution(exercise)}\n```"
    return "\n\n".join(
        f"<details>\n<summary>{title.format(exercise)}</summary>\n\n{text}\n\n</details>"
        for title, text in zip(titles, (hints, code), strict=True)
    )


def library() -> Iterator[str]:
    """Yield the library's page: a section for each room, with the docstrings of its public names."""
    rooms = defaultdict(list)
    for name, home in _HOME_OF.items():
        rooms[home.split(".")[0]].append(name)
    for room, names in rooms.items():
        about = (import_module(f"refkl_lib.{room}").__doc__ or "").split("\n\n")[0]
        yield f"\n## {room}\n\n{about}\n\n```{{eval-rst}}\n"
        yield from (f".. {directive(getattr(refkl_lib, name))}:: refkl_lib.{name}\n" for name in names)
        yield "```\n"


def directive(thing: Any) -> str:
    """Return which of autodoc's directives documents a public name."""
    return "autoclass" if inspect.isclass(thing) else "autofunction"


def mistakes() -> Iterator[str]:
    """Yield a table for each exercise: what an answer may look like, and the line of the idea that it misses."""
    for exercise in exercises().values():
        yield f"\n### {exercise.id}\n\n| `check` says: this looks like … | what it misses |\n|---|---|\n"
        for mistake in exercise.mistakes:
            yield f"| {mistake.says} | {exercise.idea[mistake.line - 1]} |\n".replace("*", r"\*")


def escape(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Let bars in a docstring stand for absolute values; between them reStructuredText would look for a name."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def leave_in_english(app: Sphinx, doctree: nodes.document) -> None:
    """Mark what no catalogue translates: what `complete` added to a page, and in a translated site the other pages."""
    lists = [mark for mark in doctree.findall(nodes.comment) if mark.astext() == ENGLISH]
    added = [section for mark in lists for section in mark.parent[mark.parent.index(mark) + 1 :]]
    for node in (node for section in added for node in section.findall(nodes.Element)):
        if not isinstance(node, nodes.inline):  # Sphinx removes an inline element that is so marked
            node["translatable"] = False  # for the extraction of sentences
    if app.config.language != "en":
        for section in added if is_translated(app, app.env.docname) else doctree.children:
            section["classes"].append("language-en")  # of which docutils makes the attribute `lang`


def is_translated(app: Sphinx, page: str) -> bool:
    """Tell whether a page has a catalogue in the site's language."""
    [catalogues] = app.config.locale_dirs
    return (Path(catalogues) / app.config.language / "LC_MESSAGES" / f"{page}.po").exists()


def name_site(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Call the site what its first page is called, in the language of the site."""
    context["docstitle"] = app.env.titles[app.config.root_doc].astext()


class Chinese(SearchEnglish):
    """The words of a Chinese text, for the search, without a dictionary; what is in English is found as in English.

    A query of two characters is looked up as it is, so each pair is a word. A longer one is looked for inside of words,
    so what stands between two marks or spaces is one as well.
    """

    lang = "zh"

    def split(self, input: str) -> list[str]:
        """Return what stands between marks and spaces, and the pairs of its characters where they are not Latin."""
        words = super().split(input)
        pairs = [word[start : start + 2] for word in words if not word.isascii() for start in range(len(word) - 1)]
        return words + pairs


def anchor(title: str) -> str:
    """Return what a link calls a heading: in Jupyter it is the heading's text, with a dash for each space."""
    return re.sub(r"[*_`]", "", title).replace(" ", "-")


TITLES = ("Hints for {}", "A solution of {}")
CHINESE_TITLES = ("{} 的提示", "{} 的一种解法")  # in HTML, which catalogues leave out
ENGLISH = "From here on, the page is written elsewhere, in English."
LISTS = {"docs/library": library, "docs/instructor/mistakes": mistakes}
