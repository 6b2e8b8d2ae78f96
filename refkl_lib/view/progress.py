"""The course at a glance, as one picture."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refkl_lib.lessons.predictions import ratio, show
from refkl_lib.lessons.progress import Attempt, Prediction, Progress
from refkl_lib.view.panel import MimeBundle, static_face

REACH = 20.0  # the axis ends where a guess is so many times off; what is further off is an arrow there
TICKS = {0.1: "1/10", 0.2: "1/5", 0.5: "1/2", 1: "1", 2: "2", 5: "5", 10: "10"}
COLUMNS = 4  # exercises in a line
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#666666"
# An exercise's mark by its state, which is also written below its name.
MARKS: dict[str, dict[str, Any]] = {
    "solved": {"marker": "s", "color": BLUE},
    "tried": {"marker": "D", "color": ORANGE, "fillstyle": "left", "markerfacecoloralt": "white"},
    "open": {"marker": "o", "color": GREY, "fillstyle": "none"},
}
# Heights in inches: a prediction, a line of exercises, and what surrounds each of the two.
ROW, LINE, AXIS, TITLE = 0.22, 0.4, 0.8, 0.35

Line = tuple[str, Sequence[Attempt]]


class ProgressPicture(Progress):
    """`Progress` as a picture where pictures can be shown, and as its tables elsewhere."""

    def _repr_mimebundle_(self, **_: Any) -> MimeBundle:
        data, metadata = static_face(progress_figure(self), progress_alt(self))
        return data | {"text/plain": repr(self)}, metadata


def progress() -> ProgressPicture:
    """Return all predictions and all exercises of the course: what was measured, what is solved, what is open."""
    return ProgressPicture.load()


def progress_alt(progress: Progress) -> str:
    """Return in two sentences how much of the course is done."""
    states = [attempt.state for attempt in progress.exercises]
    return (
        f"{_predictions_title(progress.predictions)}; for each, measured / guess on an axis. "
        f"Exercises: {states.count('solved')} of {len(states)} solved, {states.count('tried')} tried."
    )


def progress_figure(progress: Progress) -> Figure:
    """Return measured / guess of each prediction on a log axis, above a mark for each exercise, by notebook."""
    lines = _lines(progress.exercises)
    heights = ROW * max(len(progress.predictions), 1) + AXIS, LINE * max(len(lines), 1) + TITLE
    figure = Figure(figsize=(7.4, sum(heights)), layout="constrained")
    [top], [bottom] = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    _draw_predictions(top.add_subplot(), progress.predictions)
    _draw_exercises(bottom.add_subplot(), lines)
    return figure


def _notebook(name: str) -> str:
    return name.split(".")[0]


# Predictions


def _predictions_title(predictions: Sequence[Prediction]) -> str:
    times = [prediction.times for prediction in predictions if prediction.measured is not None]
    near = sum(one is not None and 0.5 <= one <= 2 for one in times)
    return f"Predictions: {len(times)} of {len(predictions)} measured, {near} within a factor of 2"


def _draw_predictions(axes: Axes, predictions: Sequence[Prediction]) -> None:
    axes.axvline(1, color="black", linewidth=1)
    for row, prediction in enumerate(predictions):
        _draw_prediction(axes, row, prediction)
    for row, (one, other) in enumerate(pairwise(predictions)):
        if _notebook(one.question) != _notebook(other.question):
            axes.axhline(row + 0.5, color="#CCCCCC", linewidth=0.8)
    axes.set_title(_predictions_title(predictions), loc="left", fontsize=10)
    axes.set_xlabel("measured / guess: 1 is spot on; left of it, you guessed too much", fontsize=8.5)
    axes.text(1.02, 1.0, "guess → measured", transform=axes.transAxes, va="bottom", fontsize=8.5, color=GREY)
    axes.set(xscale="log", xlim=(1 / REACH, REACH), ylim=(max(len(predictions), 1) - 0.5, -0.5))
    axes.set_xticks(list(TICKS), list(TICKS.values()), fontsize=8.5)
    axes.minorticks_off()
    axes.set_yticks(range(len(predictions)), [prediction.question for prediction in predictions], fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_prediction(axes: Axes, row: int, prediction: Prediction) -> None:
    times, beside = prediction.times, axes.get_yaxis_transform()
    color = GREY if prediction.measured is None else "black"
    axes.text(1.02, row, _numbers(prediction), transform=beside, va="center", fontsize=8.5, color=color)
    if times is None:
        return
    end = min(max(times, 1 / REACH), REACH)
    marker = "o" if end == times else "<" if times < 1 else ">"
    axes.plot([1, end], [row, row], color=BLUE, linewidth=1.5)
    axes.plot([end], [row], marker, color=BLUE, clip_on=False)


def _numbers(prediction: Prediction) -> str:
    guess, measured = prediction.guess, prediction.measured
    if guess is None:
        return "○ open"
    if measured is None:
        return f"{show(guess)} → not measured yet"
    times = "no ratio" if prediction.times is None else f"×{ratio(guess, measured)}"
    return f"{show(guess)} → {show(measured, prediction.unit)}  ({times})"


# Exercises


def _lines(exercises: Sequence[Attempt]) -> list[Line]:
    lines: list[Line] = []
    for notebook, group in groupby(exercises, lambda attempt: _notebook(attempt.exercise)):
        attempts = list(group)
        lines += [(notebook, attempts[start : start + COLUMNS]) for start in range(0, len(attempts), COLUMNS)]
    return lines


def _draw_exercises(axes: Axes, lines: Sequence[Line]) -> None:
    attempts = [attempt for _, line in lines for attempt in line]
    solved = sum(attempt.solved for attempt in attempts)
    axes.set_axis_off()
    axes.set_title(f"Exercises: {solved} of {len(attempts)} solved", loc="left", fontsize=10)
    axes.set(xlim=(0, COLUMNS + 0.3), ylim=(max(len(lines), 1) - 0.5, -0.5))
    for row, (notebook, line) in enumerate(lines):
        axes.text(0, row, notebook, va="center", fontsize=8.5, fontweight="bold")
        for column, attempt in enumerate(line):
            _draw_exercise(axes, column + 0.3, row, attempt)


def _draw_exercise(axes: Axes, left: float, row: int, attempt: Attempt) -> None:
    axes.plot([left], [row], markersize=7, **MARKS[attempt.state])
    name = attempt.exercise.partition(".")[2]
    axes.text(left + 0.08, row - 0.2, name, va="center", fontsize=8.5)
    axes.text(left + 0.08, row + 0.2, attempt.state, va="center", fontsize=7.5, color=GREY)
