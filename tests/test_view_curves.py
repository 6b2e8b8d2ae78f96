"""Numbers over steps, as lines."""

import pytest

from refkl_lib import curves
from refkl_lib.view.curves import STYLES, curves_figure


def test_each_line_is_drawn_named_and_told_apart_without_colour():
    lines = {"never": [0.0, 0.5, 1.0], "every step": [0.0, 0.1]}
    [axes] = curves_figure(lines, "nats per token", "A reference that follows").axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == lines
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 1, 2], [0, 1]]
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 2
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "nats per token")
    assert axes.get_title(loc="left") == "A reference that follows"


def test_the_text_says_what_the_picture_shows():
    picture = curves({"never": [0.0], "always": [1.0]}, "nats", "Two references", xlabel="round")
    assert picture.alt == "Two references: nats, for never, always."


@pytest.mark.parametrize("lines", [{}, {"empty": []}, {str(n): [0.0] for n in range(len(STYLES) + 1)}])
def test_what_cannot_be_drawn_is_refused(lines):
    with pytest.raises(ValueError, match="a picture shows 1 to 4, each with one value or more"):
        curves_figure(lines, "nats", "")
