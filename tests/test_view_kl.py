"""The pictures of the KL: the numbers in them, the panel's callback, and their static faces."""

import base64
import math

import pytest
import torch

from refkl_lib import DirectionPanel, both_directions, direction_kls, kl_strip, running_means
from refkl_lib.view.kl import direction_figure, running_means_figure, running_means_of
from refkl_lib.view.strip import kl_strip_figure

PNG = b"\x89PNG\r\n"


def face(thing):
    data, metadata = thing._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(PNG)
    assert metadata["image/png"]["alt"] == data["text/plain"]
    return data


# Two directions


def gaussians(mean, width):
    """Both KLs, by a sum over a fine grid of densities."""
    line = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    log_p = -((line - mean) / width).square() / 2 - math.log(width)
    log_q = torch.logaddexp(-((line - 2) / 0.6).square() / 2, -((line + 2) / 0.6).square() / 2) - math.log(2 * 0.6)
    p, q = log_p.exp(), log_q.exp()
    scale = 0.001 / math.sqrt(2 * math.pi)
    return scale * (p * (log_p - log_q)).sum().item(), scale * (q * (log_q - log_p)).sum().item()


@pytest.mark.parametrize(("mean", "width"), [(2.0, 0.6), (0.0, 0.6), (-1.3, 0.9)])
def test_directions_are_those_of_gaussians(mean, width):
    assert direction_kls(mean, width) == pytest.approx(gaussians(mean, width), rel=1e-3)


def test_one_peak_is_sought_and_both_are_covered():
    means = [mean / 10 for mean in range(-30, 31)]
    kls, reverse_kls = zip(*(direction_kls(mean, 0.6) for mean in means), strict=True)
    assert abs(means[kls.index(min(kls))]) == 2.0
    assert means[reverse_kls.index(min(reverse_kls))] == 0.0


def test_the_picture_marks_both_kls_on_their_curves():
    left, right = direction_figure(1.0, 0.8).axes
    kl, reverse_kl = direction_kls(1.0, 0.8)
    curve, dot, reverse_curve, square = right.lines
    for drawn, point, value in [(curve, dot, kl), (reverse_curve, square, reverse_kl)]:
        assert list(point.get_xdata()) == [1.0]
        assert point.get_ydata()[0] == pytest.approx(value)
        at = list(drawn.get_xdata().round(6)).index(1.0)
        assert drawn.get_ydata()[at] == pytest.approx(value)
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == [f"KL(policy‖reference) {kl:.2f}", f"KL(reference‖policy) {reverse_kl:.2f}"]
    policy = left.lines[0]
    assert policy.get_xdata()[policy.get_ydata().argmax()] == pytest.approx(1.0)
    assert policy.get_ydata().sum() == pytest.approx(1.0)


def test_a_peak_without_width_is_named():
    with pytest.raises(ValueError, match="width is 0"):
        direction_figure(0.0, 0)


def test_sliders_change_the_readout_and_the_picture():
    panel = DirectionPanel(mean=2.0, width=0.6)
    assert "KL(policy‖reference) 0.69 nats, KL(reference‖policy) 10.42 nats" in panel.readout.value
    before = panel.picture.value
    panel.mean.value = 0.0
    assert "KL(policy‖reference) 3.49 nats" in panel.readout.value
    panel.width.value = 2.1
    assert "KL(policy‖reference) 1.19 nats, KL(reference‖policy) 0.55 nats" in panel.readout.value
    assert panel.picture.value != before


def test_panel_and_function_show_the_same():
    panel = DirectionPanel(mean=2.0, width=0.6)
    panel.mean.value, panel.width.value = 0.0, 2.1
    data = face(panel)
    assert "application/vnd.jupyter.widget-view+json" in data
    picture = face(both_directions(0.0, 2.1))
    assert {kind: data[kind] for kind in picture} == picture


# Token by token


def test_a_strip_has_each_token_with_its_kl_below():
    axes = kl_strip_figure([" once", " or", "$a$", "\n"], [0.19, 2.57, 0.0, 1.0]).axes[0]
    assert [text.get_text() for text in axes.texts] == [" once", "0.19", " or", "2.57", "$a$", "0.00", "⏎", "1.00"]


def test_a_darker_box_is_a_higher_kl():
    boxes = kl_strip_figure(["a", "b", "c"], [0.5, 2.0, 0.0]).axes[0].patches
    light = [sum(box.get_facecolor()[:3]) for box in boxes]
    assert light[1] < light[0] < light[2]


