"""The leaderboard: who is first, who is too far away, and that nothing earlier is lost."""

import json
from types import SimpleNamespace

import pytest

from refkl_lib import enter, leaderboard, predict
from refkl_lib.lessons import store
from refkl_lib.train.records import Record


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("REFKL_DATA", str(tmp_path))
    return tmp_path / "progress.json"


def run(*reward_and_kl, beta=1.0):
    history = [Record(at, beta, reward, kl, 3.0, 0.0, "") for at, (reward, kl) in enumerate(reward_and_kl)]
    return SimpleNamespace(history=history, kl="k2", place="loss", learning_rate=5e-3)


def test_the_best_within_the_leash_is_first():
    enter("far", run((90, 12), (90, 12), (90, 12), beta=0.0))
    enter("good", run((0, 0), (12, 1), (13, 2), (17, 3)))
    board = enter("tame", run((5, 0), (5, 0), (5, 0)))
    assert board == leaderboard()
    assert board.splitlines() == [
        "    name  reward  KL, nats  settings",
        " 1  good    14.0       2.0  beta 1, k2 in the loss, rate 0.005, 4 iterations",
        " 2  tame     5.0       0.0  beta 1, k2 in the loss, rate 0.005, 3 iterations",
        " –  far     90.0      12.0  beta 0, k2 in the loss, rate 0.005, 3 iterations",
    ]


def test_a_name_has_its_latest_run():
    enter("me", run((9, 0), (9, 0), (9, 0)))
    assert enter("me", run((4, 0), (4, 0), (4, 0))).splitlines()[1:] == leaderboard().splitlines()[1:]
    assert store.load()["runs"]["me"]["reward"] == 4.0


def test_an_empty_board_has_a_head_alone():
    assert leaderboard().splitlines() == ["    name  reward  KL, nats  settings"]


def test_a_file_from_before_there_were_runs_is_kept(file):
    file.write_text(json.dumps({"predictions": {"q": {"guess": 2.0}}, "exercises": {}}))
    enter("me", run((4, 0), (4, 0), (4, 0)))
    predict("other", 1)
    assert json.loads(file.read_text()).keys() == {"predictions", "exercises", "runs"}
    assert store.load()["predictions"]["q"] == {"guess": 2.0}


@pytest.mark.parametrize(
    ("name", "history", "words"), [(" ", [(1, 0)] * 3, "name is empty"), ("me", [(1, 0)] * 2, "has 2 iterations")]
)
def test_what_cannot_be_entered_is_named_and_not_kept(name, history, words, file):
    with pytest.raises(ValueError, match=words):
        enter(name, run(*history))
    assert not file.exists()
