"""The course at a glance: what was predicted, what was solved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from refkl_lib.lessons import store
from refkl_lib.lessons.course import PREDICTIONS, exercises
from refkl_lib.lessons.predictions import ratio, show

Row = tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """A question's guess and measurement, in its unit; each is None until it is there."""

    question: str
    guess: float | None = None
    measured: float | None = None
    unit: str = ""

    @property
    def times(self) -> float | None:
        """Return measured / guess, 1 for two zeros; None without a measurement, or if that is not above 0."""
        if self.guess is None or self.measured is None:
            return None
        if self.guess == self.measured:
            return 1.0
        return self.measured / self.guess if self.guess * self.measured > 0 else None

    def row(self) -> Row:
        """Return it as a row of the table: question, guess, measured, measured / guess."""
        if self.guess is None:
            return self.question, "open", "", ""
        if self.measured is None:
            return self.question, show(self.guess), "not yet", ""
        shown = (show(value, self.unit) for value in (self.guess, self.measured))
        return self.question, *shown, ratio(self.guess, self.measured)


@dataclass(frozen=True)
class Attempt:
    """An exercise, how often it was tried, and whether it was ever solved."""

    exercise: str
    tries: int = 0
    solved: bool = False

    @property
    def state(self) -> str:
        """Return "solved", "tried" or "open"."""
        return "solved" if self.solved else "tried" if self.tries else "open"

    def row(self) -> Row:
        """Return it as a row of the table: exercise, state, tries."""
        return self.exercise, self.state, str(self.tries)


@dataclass(frozen=True, repr=False)
class Progress:
    """All predictions and exercises of the course, in order, as two tables of text.

    They are kept in `file`; delete it to begin anew.
    """

    predictions: tuple[Prediction, ...]
    exercises: tuple[Attempt, ...]
    file: Path

    @classmethod
    def load(cls) -> Self:
        """Return what is remembered, and what is still open; predictions that no notebook asks for come last."""
        kept = store.load()
        asked: dict[str, store.Record] = {question: {} for question in PREDICTIONS}
        predictions = (Prediction(question, **record) for question, record in (asked | kept["predictions"]).items())
        attempts = (Attempt(name, **kept["exercises"].get(name, {})) for name in exercises())
        return cls(tuple(predictions), tuple(attempts), store.progress_file())

    def __repr__(self) -> str:
        predictions = _table(("prediction", "guess", "measured", "measured / guess"), self.predictions)
        return f"{predictions}\n\n{_table(('exercise', 'state', 'tries'), self.exercises)}"


def _table(head: Row, items: tuple[Prediction, ...] | tuple[Attempt, ...]) -> str:
    rows = [head, *(item.row() for item in items)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
