import pytest

from refkl_lib.view.slider import Slider


@pytest.fixture
def slider():
    return Slider("GPUs", [("one", 1), ("many", [2, 3])], 1)


def test_value_and_handle_move_together(slider):
    seen = []
    slider.observe(lambda change: seen.append(change["new"]), "value")
    slider.index = 1  # as the browser does
    assert slider.value == [2, 3]
    slider.value = 1
    assert slider.index == 0
    assert seen == [[2, 3], 1]


def test_the_browser_is_told_all_it_shows(slider):
    shown = slider.get_state()
    assert (shown["label"], shown["texts"], shown["index"]) == ("GPUs", ["one", "many"], 0)
    assert "value" not in shown


def test_what_is_not_on_the_line_is_named(slider):
    with pytest.raises(ValueError, match="GPUs is 7, but must be a step between 1 and"):
        slider.value = 7
    with pytest.raises(ValueError, match="GPUs is 0"):
        Slider("GPUs", [("one", 1)], 0)
