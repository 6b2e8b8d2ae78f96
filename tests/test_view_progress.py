"""The picture of the course: every prediction at its ratio, every exercise with its state."""

from pathlib import Path

import pytest
from matplotlib.text import Text

from refkl_lib.lessons.progress import Attempt, Prediction, Progress
from refkl_lib.view.panel import png
from refkl_lib.view.progress import MARKS, REACH, progress_figure


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def shown(predictions=(), exercises=()):
    return progress_figure(Progress(tuple(predictions), tuple(exercises), Path("progress.json")))


def marks(figure):
    """Where the predictions' marks are, and what they look like."""
    lines = [line for line in figure.subfigs[0].axes[0].lines if line.get_marker() != "None"]
    return [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in lines]


def test_a_prediction_is_drawn_at_the_ratio_and_at_the_edge_if_it_is_further_off():
    figure = shown(
        [
            Prediction("02.near", 500.0, 982.0, "MiB"),
            Prediction("02.high", 1.0, 100.0),
            Prediction("02.low", 100.0, 1.0),
            Prediction("02.zero", 0.0, 3.0),
            Prediction("05.later", 4.0),
            Prediction("05.open"),
        ]
    )
    assert marks(figure) == [(982 / 500, 0, "o"), (REACH, 1, ">"), (1 / REACH, 2, "<")]
    found = texts(figure)
    assert "Predictions: 4 of 6 measured, 1 within a factor of 2" in found
    for text in ("500 → 982 MiB  (×1.96)", "0 → 3  (no ratio)", "4 → not measured yet", "○ open", "02.near"):
        assert text in found


def test_each_state_of_an_exercise_has_a_shape_and_a_word():
    figure = shown(exercises=[Attempt("05.a"), Attempt("05.b", 2), Attempt("05.c", 3, solved=True)])
    lines = figure.subfigs[1].axes[0].lines
    assert len({line.get_marker() for line in lines}) == 3
    assert [text for text in texts(figure) if text in MARKS] == ["open", "tried", "solved"]
    assert "Exercises: 1 of 3 solved" in texts(figure)


@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_picture_of_nothing_and_of_a_whole_course_fits_the_page(count):
    figure = shown(
        [Prediction(f"{n // 4:02}.a-long-question", 1234.5, 2345.6, "MiB") for n in range(count)],
        [Attempt(f"{n // 4:02}.owned_bytes_unique", n) for n in range(count)],
    )
    width, height = (int.from_bytes(png(figure)[at : at + 4], "big") for at in (16, 20))
    assert 600 < width < 900
    assert height < 1400
