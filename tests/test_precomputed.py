"""Log-probs on disk: the right ones for a sequence, refused when stale, whole after any end, and the model gone."""

import gc
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from training import train
from transformers.utils import logging

from refkl_lib import (
    AdapterReference,
    CloneReference,
    PrecomputedReference,
    SwapReference,
    add_lora,
    compute_kl_divergence,
    copy_adapter,
    kl_loss,
    load_model,
    load_tokenizer,
    sample_batch,
)
from refkl_lib.reference.precomputed import tokenizer_fingerprint

LENGTHS = (5, 9, 12, 1, 7, 12)


def sequences() -> list[Tensor]:
    ids = sample_batch("pocket", batch=1, seq=sum(LENGTHS))["input_ids"][0]
    return list(ids.split(LENGTHS))


def padded(rows: list[Tensor], side: str = "right", to: int = 0) -> dict[str, Tensor]:
    width = max(to, *(len(row) for row in rows))
    ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, columns], mask[number, columns] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def batches() -> list[dict[str, Tensor]]:
    return [padded(sequences()[start : start + 2]) for start in (0, 2, 4)]


def compute(folder, model=None, **options) -> PrecomputedReference:
    settings = {"batches": batches(), "tokenizer": load_tokenizer("pocket"), "progress": False} | options
    data = settings.pop("batches")
    return PrecomputedReference.compute(load_model("pocket") if model is None else model, data, folder, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log-probs"


# What it serves


def test_the_batches_that_were_computed_come_back_bit_for_bit(folder):
    reference, clone = compute(folder), CloneReference(load_model("pocket"))
    for batch in batches():
        served, expected, mask = reference.log_probs(**batch), clone.log_probs(**batch), batch["attention_mask"][:, 1:]
        assert served.shape == expected.shape
        assert served.dtype == torch.float32
        assert torch.equal(served[mask == 1], expected[mask == 1])
        assert (served[mask == 0] == 0).all()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("order", [[4, 0], [2, 5, 3, 0, 1, 4], [1, 1, 1]])
def test_any_order_composition_and_padding(folder, side, order):
    reference, clone = compute(folder), CloneReference(load_model("pocket"))
    batch = padded([sequences()[number] for number in order], side, to=15)
    served, mask = reference.log_probs(**batch), batch["attention_mask"]
    known = (mask[:, 1:] * mask[:, :-1]).bool()
    torch.testing.assert_close(served[known], clone.log_probs(**batch)[known], rtol=1e-4, atol=1e-4)
    first = (mask[:, 1:] > mask[:, :-1]).bool()  # follows nothing but padding
    assert torch.isnan(served[first]).all()
    assert (served[~known & ~first] == 0).all()
    assert first.sum() == (len(order) if side == "left" else 0)


def test_without_a_mask_every_token_counts(folder):
    batch = sample_batch("pocket", batch=2, seq=16)
    reference = compute(folder, batches=[{"input_ids": batch["input_ids"]}])
    assert torch.equal(reference.log_probs(batch["input_ids"]), reference.log_probs(**batch))


def test_counting_the_first_token_after_padding_is_an_error_and_not_a_number(folder):
    reference = compute(folder)
    batch = padded(sequences()[:2], "left")
    ours = CloneReference(load_model("pocket")).log_probs(**batch)
    mask = batch["attention_mask"]
    with pytest.raises(ValueError, match="NaN in a value that counts"):
        kl_loss(ours, reference.log_probs(**batch), mask=mask[:, 1:])
    assert kl_loss(ours, reference.log_probs(**batch), mask=mask[:, 1:] * mask[:, :-1]) < 1e-6


def test_an_unknown_sequence_is_named(folder):
    reference = compute(folder)
    rows = sequences()
    with pytest.raises(ValueError, match=r"sequence 1 of the batch \(8 tokens\) is not in the data set"):
        reference.log_probs(**padded([rows[0], rows[1][:-1]]))


def test_a_mask_with_a_hole_or_without_a_token_is_refused(folder):
    reference = compute(folder)
    for mask in ([[1, 0, 1]], [[0, 0, 0]]):
        with pytest.raises(ValueError, match="sequence 0 is not one block of ones"):
            reference.log_probs(torch.tensor([[5, 6, 7]]), torch.tensor(mask))


def test_it_serves_no_logits_and_says_why(folder):
    reference = compute(folder)
    batch = batches()[0]
    for ask in (
        lambda: reference.logits(**batch),
        lambda: reference.as_reference(),
        lambda: compute_kl_divergence(load_model("pocket"), reference, batch),
        lambda: PrecomputedReference.compute(reference, batches(), folder, tokenizer=load_tokenizer("pocket")),
    ):
        with pytest.raises(ValueError, match=r"no exact KL: that is a sum over the vocabulary.*kl_loss"):
            ask()


# Who computes


def test_a_reference_computes_as_its_model_does(folder, tmp_path):
    bare = compute(folder)
    policy = load_model("pocket")
    swap = SwapReference(policy)
    train(policy, swap, sample_batch("pocket", batch=1, seq=16))
    assert torch.equal(compute(tmp_path / "swap", swap).log_probs(**batches()[0]), bare.log_probs(**batches()[0]))


def test_an_adapter_is_switched_off_unless_its_frozen_copy_is_meant(folder, tmp_path):
    bare, batch = compute(folder), batches()[0]
    policy = add_lora(load_model("pocket"), rank=4)
    train(policy, CloneReference(load_model("pocket")), batch, steps=2)
    off = compute(tmp_path / "off", policy)
    assert torch.equal(off.log_probs(**batch), bare.log_probs(**batch))
    assert off.fingerprint() == bare.fingerprint()
    copy_adapter(policy, "ref")
    frozen = compute(tmp_path / "ref", AdapterReference(policy, "ref"))
    assert frozen.fingerprint() != bare.fingerprint()
    assert not torch.equal(frozen.log_probs(**batch), bare.log_probs(**batch))


def test_nothing_holds_the_model_afterwards(folder):
    model = load_model("pocket")
    alive = [weakref.ref(model), weakref.ref(model.lm_head.weight)]
    reference = compute(folder, model)
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert reference.owned_bytes() == 0
    assert reference.log_probs(**batches()[0]).shape == (2, 8)


def test_a_shuffled_loader_will_do(folder):
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in torch.arange(40).view(8, 5)]
    loader = DataLoader(rows, batch_size=3, shuffle=True)  # type: ignore[arg-type]
    reference = compute(folder, batches=loader)
    assert len(reference._shards) == 8
    assert reference.fingerprint() == compute(folder, batches=loader).fingerprint()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": iter(batches())}, TypeError, "batches is a list_iterator, which can be gone through once"),
        ({"every": 0}, ValueError, "every is 0"),
        ({"batches": []}, ValueError, "batches is empty"),
    ],
)
def test_an_argument_that_cannot_work_is_named(folder, options, error, message):
    with pytest.raises(error, match=message):
        compute(folder, **options)
    assert not folder.exists()


