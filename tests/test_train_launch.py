"""A training on real ranks that share their reference; what cannot be trained there is told without starting any."""

import json
import re
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch

from refkl_lib import TrainRun, add_lora, create_reference, launch_train, load_model, load_tokenizer, storage_bytes
from refkl_lib.train import launch, rank

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="real ranks need Linux")


def test_ranks_that_share_a_reference_train_as_one_process_does_with_its_adapter_off(nothing_left: None) -> None:
    prompts = ["ab", "the c"]

    def make(strategy: str) -> TrainRun:  # a function in a function: it can only be sent by value
        torch.manual_seed(0)
        policy = add_lora(load_model("pocket", device="cpu"), rank=4)
        reference = create_reference(policy, strategy)
        return TrainRun(policy, reference, load_tokenizer("pocket"), prompts, len, new_tokens=6, learning_rate=1e-2)

    events = []
    shared = launch_train(make, iterations=3, on_event=events.append)
    alone = make("adapter").train(3).history
    assert [record.sample for record in shared.history] == [record.sample for record in alone]
    for field in ("kl", "loss", "reward", "entropy"):
        ours, theirs = ([getattr(record, field) for record in history] for history in (shared.history, alone))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert shared.history[-1].kl > 0
    whole = storage_bytes(load_model("pocket", device="cpu"))
    assert [held < 0.51 * whole for held in shared.reference_bytes] == [True, True]
    assert sum(shared.reference_bytes) >= whole
    steps = [(event["rank"], event["step"]) for event in events if event["event"] == "step"]
    assert sorted(steps) == [(rank, step) for rank in range(2) for step in range(3)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda strategy: strategy, 'make("zero3") returned a str, but must return a TrainRun'),
        (lambda strategy: a_run(), 'make("zero3") keeps its reference by "adapter", which ranks do not share'),
    ],
)
def test_what_ranks_cannot_share_is_refused(make: object, said: str, tmp_path: Path) -> None:
    (tmp_path / launch.MAKE).write_bytes(cloudpickle.dumps(make))
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        rank.made(str(tmp_path))


def test_ranks_that_came_apart_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_histories(ranks: int, worker: str, settings: dict[str, object], *_: object) -> None:
        record = dict.fromkeys(["iteration", "beta", "reward", "kl", "entropy", "loss", "sample"], 0)
        for number in range(ranks):
            found = {"reference_bytes": 1, "history": [record | {"kl": number}]}
            launch.found_by(str(settings["folder"]), number).write_text(json.dumps(found))

    monkeypatch.setattr(launch, "run_ranks", leave_histories)
    assert launch_train(a_run, 1, ranks=1).reference_bytes == (1,)
    with pytest.raises(ValueError, match=r"rank 1 did not train as rank 0 did.*torch\.manual_seed"):
        launch_train(a_run, 1)


@pytest.mark.parametrize(("iterations", "ranks"), [(0, 2), (1, 0)])
def test_no_iteration_and_no_rank_are_refused(iterations: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="is 0, but must be a whole number, at least 1"):
        launch_train(a_run, iterations, ranks)


def a_run(strategy: str = "adapter") -> TrainRun:
    policy = add_lora(load_model("pocket"), rank=4)
    return TrainRun(policy, create_reference(policy, "adapter"), load_tokenizer("pocket"), ["ab"], len)
