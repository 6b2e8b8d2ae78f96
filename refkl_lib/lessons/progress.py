"""The course at a glance: what was predicted, what was solved."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from refkl_lib.lessons import store
from refkl_lib.lessons.course import exercises
from refkl_lib.lessons.predictions import ratio, show

Row = tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """Two tables, as text and as HTML: the predictions, and all exercises of the course.

    They are kept in `file`; delete it to begin anew.
    """

    predictions: tuple[Row, ...]  # question, guess, measured, measured / guess
    exercises: tuple[Row, ...]  # exercise, state, tries
    file: Path

    def __repr__(self) -> str:
        return "\n\n".join(_as_text(head, rows) for head, rows in self._tables())

    def _repr_html_(self) -> str:
        return "".join(_as_html(head, rows) for head, rows in self._tables())

    def _tables(self) -> list[tuple[Row, tuple[Row, ...]]]:
        return [
            (("prediction", "guess", "measured", "measured / guess"), self.predictions),
            (("exercise", "state", "tries"), self.exercises),
        ]


def progress() -> Progress:
    """Return all predictions made and all exercises of the course, solved or not."""
    kept = store.load()
    predictions = tuple(_prediction(question, record) for question, record in sorted(kept["predictions"].items()))
    rows = tuple(_exercise(name, kept["exercises"].get(name, {})) for name in exercises())
    return Progress(predictions, rows, store.progress_file())


def _prediction(question: str, record: store.Record) -> Row:
    guess, measured, unit = record["guess"], record.get("measured"), record.get("unit", "")
    if measured is None:
        return question, show(guess), "not yet", ""
    return question, show(guess, unit), show(measured, unit), ratio(guess, measured)


def _exercise(name: str, record: store.Record) -> Row:
    state = "solved" if record.get("solved") else "tried" if record else "open"
    return name, state, str(record.get("tries", 0))


def _as_text(head: Row, rows: tuple[Row, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _as_html(head: Row, rows: tuple[Row, ...]) -> str:
    def line(tag: str, row: Row) -> str:
        return "<tr>" + "".join(f'<{tag} style="text-align:left">{escape(cell)}</{tag}>' for cell in row) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"
