"""The map of what fits where: its cells, its lines, and what it refuses."""

import base64
from itertools import pairwise

import pytest

from refkl_lib import advise, fit_map
from refkl_lib.units import GIB
from refkl_lib.view.fit import RED, fit_figure

MODELS = ["SmolLM2-135M-Instruct", "Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-32B"]
MEMORIES = [8, 24, 80, 192]


@pytest.fixture(scope="module")
def advices():
    return [advise(model, device_memory=memory * GIB, ranks=8, seq=128) for model in MODELS for memory in MEMORIES]


@pytest.fixture(scope="module")
def axes(advices):
    return fit_figure(advices).axes[0]


def test_each_cell_says_what_is_recommended(advices, axes):
    names = {text.get_position(): text.get_text().replace("\n", " ") for text in axes.texts}
    for number, advice in enumerate(advices):
        row, column = divmod(number, len(MEMORIES))
        assert names[column + 0.5, row + 0.5] == (advice.recommended or "–")
    assert {advice.recommended for advice in advices} == {"clone", "zero3", None}


def test_a_cross_marks_where_the_articles_choice_does_not_fit(advices, axes):
    crosses = sum(text.get_text() == "✗" for text in axes.texts)
    assert crosses == sum(not advice.rule.option.usable for advice in advices) > 0


def test_solid_lines_run_where_the_recommendation_changes(advices, axes):
    names = [advice.recommended for advice in advices]
    width = len(MEMORIES)
    beside = sum(one != two for n, (one, two) in enumerate(pairwise(names)) if (n + 1) % width)
    above = sum(one != two for one, two in zip(names, names[width:], strict=False))
    assert sum(line.get_linestyle() == "-" for line in axes.lines) == beside + above


def test_dashed_lines_are_the_articles_thresholds(axes):
    across, down = (line for line in axes.lines if line.get_color() == RED)
    assert set(across.get_ydata()) == {3}  # between 7B and 32B
    assert set(down.get_xdata()) == {2}  # between 24 and 80
    assert max(down.get_ydata()) == 3  # above it the article does not ask for the memory


def test_sizes_and_memories_are_the_axes(axes):
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "24", "80", "192"]
    assert axes.get_yticklabels()[2].get_text() == "Qwen2.5-7B  7.6B"


def test_a_map_as_notebook_output():
    data, metadata = fit_map(MODELS[:1], [8, 24], seq=128)._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG\r\n")
    assert metadata["image/png"]["alt"] == data["text/plain"]


def test_a_map_with_a_hole_is_refused(advices):
    for some in ([], advices[:-1], [*advices, advices[0]]):
        with pytest.raises(ValueError, match="a map needs one each"):
            fit_figure(some)