def test_batches_that_change_between_two_looks_are_refused(folder):
    class Changing:
        looks = 0

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            self.looks += 1
            return iter(batches()[: 4 - self.looks])

    with pytest.raises(ValueError, match="without 2 of the sequences they had the first time"):
        compute(folder, batches=Changing())


def test_a_partitioned_model_is_refused(folder):
    model = load_model("pocket")
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="no rank can compute alone"):
        compute(folder, model)


def test_a_broken_model_is_not_written_down(folder):
    model = load_model("pocket")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="the model gives NaN"):
        compute(folder, model)
    assert not list(folder.glob("*.safetensors"))


# Stale


def other_tokenizer():
    tokenizer = load_tokenizer("pocket")
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def other_model():
    model = load_model("pocket")
    model.lm_head.weight.data[0, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"model": other_model}, "weights"),
        ({"tokenizer": other_tokenizer}, "tokenizer"),
        ({"batches": lambda: batches()[1:]}, "data"),
        ({"model": other_model, "batches": lambda: batches()[1:]}, "weights and other data"),
    ],
)
def test_what_is_stale_is_refused_by_name(folder, options, differs):
    compute(folder)
    with pytest.raises(ValueError, match=f"stale: they are of other {differs}\\. "):
        compute(folder, **{name: make() for name, make in options.items()})
    assert len(compute(folder)._shards) == len(set(map(tuple, map(Tensor.tolist, sequences()))))


