"""Shards: the arithmetic by hand, and against what DeepSpeed gives to real ranks."""

import os
import sys
from pathlib import Path

import pytest
import torch
from shards_rank import SHAPES, numbered
from torch import nn

from refkl_lib import load_model, shards
from refkl_lib.ranks.job import Job
from refkl_lib.ranks.launch import command_for
from refkl_lib.ranks.shards import Shard


def cut(numel: int, ranks: int) -> list[list[int]]:
    """The elements of each rank, from a list that is filled up and sliced."""
    per_rank = (numel + ranks - 1) // ranks
    filled = [*range(numel), *[-1] * (per_rank * ranks - numel)]
    pieces = [filled[rank * per_rank : (rank + 1) * per_rank] for rank in range(ranks)]
    return [[element for element in piece if element >= 0] for piece in pieces]


def shard_of(numel: int, ranks: int, dtype: torch.dtype = torch.float32) -> Shard:
    (shard,) = shards(nn.ParameterList([torch.zeros(numel, dtype=dtype)]), ranks)
    return shard


# numel, ranks, per_rank, padding
BY_HAND = [(8, 2, 4, 0), (7, 2, 4, 1), (5, 4, 2, 3), (1, 4, 1, 3), (9, 1, 9, 0), (10, 4, 3, 2)]


@pytest.mark.parametrize(("numel", "ranks", "per_rank", "padding"), BY_HAND)
def test_a_parameter_is_cut_into_equal_pieces(numel: int, ranks: int, per_rank: int, padding: int) -> None:
    shard = shard_of(numel, ranks)
    assert (shard.numel, shard.per_rank, shard.padding) == (numel, per_rank, padding)
    assert [list(shard.elements(rank)) for rank in range(ranks)] == cut(numel, ranks)


def test_a_rank_may_hold_padding_alone() -> None:
    shard = shard_of(5, 4)  # two each: 0 1 | 2 3 | 4 - | - -
    assert [list(shard.elements(rank)) for rank in range(4)] == [[0, 1], [2, 3], [4], []]
    assert [shard.owner(element) for element in range(5)] == [0, 0, 1, 1, 2]


def test_bytes_are_those_of_the_dtype_padding_included() -> None:
    assert shard_of(7, 2).bytes_per_rank == 16
    assert shard_of(7, 2, torch.bfloat16).bytes_per_rank == 8


def test_elements_and_ranks_that_are_not_there_are_refused() -> None:
    for element in (-1, 5):
        with pytest.raises(ValueError, match=f"element is {element}, but '0' has the elements 0 to 4"):
            shard_of(5, 4).owner(element)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank is {rank}, but the 4 ranks are 0 to 3"):
            shard_of(5, 4).elements(rank)
    with pytest.raises(ValueError, match="ranks is 0"):
        shards(nn.Linear(1, 1), ranks=0)


def test_a_model_is_cut_parameter_by_parameter_tied_weights_once_buffers_not() -> None:
    model = load_model("pocket", device="cpu")
    cut_up = shards(model, 3)
    assert [shard.name for shard in cut_up] == [name for name, _ in model.named_parameters()]
    assert cut_up[0].shape == (259, 128)
    assert "lm_head.weight" not in {shard.name for shard in cut_up}
    assert sum(shard.numel for shard in cut_up) == model.num_parameters()


def test_a_model_on_meta_is_cut_the_same() -> None:
    assert shards(numbered().to("meta"), 3) == shards(numbered(), 3)


@pytest.mark.skipif(sys.platform != "linux", reason="real ranks need Linux")
def test_deepspeed_cuts_as_the_arithmetic_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    with Job(*command_for(3, "shards_rank", [])) as job:
        told = {event["rank"]: event for event in job.events(3, timeout=200) if event["event"] == "cut"}
    cut_up = shards(numbered(), 3)
    assert {shard.name: shard.shape for shard in cut_up} == SHAPES
    assert {shard.padding for shard in cut_up} == {0, 1, 2}
    for rank in range(3):
        assert told[rank]["same_when_partitioned"]
        for shard in cut_up:
            held, own = told[rank]["held"][shard.name], shard.elements(rank)
            assert len(held) == shard.per_rank
            assert held[: len(own)] == list(own)
