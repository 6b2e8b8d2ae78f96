"""The drawn tree and its panel: what is lit, what the controls do, and what is said while pricing."""

import base64
import copy
from dataclasses import replace

import pytest

from refkl_lib import TreePanel, advise, decision_tree
from refkl_lib.advisor.tree import FIRST, LADDERS, NOTHING
from refkl_lib.units import GIB
from refkl_lib.view.tree import END, OFF, ON, tree_figure

PNG = b"\x89PNG\r\n"
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def advice_of(memory=8, **run):
    return advise("SmolLM2-135M-Instruct", **{"seq": 128, "device_memory": int(memory * GIB)} | run)


def face(thing):
    data, metadata = thing._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(PNG)
    assert metadata["image/png"]["alt"] == data["text/plain"]
    return data


def texts(figure):
    return {text.get_text().replace("\n", " "): text for text in figure.axes[0].texts}


def boxes(figure, style):
    return [box for box in figure.axes[0].patches if box.get_linewidth() == style["linewidth"]]


# The picture


@pytest.mark.parametrize("run", [{}, {"memory": 1}, {"lora_rank": 4}, {"memory": 1.9, "ranks": 8}])
def test_the_path_is_lit_and_nothing_else(run):
    advice = advice_of(**run)
    figure = tree_figure(advice)
    bold = {text for text, drawn in texts(figure).items() if drawn.get_weight() == "bold"}
    questions = {answer.question for answer in advice.path}
    every = {FIRST, *(question.text for ladder in LADDERS.values() for question in ladder)}
    assert bold & every == questions
    end = advice.recommended or NOTHING
    assert end in bold
    ways = {question.way.name for ladder in LADDERS.values() for question in ladder}
    assert bold & (ways | {NOTHING}) == {end}
    on_path = [box for box in boxes(figure, ON) if box.get_facecolor() != (1.0, 1.0, 1.0, 1.0)]
    assert len(on_path) == len(questions) + 1
    assert len(boxes(figure, OFF)) == len(every) + len(ways) + 2 - len(on_path)


def test_a_box_on_the_path_says_what_decided_it():
    advice = advice_of(1)
    shown = " ".join(texts(tree_figure(advice)))
    for answer in advice.path:
        assert f"{'yes' if answer.yes else 'no'}: {answer.because}" in shown


def test_what_is_lit_is_not_told_by_colour_alone():
    assert ON["linewidth"] > OFF["linewidth"]
    assert END["linewidth"] > OFF["linewidth"]
    assert OFF["linestyle"] != ON.get("linestyle", "-")


def test_both_ladders_are_drawn_whole_and_apart():
    figure = tree_figure(advice_of())
    frames = [box.get_bbox() for box in figure.axes[0].patches]
    for number, one in enumerate(frames):
        assert not any(one.overlaps(other) for other in frames[number + 1 :])
    low, high = figure.axes[0].get_xlim()
    assert all(low <= frame.x0 and frame.x1 <= high for frame in frames)


def test_the_title_says_where_the_path_ends():
    assert tree_figure(advice_of(ranks=2)).axes[0].get_title(loc="left") == (
        "SmolLM2-135M-Instruct, all weights, 2 GPUs of 8 GiB: clone"
    )


def test_the_picture_has_a_text_that_never_changes():
    assert face(decision_tree(advice_of()))["text/plain"] == face(decision_tree(advice_of(1)))["text/plain"]


# The panel


@pytest.fixture(scope="module")
def made():
    return TreePanel(SMALL, memory=8, seq=128)


@pytest.fixture
def panel(made):
    made.lora_rank.value, made.memory.value, made.ranks.value = None, 8, 1
    return made


def test_a_control_changes_path_and_picture(panel):
    assert panel.advice.recommended == "clone"
    before = panel.path.value, panel.picture.value
    panel.lora_rank.value = 16
    assert panel.advice.recommended == "adapter"
    assert "adapter: switch the adapter off." in panel.path.value
    assert panel.path.value != before[0]
    assert panel.picture.value != before[1]


def test_every_control_is_an_argument_of_advise(panel):
    changed = {
        "ranks": 4, "memory": 16, "seq": 256, "batch": 2, "lora_rank": 8,
        "host_memory": 32, "checkpointing": True, "fixed_data": True,
    }  # fmt: skip
    for name, value in changed.items():
        getattr(panel, name).value = value
    assert TreePanel(SMALL, **changed).advice.run == panel.advice.run
    in_bytes = {"device_memory": changed.pop("memory") * GIB, "host_memory": changed["host_memory"] * GIB}
    assert panel.advice.run == advise(SMALL, **changed | in_bytes).run
    for name, value in (
        ("seq", 128),
        ("batch", 1),
        ("host_memory", 0),
        ("checkpointing", False),
        ("fixed_data", False),
    ):
        getattr(panel, name).value = value


def test_it_says_so_while_a_bill_is_priced(panel, monkeypatch):
    said = []

    def slow(*model, **run):
        said.append(panel.path.value)
        return advise(*model, **run)

    monkeypatch.setattr("refkl_lib.view.tree.advise", slow)
    panel.memory.value = 12
    assert f"Pricing {SMALL} …" in said[0]
    assert "Pricing" not in panel.path.value


def test_the_button_shows_all_bills(panel):
    panel.button.click()
    assert "precomputed" in panel.details.value
    assert "Pricing" not in panel.path.value
    assert not panel.button.disabled
    panel.memory.value = 16
    assert panel.details.value == "", "the bills of another run must not stay"


def test_an_error_is_shown_and_raised(panel, monkeypatch):
    def fail(*model, **run):
        raise ValueError("no such GPU")

    monkeypatch.setattr("refkl_lib.view.tree.advise", fail)
    with pytest.raises(ValueError, match="no such GPU"):
        panel.memory.value = 24
    assert 'role="alert"' in panel.path.value
    assert "no such GPU" in panel.path.value
    broken = copy.copy(panel)
    broken.advice = replace(panel.advice, run=None)
    with pytest.raises(AttributeError):
        broken.show_bills()
    assert 'role="alert"' in panel.path.value


def test_a_value_that_no_control_has_is_refused():
    with pytest.raises(ValueError, match="memory is 81, but must be a step between 8 and 192"):
        TreePanel(SMALL, memory=81)


def test_the_panel_has_a_static_face_and_a_live_one(panel):
    data = face(panel)
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == face(decision_tree(panel.advice))["text/plain"]


def test_the_panel_reaches_from_small_to_large(panel):
    assert (panel.model.values[0], panel.model.values[-1]) == (SMALL, "meta-llama/Llama-3.1-405B")
    assert (panel.ranks.values[0], panel.ranks.values[-1]) == (1, 1024)
    assert (panel.memory.values[0], panel.memory.values[-1]) == (8, 192)
