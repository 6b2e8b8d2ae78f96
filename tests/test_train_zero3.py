"""The training loop with a reference in real ranks' shards: the curve that a clone gives."""

import os
import sys
from pathlib import Path

import pytest

from refkl_lib.ranks.job import Job
from refkl_lib.ranks.launch import command_for


@pytest.mark.skipif(sys.platform != "linux", reason="real ranks need Linux")
def test_a_partitioned_reference_gives_the_same_run(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    with Job(*command_for(2, "train_rank", [])) as job:
        told = [event for event in job.events(2, timeout=200) if event["event"] == "trained"]
    assert sorted(event["rank"] for event in told) == [0, 1]
    for event in told:
        for partitioned, cloned in zip(event["partitioned"], event["cloned"], strict=True):
            assert partitioned.pop("sample") == cloned.pop("sample")
            assert partitioned == pytest.approx(cloned, rel=1e-4, abs=1e-6)
        assert event["partitioned"][-1]["kl"] > 0
