"""Each rule of the notebooks holds for a small good lesson, and names what a bad one breaks."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import lint

STUB = '''def k{number}(x):
    """Return x."""
    ...


check("05.k{number}", k{number})'''


@pytest.fixture(autouse=True)
def _lessons_may_be_short(monkeypatch):
    monkeypatch.setattr(lint, "CELLS", (5, 12))
    monkeypatch.setattr(lint, "WORDS", (3, 30))


def picture(html='<img src="…" alt="A line that rises.">'):
    return new_code_cell("curves", outputs=[new_output("display_data", {"image/png": "…", "text/html": html})])


def lesson(*more, **replaced):
    """A good lesson; cells can be given by name in place of its own, or after them."""
    own = {
        "title": new_markdown_cell("# The KL\n\nRead [the list](list.txt), and [what follows](#What-follows)."),
        "imports": new_code_cell("import torch\n\nfrom refkl_lib import check, predict, reveal"),
        "guess": new_code_cell('predict("05.guess", ...)'),
        "other": new_code_cell('predict("05.other", ...)'),
        "heading": new_markdown_cell("## What follows\n\n```\n# no heading\n```"),
        "truth": new_code_cell('reveal("05.guess", 3, "MiB")\nreveal("05.other", torch.tensor(4))'),
        "picture": picture(),
        **{f"k{number}": new_code_cell(STUB.format(number=number)) for number in (1, 2, 3)},
    }
    return new_notebook(cells=[*(own | replaced).values(), *more])


@pytest.fixture
def path(tmp_path):
    (tmp_path / "list.txt").touch()
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Two words")]), tmp_path / "06_next.ipynb")
    return tmp_path / "05_kl.ipynb"


def test_a_good_lesson_has_no_fault(path):
    assert list(lint.course_faults(lesson(), path)) == []


md, code = new_markdown_cell, new_code_cell


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (lesson(picture=picture("a table")), "In [5] shows a picture without an alt text: "),
        (lesson(picture=picture('<img alt="">')), "In [5] shows a picture without an alt text: "),
        (lesson(picture=picture("<img>")), "In [5] shows a picture without an alt text: "),
        (lesson(title=md("The KL of two models")), "it needs one title: a # at the beginning of its first cell, "),
        (lesson(md("# Another")), "it needs one title"),
        (lesson(md("#### Deep")), "a heading of level 4 follows one of 2"),
        (lesson(code("1 + 1\nimport copy")), "In [9] imports below its first statement"),
        (lesson(code("def f():\n    import copy")), "In [9] imports below its first statement"),
        (lesson(code("import copy\nimport torch")), "In [9] imports torch, as In [1] does"),
        (lesson(md("[x](06_next.ipynb) [y](07_later.ipynb)")), "the link to 07_later.ipynb leads nowhere"),
        (lesson(md("[x](06_next.ipynb#Two-words) [y](#Two-words)")), "the link to #Two-words names no heading"),
        (lesson(md("[x](06_next.ipynb#Two)")), "the link to 06_next.ipynb#Two names no heading that is there"),
        (lesson(code('predict("05.guess", 4)'), guess=code("1")), "holds an answer to '05.guess': store it as `...`"),
        (lesson(other=code('predict("05.new", ...)')), "In [3] predicts '05.new', which must be revealed once"),
        (lesson(code('reveal("05.guess", 3)')), "In [2] predicts '05.guess', which must be revealed once"),
        (lesson(code('predict("05.guess", ...)')), "'05.guess' is predicted 2 times"),
        (lesson(code('reveal("05.new", 3)')), "In [9] reveals '05.new', which nobody predicts"),
        (lesson(code("predict(name, ...)\nreveal(name, 1)")), "In [9] names 'name', but the ids of this notebook"),
        (lesson(k1=code(STUB.format(number=1).replace("05.", "04."))), "In [6] names '04.k1', but the ids of this "),
        (lesson(k1=code(STUB.format(number=1).replace("...", "return x"))), "In [6] checks '05.k1', but its function"),
        (lesson(k1=code('check("05.k1", k1)')), "In [6] checks '05.k1', but its function is no stub there"),
        (lesson(code(STUB.format(number=1))), "'05.k1' is checked 2 times"),
        (lesson(*map(md, "abc")), "it has 13 cells; a lesson has 5 to 12"),
        (lesson(md("word " * 30)), "words of prose; a lesson has 3 to 30"),
        (lesson(k1=code("1")), "it has 2 exercises; a lesson has at least 3"),
        (lesson(guess=code("1"), truth=code('reveal("05.other", 4)')), "it has 1 predictions; a lesson has at least 2"),
    ],
)
def test_a_fault_is_named(bad, fault, path):
    assert any(fault in found for found in lint.course_faults(bad, path))


def test_what_is_no_lesson_needs_no_exercises(path):
    overview = new_notebook(cells=[md("# Start here"), code("%time 1 + 1")])
    assert list(lint.course_faults(overview, path.with_name("00_start_here.ipynb"))) == []