def test_a_long_text_is_wrapped_and_no_box_leaves_its_line():
    axes = kl_strip_figure(["word"] * 100 + ["x" * 300], torch.zeros(101)).axes[0]
    assert len(axes.patches) == 101
    assert max(box.get_x() + box.get_width() for box in axes.patches) <= axes.get_xlim()[1]
    places = [(box.get_y(), box.get_x()) for box in axes.patches]
    assert places == sorted(places)
    assert len(set(places)) == 101
    assert max(box.get_y() + box.get_height() for box in axes.patches) <= axes.get_ylim()[0]


@pytest.mark.parametrize(("tokens", "kl"), [(["a"], [1.0, 2.0]), ([], []), (["a"], [math.nan]), (["a"], [math.inf])])
def test_a_strip_needs_a_finite_kl_for_each_token(tokens, kl):
    with pytest.raises(ValueError, match="one finite KL for each token"):
        kl_strip_figure(tokens, kl)


def test_what_the_models_say_stands_under_the_box_where_they_differ():
    axes = kl_strip_figure([" a", " b", " c"], [0.1, 2.0, 0.3], [" x", " glad", "\n"], [" x", " tired", " y"]).axes[0]
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert " x" not in texts
    left, bottom = axes.patches[1].get_x(), axes.patches[1].get_y() + axes.patches[1].get_height()
    for word in (" glad", " tired"):
        across, down = texts[word]
        assert left < across < left + axes.patches[1].get_width()
        assert bottom < down < axes.get_ylim()[0]
    assert texts[" glad"][1] == texts["policy"][1] < texts["reference"][1] == texts[" tired"][1]
    assert texts["⏎"][0] == texts[" c"][0]


def test_a_box_is_as_wide_as_the_longest_of_its_words():
    words = ["a", "b" * 20, "c" * 30]
    narrow, wide, widest = kl_strip_figure(["a"] * 3, torch.zeros(3), words, ["a", "b", "a"]).axes[0].patches
    assert wide.get_x() - narrow.get_x() < 20 < widest.get_x() - wide.get_x() < 30 < widest.get_width()


def test_a_line_on_which_the_models_agree_is_less_tall():
    same, other = ["a"] * 12, ["a"] * 11 + ["b"]
    agreed, differing = (kl_strip_figure(["c" * 70] * 12, torch.zeros(12), same, says) for says in (same, other))
    assert {text.get_text() for text in agreed.axes[0].texts} & {"policy", "reference"} == set()
    assert [text.get_text() for text in differing.axes[0].texts].count("policy") == 1
    assert agreed.get_figheight() < differing.get_figheight() < agreed.get_figheight() + 1


@pytest.mark.parametrize("says", [{"policy_says": ["a"]}, {"policy_says": ["a"], "reference_says": ["a", "b"]}])
def test_both_models_say_something_for_each_token_or_neither_does(says):
    with pytest.raises(
        ValueError, match=r"policy_says has 1 words and reference_says (None|2): both need 1, or neither"
    ):
        kl_strip_figure(["a"], [1.0], **says)


# By samples


def test_running_means_are_means_of_the_first_samples():
    samples = torch.arange(1.0, 1001.0)
    counts, means = running_means_of(samples)
    assert counts[0] == 1
    assert counts[-1] == 1000
    assert counts == sorted(set(counts))
    assert means == pytest.approx([(count + 1) / 2 for count in counts])


def test_the_picture_has_a_curve_for_each_estimator_and_a_line_for_the_exact_kl():
    axes = running_means_figure({"k1": torch.tensor([-1.0, 2.0]), "k3": torch.tensor([0.25])}, exact=0.5).axes[0]
    k1, k3, exact = axes.lines
    assert list(k1.get_ydata()) == [-1.0, 0.5]
    assert list(k3.get_ydata()) == [0.25]
    assert list(exact.get_ydata()) == [0.5, 0.5]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["k1 0.50", "k3 0.25"]
    assert "exact 0.50" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("samples", [torch.zeros(0), torch.zeros(2, 2)])
def test_running_means_need_samples(samples):
    with pytest.raises(ValueError, match="'k1' has shape"):
        running_means_figure({"k1": samples}, exact=0.0)


def test_pictures_have_a_text_that_no_number_changes():
    assert face(kl_strip(["a"], [1.0]))["text/plain"] == face(kl_strip(["b"], [2.0]))["text/plain"]
    one, two = (running_means({"k1": torch.ones(3) * value}, exact=value) for value in (1.0, 2.0))
    assert face(one)["text/plain"] == face(two)["text/plain"]
