"""Sliders, menus and radio buttons: what the browser is told, and what it tells."""

import pytest

from refkl_lib.view.choice import Menu, Radios, Slider, named


@pytest.fixture(params=[Slider, Menu, Radios])
def choice(request):
    return request.param("GPUs", [("one", 1), ("many", [2, 3])], 1)


def test_value_and_what_is_shown_change_together(choice):
    seen = []
    choice.observe(lambda change: seen.append(change["new"]), "value")
    choice.index = 1  # as the browser does
    assert choice.value == [2, 3]
    choice.value = 1
    assert choice.index == 0
    assert seen == [[2, 3], 1]


def test_the_browser_is_told_all_it_shows(choice):
    shown = choice.get_state()
    assert (shown["label"], shown["texts"], shown["index"]) == ("GPUs", ["one", "many"], 0)
    assert "value" not in shown


def test_what_is_not_among_them_is_named():
    with pytest.raises(ValueError, match="GPUs is 7, but must be a step between 1 and 4"):
        Slider("GPUs", named(1, 2, 4), 1).value = 7
    with pytest.raises(ValueError, match="model is 'none', but must be one of 'small', 'large'"):
        Menu("model", named("small", "large"), "none")


def test_what_the_browser_tells_is_chosen_and_answered_once_it_was_heard(monkeypatch):
    told = []
    choice = Slider("GPUs", named(1, 2, 4), 1)
    monkeypatch.setattr(choice, "send", lambda content, *_: told.append((content, choice.value)))
    choice._handle_custom_msg({"index": 2}, [])
    assert choice.value == 4
    assert told == [("heard", 4)]


def test_the_browser_is_answered_too_if_what_was_chosen_does_not_work(monkeypatch):
    told = []
    choice = Slider("GPUs", named(1, 2), 1)
    monkeypatch.setattr(choice, "send", lambda content, *_: told.append(content))
    choice.observe(lambda change: 1 / 0, "value")
    with pytest.raises(ZeroDivisionError):
        choice._told(choice, {"index": 1}, [])
    assert told == ["heard"]
