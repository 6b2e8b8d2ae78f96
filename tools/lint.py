"""What a stored notebook of the course must be like. `course_faults` says, a sentence each, what it is not.

A lesson is a notebook numbered 01 to 08; it has predictions, exercises and a length. The other rules hold for all.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

LESSON = re.compile(r"0[1-8]_")
CELLS, WORDS = (25, 45), (800, 1800)
PREDICTIONS, EXERCISES = 2, 3
IMAGE, ALT = re.compile(r"<img\b[^>]*>"), re.compile(r"""\balt=["'][^"']*\w""")
FENCED, QUOTED = re.compile(r"```.*?```", re.DOTALL), re.compile(r"`[^`\n]*`")
HEADING = re.compile(r"^(#{1,6}) +(.+?) *$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
ELSEWHERE = re.compile(r"https?://")


class Call(NamedTuple):
    """A call of `predict`, `reveal` or `check`: in which cell, and with which id."""

    number: int
    id: str
    node: ast.Call

    @property
    def argument(self) -> ast.expr | None:
        """Return what it is given after the id: a guess, a measurement or a function."""
        return self.node.args[1] if len(self.node.args) > 1 else None


def course_faults(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """Yield, a sentence each, what is wrong with a notebook that is stored at `path`."""
    yield from picture_faults(notebook)
    yield from heading_faults(notebook)
    yield from import_faults(notebook)
    yield from link_faults(notebook, path)
    yield from id_faults(notebook, path)
    yield from prediction_faults(notebook)
    yield from exercise_faults(notebook)
    yield from length_faults(notebook, path)


def picture_faults(notebook: NotebookNode) -> Iterator[str]:
    """Yield where a picture has no text for those who do not see it."""
    for number, cell in enumerate(code_cells(notebook), 1):
        for output in cell.outputs:
            data = output.get("data", {})
            images = IMAGE.findall(data.get("text/html", ""))
            drawn = any(kind.startswith("image/") for kind in data)
            if (drawn and not images) or not all(map(ALT.search, images)):
                yield f"In [{number}] shows a picture without an alt text: it needs a text/html with one"


def heading_faults(notebook: NotebookNode) -> Iterator[str]:
    """Yield what is wrong with the order of the headings."""
    levels = [len(marks) for marks, _ in headings(notebook)]
    if levels.count(1) != 1 or not notebook.cells[0].source.startswith("# "):
        yield "it needs one title: a # at the beginning of its first cell, and no other"
    yield from (
        f"a heading of level {below} follows one of {above}" for above, below in pairwise(levels) if below > above + 1
    )


def import_faults(notebook: NotebookNode) -> Iterator[str]:
    """Yield where an import is not at the top of its cell, or is not the first of its name."""
    first: dict[str, int] = {}
    for number, tree in trees(notebook):
        top = list(takewhile(is_import, tree.body))
        if sum(map(is_import, ast.walk(tree))) > len(top):
            yield f"In [{number}] imports below its first statement"
        aliases = [node for statement in top for node in ast.walk(statement) if isinstance(node, ast.alias)]
        for name in [alias.asname or alias.name for alias in aliases]:
            if name in first:
                yield f"In [{number}] imports {name}, as In [{first[name]}] does"
            first.setdefault(name, number)


def link_faults(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """Yield where a link leads to a file, or to a heading of a notebook, that does not exist; the web is not asked."""
    for target in LINK.findall(QUOTED.sub("", FENCED.sub("", prose(notebook)))):
        if ELSEWHERE.match(target):
            continue
        name, _, anchor = unquote(target).partition("#")
        there = path.parent / name if name else path
        if name and not there.exists():
            yield f"the link to {target} leads nowhere"
        elif anchor and anchor not in anchors(nbformat.read(there, as_version=4) if name else notebook):
            yield f"the link to {target} names no heading that is there"


def id_faults(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """Yield where a question or an exercise is not of this notebook."""
    begin = f"{path.name[:2]}."
    for number, name, _ in [call for function in ("predict", "reveal", "check") for call in calls(notebook, function)]:
        if not name.startswith(begin):
            yield f"In [{number}] names {name!r}, but the ids of this notebook begin with {begin!r}"


def length_faults(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """Yield what a lesson has too little or too much of."""
    if not LESSON.match(path.name):
        return
    for name, count, (least, most) in [
        ("cells", len(notebook.cells), CELLS),
        ("words of prose", len(re.findall(r"\S*\w\S*", prose(notebook))), WORDS),
    ]:
        if not least <= count <= most:
            yield f"it has {count} {name}; a lesson has {least} to {most}"
    for name, function, least in [("predictions", "predict", PREDICTIONS), ("exercises", "check", EXERCISES)]:
        if (count := len(list(calls(notebook, function)))) < least:
            yield f"it has {count} {name}; a lesson has at least {least}"


def prediction_faults(notebook: NotebookNode) -> Iterator[str]:
    """Yield where a prediction is answered, or is not followed by its one measurement."""
    revealed = list(calls(notebook, "reveal"))
    predicted = list(calls(notebook, "predict"))
    for call in predicted:
        if not is_dots(call.argument):
            yield f"In [{call.number}] holds an answer to {call.id!r}: store it as `...`"
        if [reveal.number > call.number for reveal in revealed if reveal.id == call.id] != [True]:
            yield f"In [{call.number}] predicts {call.id!r}, which must be revealed once, in a later cell"
    names = Counter(call.id for call in predicted)
    yield from (f"{name!r} is predicted {count} times" for name, count in names.items() if count > 1)
    yield from (
        f"In [{number}] reveals {name!r}, which nobody predicts" for number, name, _ in revealed if name not in names
    )


def exercise_faults(notebook: NotebookNode) -> Iterator[str]:
    """Yield where an exercise is not an unsolved stub in the cell that checks it."""
    cells = dict(trees(notebook))
    names = Counter(call.id for call in calls(notebook, "check"))
    for call in calls(notebook, "check"):
        stubs = [node.name for node in cells[call.number].body if isinstance(node, ast.FunctionDef) and is_stub(node)]
        if not isinstance(call.argument, ast.Name) or call.argument.id not in stubs:
            yield f"In [{call.number}] checks {call.id!r}, but its function is no stub there: a docstring and `...`"
    yield from (f"{name!r} is checked {count} times" for name, count in names.items() if count > 1)


def calls(notebook: NotebookNode, function: str) -> Iterator[Call]:
    """Yield the notebook's calls of a function whose first argument is an id."""
    for number, tree in trees(notebook):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                name = node.args[0]
                yield Call(number, str(name.value) if isinstance(name, ast.Constant) else ast.unparse(name), node)


def trees(notebook: NotebookNode) -> Iterator[tuple[int, ast.Module]]:
    """Yield each code cell's number and syntax tree; `%` and `!` have become calls."""
    for number, cell in enumerate(code_cells(notebook), 1):
        yield number, ast.parse(TransformerManager().transform_cell(cell.source))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells that are not empty: those that Jupyter numbers."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def prose(notebook: NotebookNode) -> str:
    """Return the text of the markdown cells."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def headings(notebook: NotebookNode) -> list[tuple[str, str]]:
    """Return each heading's marks (`##`) and text."""
    return HEADING.findall(FENCED.sub("", prose(notebook)))


def anchors(notebook: NotebookNode) -> set[str]:
    """Return what Jupyter lets a link call the headings."""
    return {re.sub(r"[*_`]", "", text).replace(" ", "-") for _, text in headings(notebook)}


def is_import(node: ast.AST) -> bool:
    """Tell whether a statement imports."""
    return isinstance(node, (ast.Import, ast.ImportFrom))


def is_dots(node: ast.AST | None) -> bool:
    """Tell whether an expression is `...`."""
    return isinstance(node, ast.Constant) and node.value is ...


def is_stub(function: ast.FunctionDef) -> bool:
    """Tell whether a function's body is a docstring and `...`."""
    *docstring, last = function.body
    return (
        bool(ast.get_docstring(function)) and len(docstring) == 1 and isinstance(last, ast.Expr) and is_dots(last.value)
    )
