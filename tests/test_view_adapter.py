"""Pictures of the adapter switch."""

import math

import pytest

from refkl_lib import kl_dots, lora_switch
from refkl_lib.view.adapter import SWITCH_ALT, kl_dots_figure, lora_switch_figure


def words(axes):
    return "\n".join(text.get_text() for text in axes.texts)


def test_the_layer_is_drawn_on_and_off_with_the_parameters_of_each_part():
    on, off = lora_switch_figure(inputs=576, outputs=1536, rank=16).axes
    assert on.get_title(loc="left").startswith("on: the policy")
    assert off.get_title(loc="left").startswith("off: the reference")
    for axes in (on, off):
        for part in ("W  1536 × 576\n884,736", "A  16 × 576\n9,216", "B  1536 × 16\n24,576"):
            assert part in words(axes)
    assert "_disable_adapters\n= False" in words(on)
    assert "_disable_adapters\n= True" in words(off)


def test_an_open_switch_can_be_told_from_a_closed_one_without_colour():
    on, off = lora_switch_figure(8, 8, 2).axes
    assert {patch.get_linestyle() for patch in on.patches} != {patch.get_linestyle() for patch in off.patches}
    assert [list(line.get_ydata()) for line in on.lines] != [list(line.get_ydata()) for line in off.lines]


def test_the_layer_has_a_text_for_those_who_do_not_see_it():
    assert lora_switch(8, 8, 2).alt == SWITCH_ALT


@pytest.mark.parametrize("sizes", [(0, 8, 2), (8, 0, 2), (8, 8, 0)])
def test_a_layer_without_a_size_is_refused(sizes):
    with pytest.raises(ValueError, match="each must be at least 1"):
        lora_switch_figure(*sizes)


def test_each_kl_has_a_dot_and_zero_has_none():
    [axes] = kl_dots_figure({"plain": 0.0, "merged": 3e-4, "PiSSA": 0.9}, "How far off is off").axes
    dots = {line.get_ydata()[0]: line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"}
    assert dots == {1: 3e-4, 2: 0.9}
    assert [text.get_text() for text in axes.texts] == ["0", "0.0003", "0.9"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain", "merged", "PiSSA"]
    assert axes.get_xscale() == "log"
    assert axes.get_title(loc="left") == "How far off is off"


def test_the_text_of_the_dots_says_what_the_picture_shows():
    picture = kl_dots({"plain": 0.0, "PiSSA": 0.9}, "How far off is off")
    assert picture.alt == "How far off is off. One dot each, in nats per token: plain; PiSSA."


@pytest.mark.parametrize("kls", [{}, {"a": 0.0}, {"a": -1.0, "b": 1.0}, {"a": math.nan}, {"a": math.inf}])
def test_what_cannot_be_drawn_is_refused(kls):
    with pytest.raises(ValueError, match="each must be finite and not negative, and one above 0"):
        kl_dots_figure(kls, "")