def test_padding_and_truncation_do_not_make_another_tokenizer():
    tokenizer = load_tokenizer("pocket")
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["one", "three four"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(other_tokenizer()) != before


def test_a_folder_without_log_probs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no precomputed log-probs: PrecomputedReference\.compute"):
        PrecomputedReference(tmp_path)


# Resumed


def passes(model) -> list[int]:
    """Return a list that grows with every pass of the model, by how many sequences it was of."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    return seen


def test_what_is_there_is_not_computed_again(folder):
    compute(folder)
    model = load_model("pocket")
    seen = passes(model)
    again = compute(folder, model)
    assert seen == []
    assert torch.equal(again.log_probs(**batches()[1]), PrecomputedReference(folder).log_probs(**batches()[1]))


KILLED = """
import os, signal, sys
import safetensors.torch
from refkl_lib.reference import precomputed
from test_precomputed import batches, compute, load_model

folder, where, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = []

def die(*_):
    calls.append(1)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path):
    whole = safetensors.torch.save(tensors)
    path.write_bytes(whole[: len(whole) // 2])
    die()
    path.write_bytes(whole)

model = load_model("pocket")
if where == "pass":
    model.register_forward_pre_hook(die)
elif where == "write":
    precomputed.save_file = half
else:
    precomputed.flush = die
compute(folder, model, every=1)
"""


@pytest.mark.parametrize(
    ("where", "at", "left"),
    [
        ("pass", 1, 3),
        ("pass", 3, 1),
        ("write", 1, 3),
        ("write", 2, 2),
        ("flush", 1, 3),  # of the key
        ("flush", 2, 3),
        ("flush", 4, 1),
    ],
)
def test_a_kill_at_any_point_loses_no_finished_shard(folder, where, at, left):
    run = subprocess.run([sys.executable, "-c", KILLED, folder, where, str(at)], cwd=Path(__file__).parent)
    assert run.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"of 6 sequences: go on with|has no precomputed log-probs"):
        PrecomputedReference(folder)
    for shard in folder.glob("log-probs-*.safetensors"):
        load_file(shard)  # whole
    model = load_model("pocket")
    seen = passes(model)
    resumed = compute(folder, model)
    assert len(seen) == left
    assert not list(folder.glob(".*.partial"))
    clone = CloneReference(model)
    for batch in batches():
        known = batch["attention_mask"][:, 1:] == 1
        assert torch.equal(resumed.log_probs(**batch)[known], clone.log_probs(**batch)[known])


def test_a_shard_holds_several_batches(folder):
    compute(folder, every=2)
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_only_what_is_missing_of_a_batch_is_computed(folder):
    rows = sequences()
    compute(folder, every=1)
    next(folder.glob("*.safetensors")).unlink()
    model = load_model("pocket")
    seen = passes(model)
    compute(folder, model, batches=[padded(rows)])
    assert seen == [2]


# The bar


def test_a_bar_that_can_be_silenced(folder, tmp_path, capfd):
    compute(folder, progress=True)
    out, bar = capfd.readouterr()
    assert out == ""
    assert "log-probs: 100%" in bar
    assert "6/6" in bar
    compute(tmp_path / "quiet")
    logging.disable_progress_bar()
    try:
        compute(tmp_path / "quiet too", progress=True)
    finally:
        logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "")
