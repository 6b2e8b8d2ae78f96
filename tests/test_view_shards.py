"""Weights as squares, each with the rank that holds it."""

import pytest
import torch
from torch import nn

from refkl_lib import shards, shards_picture
from refkl_lib.view.shards import shards_figure


def squares(figure, row):
    [axes] = figure.axes
    return [square for square in axes.patches if square.get_y() == row]


def test_every_element_has_a_square_with_its_rank_and_padding_has_none():
    figure = shards_figure(shards(nn.Linear(5, 2), 4))  # a weight of 10 elements, a bias of 2
    [axes] = figure.axes
    assert [text.get_text() for text in axes.texts] == [*"0001112223", *"01"]
    weight, bias = squares(figure, 0), squares(figure, 1)
    assert [square.get_linestyle() for square in weight] == ["-"] * 10 + ["--"] * 2
    assert [square.get_linestyle() for square in bias] == ["-"] * 2 + ["--"] * 2
    assert len({square.get_facecolor() for square in weight}) == 5  # four ranks, and white
    assert [label.get_text() for label in axes.get_yticklabels()] == ["weight (2, 5)", "bias (2,)"]


def test_the_picture_has_a_text():
    assert "padding is empty" in shards_picture(shards(nn.Linear(5, 2), 4)).alt


@pytest.mark.parametrize(
    ("model", "ranks", "says"),
    [
        (nn.Linear(40, 1), 3, "the largest of 42 elements with padding"),
        (nn.Identity(), 2, "0 weights"),
        (nn.Linear(3, 3), 9, "over up to 8 ranks"),
    ],
)
def test_what_is_too_large_for_squares_is_refused(model, ranks, says):
    with pytest.raises(ValueError, match=says):
        shards_figure(shards(model, ranks))


def test_a_model_on_meta_is_enough():
    assert shards(nn.Linear(5, 2, device=torch.device("meta")), 4)[0].per_rank == 3
