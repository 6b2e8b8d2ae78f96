"""Predictions and the file that remembers them."""

import base64
import json
import re
import subprocess
import sys
import threading

import pytest
import torch
from filelock import FileLock

from refkl_lib import check, predict, progress, reveal
from refkl_lib.lessons import course, store
from refkl_lib.lessons.kl import k3
from refkl_lib.lessons.progress import Prediction


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("REFKL_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "progress.json"


def guessed():
    return tuple(prediction for prediction in progress().predictions if prediction.guess is not None)


def test_guess_truth_and_ratio_are_shown():
    assert repr(predict("05.logits", 500)) == "05.logits: your guess is 500."
    assert repr(reveal("05.logits", torch.tensor(982.0), unit="MiB")) == (
        "05.logits\n  your guess        500 MiB\n  measured          982 MiB\n  measured / guess  1.96"
    )


def test_what_predict_says_does_not_depend_on_what_was_there():
    first = predict("q", 1)
    reveal("q", 2)
    predict("other", 3)
    assert predict("q", 1) == first


def test_a_later_guess_replaces_the_first_and_awaits_its_measurement():
    predict("q", 1)
    reveal("q", 2)
    predict("q", 4)
    assert guessed() == (Prediction("q", guess=4.0),)


def test_a_question_without_a_guess_is_measured_all_the_same():
    assert reveal("q", 0.25) == 'q: measured 0.25; no guess was made with predict("q", …).'
    assert guessed() == ()


def test_dots_are_no_guess_yet():
    predict("q", 5)
    assert "no guess yet" in predict("q", ...)
    assert guessed() == (Prediction("q", guess=5.0),)


@pytest.mark.parametrize(
    ("guess", "truth", "shown"),
    [(2, 3, "1.50"), (0, 3, "–"), (0, 0, "1.00"), (1000, 1, "0.001"), (-1, 2, "-2.00"), (3, 0, "0")],
)
def test_ratios(guess, truth, shown):
    predict("q", guess)
    assert reveal("q", truth).endswith(f"measured / guess  {shown}")


@pytest.mark.parametrize(("value", "shown"), [(1234567, "1,234,567"), (0.01234, "0.01234"), (513.13, "513.1")])
def test_numbers_are_shown_as_people_read_them(value, shown):
    assert predict("q", value) == f"q: your guess is {shown}."


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("500 MiB", TypeError),
        (None, TypeError),
        (torch.zeros(2), TypeError),
        (float("nan"), ValueError),
        (1e999, ValueError),
    ],
)
def test_what_is_not_one_number_is_refused_and_nothing_is_kept(value, error, file):
    for function, name in ((predict, "your guess"), (reveal, "the measurement")):
        with pytest.raises(error, match=f"{name} is .*, but must be"):
            function("q", value)
    assert not file.exists()


@pytest.fixture
def two_notebooks(monkeypatch):
    monkeypatch.setattr("refkl_lib.lessons.progress.PREDICTIONS", ("02.clone", "05.kl", "05.share"))
    known = ("02.freeze", "05.k3", "05.direction")
    monkeypatch.setattr("refkl_lib.lessons.progress.exercises", lambda: dict.fromkeys(known))


def test_progress_prints_every_prediction_and_exercise(two_notebooks):
    predict("mine", 7)
    predict("05.kl", 0.5)
    reveal("05.kl", 0.25, unit="nats")
    check("05.k3", k3)
    check("05.k3", lambda p, q: p)
    check("05.direction", lambda p, q: p)
    check("05.reward", ...)
    assert repr(progress()) == (
        "prediction  guess     measured   measured / guess\n"
        "02.clone    open\n"
        "05.kl       0.5 nats  0.25 nats  0.50\n"
        "05.share    open\n"
        "mine        7         not yet\n"
        "\n"
        "exercise      state   tries\n"
        "02.freeze     open    0\n"
        "05.k3         solved  2\n"
        "05.direction  tried   1"
    )


def test_progress_has_all_that_the_course_asks_for():
    assert [prediction.question for prediction in progress().predictions] == list(course.PREDICTIONS)
    assert [attempt.exercise for attempt in progress().exercises] == list(course.exercises())


def test_progress_is_a_picture_for_eyes_and_ears_and_a_table_for_a_terminal(two_notebooks):
    predict("05.kl", 0.5)
    reveal("05.kl", 0.25)
    data, _ = progress()._repr_mimebundle_()
    assert data["text/plain"] == repr(progress())
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    [alt] = re.findall(r'^<img [^>]*alt="([^"]*)"[^>]*>$', data["text/html"])
    assert alt == (
        "Predictions: 1 of 3 measured, 1 within a factor of 2; for each, measured / guess on an axis. "
        "Exercises: 0 of 3 solved, 0 tried."
    )


def test_an_untouched_stub_writes_nothing(file):
    check("05.k3", ...)
    assert not file.exists()


def test_the_file_can_be_deleted(file):
    predict("q", 1)
    assert progress().file == file
    file.unlink()
    assert guessed() == ()
    predict("q", 2)
    assert json.loads(file.read_text())["predictions"] == {"q": {"guess": 2.0}}


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"predictions": {}}',
        b'{"predictions": {"q": 5}, "exercises": {}}',
        b'{"predictions": {"q": {"guess": "5"}}, "exercises": {}}',
        b'{"predictions": {"q": {}}, "exercises": {}}',
        b'{"predictions": {}, "exercises": {"05.k3": {"won": true}}}',
    ],
)
def test_a_file_that_cannot_be_understood_is_set_aside(broken, file):
    file.parent.mkdir()
    for count in (1, 2):
        file.write_bytes(broken)
        with pytest.warns(UserWarning, match=f"it is now progress.unreadable-{count}.json"):
            predict("q", 1)
        assert guessed() == (Prediction("q", guess=1.0),)
        assert file.with_name(f"progress.unreadable-{count}.json").read_bytes() == broken


def test_two_kernels_at_once_lose_nothing():
    code = "from refkl_lib import predict; import sys; [predict(f'{sys.argv[1]}-{n}', n) for n in range(50)]"
    kernels = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b", "c")]
    assert [kernel.wait() for kernel in kernels] == [0, 0, 0]
    assert len(guessed()) == 150


def test_threads_of_one_kernel_lose_nothing():
    threads = [threading.Thread(target=predict, args=(f"q{n}", n)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(guessed()) == 20


def test_a_write_that_fails_leaves_the_file_as_it_was(file, monkeypatch):
    predict("q", 1)
    before = file.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(RuntimeError, match=r"disk full.*: set REFKL_DATA to a folder that can be written"):
        predict("q", 2)
    assert file.read_bytes() == before


def test_a_folder_that_is_a_file_is_explained(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("REFKL_DATA", str(tmp_path / "taken"))
    with pytest.raises(RuntimeError, match="set REFKL_DATA"):
        predict("q", 1)


def test_a_lock_that_is_never_released_is_named(file, monkeypatch):
    monkeypatch.setattr(store, "_LOCK_SECONDS", 0.1)
    predict("q", 1)
    with FileLock(file.with_suffix(".lock")), pytest.raises(RuntimeError, match=r"has held .*progress\.lock"):
        progress()


def test_the_file_is_in_the_users_data_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("REFKL_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert store.progress_file() == tmp_path / "refkl" / "progress.json"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.progress_file() == tmp_path / ".local" / "share" / "refkl" / "progress.json"
