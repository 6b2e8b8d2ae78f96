"""The ledger against sums done by hand, against the profiler, and under all that training does to it."""

import copy
import gc
import json
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from refkl_lib import CloneReference, MemoryLedger
from refkl_lib.memory.ledger import OWNERS

KIB = 256  # elements of float32 in one KiB


def owned(**bytes_of: int) -> dict[str, int]:
    return dict.fromkeys(OWNERS, 0) | bytes_of


def total(owners: dict[str, int]) -> int:
    return sum(owners.values())


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loss_of(policy, reference, ids):
    """Next-token loss plus a KL to the reference."""
    log_probs = policy(ids).logits.log_softmax(-1)
    with torch.no_grad():
        wanted = reference(ids).logits.log_softmax(-1)
    kl = F.kl_div(wanted, log_probs, log_target=True, reduction="batchmean")
    return kl + F.nll_loss(log_probs[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def unique_bytes(tensors) -> int:
    """What the ledger should find, written without anything that the ledger uses."""
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def everything_in(model):
    return [*model.parameters(), *model.buffers()]


@pytest.fixture
def training():
    policy = llama()
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    return policy, reference, torch.optim.AdamW(policy.parameters()), torch.randint(256, (2, 32))


# Storages counted by hand


def test_what_lives_is_counted_by_storage_and_gone_when_it_is_freed():
    with MemoryLedger() as ledger:
        one = torch.zeros(KIB)
        assert ledger.now() == owned(activations=1024)
        view, in_place = one.view(16, -1).t()[3:], one.add_(1)
        assert ledger.now() == owned(activations=1024)
        two = one + in_place
        assert ledger.now() == owned(activations=2048)
        del one, in_place
        assert ledger.now() == owned(activations=2048)  # the view still needs it
        del view
        assert ledger.now() == owned(activations=1024)
        del two
        assert ledger.now() == owned()
        assert ledger.peak() == owned(activations=2048)


def test_every_kind_of_result_is_counted():
    with MemoryLedger() as ledger:
        made = [torch.tensor([1.0, 2.0]), *torch.ones(4).sort(), torch._foreach_add([torch.ones(2)], 1)]
        assert ledger.now() == owned(activations=8 + 4 * 4 + 4 * 8 + 8)
        made.append(torch.nn.Parameter(torch.ones(5)))
        assert ledger.now() == owned(activations=84)
        made.append(copy.deepcopy(made[-1]))
        assert ledger.now() == owned(activations=104)


def test_who_asked_hears_of_an_operation_when_its_result_is_counted():
    heard = []
    ledger = MemoryLedger()
    ledger.after(torch.ops.aten.mul.Tensor, lambda *args: heard.append((args, ledger.now())))
    one = torch.ones(KIB)
    one * one  # nobody records
    with ledger:
        two = one + one
        product = one * two
    [((first, second), now)] = heard
    assert (first is one, second is two) == (True, True)
    assert now == owned(activations=2048)
    assert product.shape == one.shape


def test_a_storage_that_an_operation_resizes_is_counted_at_its_new_size():
    with MemoryLedger() as ledger:
        buffer = torch.empty(0)
        torch.cat([torch.ones(3), torch.ones(2)], out=buffer)
        assert ledger.now() == owned(activations=20)
        buffer.resize_(100)
        ledger.own("buffer", buffer)
        buffer.resize_(200)
        assert ledger.now() == owned(buffer=800)
        assert ledger.peak() == owned(buffer=800)
        del buffer
        assert ledger.now() == owned(buffer=0)


def test_a_storage_that_grew_after_the_peak_is_in_it_as_it_was_and_freed_once():
    with MemoryLedger() as ledger:
        large, buffer = torch.ones(1000), torch.ones(1)
        del large
        buffer.resize_(2)
        del buffer
        assert ledger.now() == owned()
        assert ledger.peak() == owned(activations=4004)


def test_what_lived_before_is_counted_from_when_it_is_owned():
    before = torch.ones(KIB)
    with MemoryLedger() as ledger:
        before.add_(1)
        before.view(2, -1).t()
        assert ledger.now() == owned()
        assert ledger.own("policy", before) is before
        assert ledger.now() == ledger.peak() == owned(policy=1024)


def test_tied_weights_and_shared_layers_are_counted_once_and_belong_to_the_first_owner():
    policy = llama()
    reference = copy.deepcopy(policy)
    reference.model.layers[0] = policy.model.layers[0]
    with MemoryLedger() as ledger:
        ledger.own("policy", policy)
        ledger.own("reference", reference)
        ledger.own("mine", [policy, {"again": reference}])
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    shared = unique_bytes(policy.model.layers[0].parameters())
    whole = unique_bytes(everything_in(policy))
    assert ledger.now() == owned(policy=whole, reference=whole - shared, mine=0)


def test_the_shard_of_a_zero3_parameter_is_what_it_counts_for():
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.ones(KIB)
    with MemoryLedger() as ledger:
        ledger.own("policy", [parameter])
        assert ledger.now() == owned(policy=1024)


def test_a_small_step_by_hand():
    """A Linear of 440 bytes on 5 rows of 40 bytes; its output is squared, which saves it, and summed."""
    with MemoryLedger() as ledger:
        layer = ledger.own("policy", nn.Linear(10, 10))
        optimizer = ledger.own("optimizer", torch.optim.AdamW(layer.parameters()))
        rows = torch.ones(5, 10)
        assert ledger.now() == owned(policy=440, activations=200)
        loss = layer(rows).square().sum()
        assert ledger.now() == owned(policy=440, activations=200 + 200 + 4)
        loss.backward()
        assert ledger.now() == owned(policy=440, gradients=440, activations=200 + 4)
        optimizer.step()
        moments_and_steps = 2 * 440 + 2 * 4
        assert ledger.now() == owned(policy=440, gradients=440, optimizer=moments_and_steps, activations=204)
        optimizer.zero_grad()
        del loss, rows
        assert ledger.now() == owned(policy=440, optimizer=moments_and_steps)


def test_the_peak_has_its_owners_though_they_were_named_later_and_are_gone_now():
    with MemoryLedger() as ledger:
        weight = torch.ones(KIB)
        scratch = torch.ones(2 * KIB)
        del scratch
        ledger.own("policy", weight)
        del weight
        assert ledger.now() == owned()
        assert ledger.peak() == owned(policy=1024, activations=2048)


# A whole training step


def test_who_owns_what_in_a_training_step(training):
    policy, reference, optimizer, ids = training
    weights = unique_bytes(everything_in(policy))
    trained = unique_bytes(policy.parameters())
    with MemoryLedger() as ledger:
        ledger.own("policy", policy)
        ledger.own("reference", reference)
        ledger.own("optimizer", optimizer)
        assert ledger.now() == owned(policy=weights, reference=weights)
        for _ in range(2):
            loss = loss_of(policy, reference, ids)
            alive_before_backward = ledger.now()
            loss.backward()
            del loss
            assert ledger.now()["gradients"] == trained
            optimizer.step()
            optimizer.zero_grad()
    state = 2 * trained + 4 * len(list(policy.parameters()))
    assert ledger.now() == owned(policy=weights, reference=weights, optimizer=state)
    peak = ledger.peak()
    assert (peak["policy"], peak["reference"], peak["optimizer"]) == (weights, weights, state)
    assert 0 <= peak["gradients"] <= trained
    assert total(peak) > total(alive_before_backward)


def test_gradients_held_over_the_peak_are_in_it(training):
    policy, reference, _, ids = training
    with MemoryLedger() as ledger:
        ledger.own("policy", policy)
        for _ in range(2):  # accumulated: they are there during the second pass
            loss_of(policy, reference, ids).backward()
    policy.zero_grad()
    assert ledger.now()["gradients"] == 0
    assert ledger.peak()["gradients"] == unique_bytes(policy.parameters())


def profiled_peak(profile, folder) -> int:
    """The most bytes beyond those at the start, from the allocator's own events."""
    file = folder / "trace.json"
    profile.export_chrome_trace(str(file))
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def test_the_peak_is_what_the_profiler_sees(training, tmp_path):
    policy, reference, optimizer, ids = training

    def first_step():
        loss_of(policy, reference, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.state.clear()

    first_step()  # lets the libraries below make their workspaces
    activities = [torch.profiler.ProfilerActivity.CPU]
    # One after the other: a dispatch mode may change what the backward pass does in place.
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        first_step()
    with MemoryLedger() as ledger:
        first_step()
    assert total(ledger.peak()) == pytest.approx(profiled_peak(profile, tmp_path), rel=0.01)


def step_on(device: str) -> list[dict[str, int]]:
    readings = []
    with MemoryLedger(meta=device == "meta") as ledger, torch.device(device):
        layers = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 50))
        policy = ledger.own("policy", layers)
        reference = ledger.own("reference", copy.deepcopy(policy).requires_grad_(False))
        optimizer = ledger.own("optimizer", torch.optim.AdamW(policy.parameters()))
        ids = torch.zeros(4, 8, dtype=torch.long)
        loss = (policy(ids).log_softmax(-1) - reference(ids).log_softmax(-1)).square().mean()
        readings.append(ledger.now())
        loss.backward()
        readings.append(ledger.now())
        optimizer.step()
        readings.append(ledger.now())
        optimizer.zero_grad()
        return [*readings, ledger.now(), ledger.peak()]


def test_meta_tensors_are_counted_like_real_ones():
    real = step_on("cpu")
    assert step_on("meta") == real
    assert all(real[2].values())


def test_meta_tensors_have_no_memory_unless_they_are_to_count():
    with MemoryLedger() as ledger:
        on_meta = torch.zeros(1000, device="meta") + 1
        assert sum(ledger.now().values()) == 0
        with pytest.raises(ValueError, match=r"'policy' is on the meta device.*meta=True"):
            ledger.own("policy", on_meta)


def test_a_reference_stands_for_what_it_holds():
    policy = nn.Linear(8, 8)
    reference = CloneReference(policy)
    with MemoryLedger() as ledger:
        ledger.own("policy", policy)
        assert ledger.own("reference", reference) is reference
        assert ledger.now()["reference"] == reference.owned_bytes() == 4 * (64 + 8)


# What training does besides


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_shows_as_a_lower_peak(reentrant):
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4)]

    def peak_of(run) -> int:
        with MemoryLedger() as ledger:
            hidden = torch.ones(1024, 64, requires_grad=True)
            for layer in layers:
                hidden = run(layer, hidden)
            hidden.sum().backward()
            nn.ModuleList(layers).zero_grad()
            return total(ledger.peak())

    plain = peak_of(lambda layer, hidden: layer(hidden))
    assert peak_of(lambda layer, hidden: checkpoint(layer, hidden, use_reentrant=reentrant)) < plain


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_stays(mode, training):
    policy, _, _, ids = training
    with MemoryLedger() as ledger, mode():
        logits = policy(ids).logits
        assert ledger.now() == owned(activations=logits.untyped_storage().nbytes())


def test_function_transforms_and_sparse_gradients_pass():
    table = nn.Embedding(8, 4, sparse=True)
    with MemoryLedger() as ledger:
        ledger.own("policy", table)
        slope = torch.func.vmap(torch.func.grad(lambda x: x**3))(torch.tensor([1.0, 2.0]))
        table(torch.tensor([1])).sum().backward()
        ledger.own("policy", table)
    assert slope.tolist() == [3.0, 12.0]
    assert table.weight.grad.is_sparse
    assert ledger.now()["policy"] == 128


def test_compiled_functions_pass_and_their_result_is_counted():
    compiled = torch.compile(lambda x: (x * 2).sin(), backend="aot_eager")
    with warnings.catch_warnings(action="error"), MemoryLedger() as ledger:
        result = compiled(torch.ones(KIB))
        assert torch.equal(result, torch.full((KIB,), 2.0).sin())
        assert ledger.now() == owned(activations=1024)


def test_the_ledger_changes_no_number(training):
    policy, reference, _, ids = training
    plain = loss_of(policy, reference, ids)
    plain.backward()
    gradients = [weight.grad.clone() for weight in policy.parameters()]
    policy.zero_grad()
    with MemoryLedger() as ledger:
        ledger.own("policy", policy)
        counted = loss_of(policy, reference, ids)
        counted.backward()
    assert torch.equal(counted, plain)
    assert all(map(torch.equal, gradients, (weight.grad for weight in policy.parameters())))


def test_frozen_weights_may_be_owned_and_owned_again_once_they_train():
    layer = nn.Linear(10, 10).requires_grad_(False)
    with MemoryLedger() as ledger:
        ledger.own("policy", layer)
        layer.requires_grad_(True)
        ledger.own("policy", layer)
        layer(torch.ones(1, 10)).sum().backward()
        assert ledger.now() == owned(policy=440, gradients=440)


def test_gradients_and_state_that_are_there_already_are_owned_with_their_parameters():
    layer = nn.Linear(10, 10)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    with MemoryLedger() as ledger:
        ledger.own("policy", layer)
        ledger.own("optimizer", optimizer)
    assert ledger.now() == owned(policy=440, gradients=440, optimizer=888)


# The block


def test_after_the_block_it_sees_what_is_freed_and_nothing_new():
    with MemoryLedger() as ledger:
        inside = torch.ones(KIB)
    outside = torch.ones(KIB)
    assert ledger.now() == owned(activations=1024)
    del inside
    assert ledger.now() == owned()
    assert ledger.peak() == owned(activations=1024)
    assert outside.numel() == KIB


def test_an_exception_ends_the_block_as_its_end_does():
    layer = nn.Linear(10, 10)
    ledger = MemoryLedger()

    def fail():
        with ledger:
            ledger.own("policy", layer)
            raise InterruptedError(torch.ones(KIB).numel())

    with pytest.raises(InterruptedError, match="256"):
        fail()
    assert ledger.peak() == owned(policy=440, activations=1024)
    torch.ones(KIB)
    layer(torch.ones(1, 10)).sum().backward()
    assert ledger.now()["gradients"] == 0
    assert not layer.weight._post_accumulate_grad_hooks


def test_an_operation_that_fails_leaves_nothing():
    with MemoryLedger() as ledger:
        with pytest.raises(RuntimeError, match="size of tensor"):
            torch.ones(2) + torch.ones(3)
        assert ledger.now() == owned()


def test_two_ledgers_at_once_are_both_right():
    with MemoryLedger() as outer:
        first = torch.ones(KIB)
        with MemoryLedger() as inner:
            second = outer.own("policy", inner.own("reference", torch.ones(KIB)))
            assert inner.now() == owned(reference=1024)
        third = torch.ones(KIB)
        assert outer.now() == owned(policy=1024, activations=2048)
        del first, second, third
        assert outer.now() == inner.now() == owned()


def test_a_ledger_goes_on_when_it_is_entered_again():
    ledger = MemoryLedger()
    layer = ledger.own("policy", nn.Linear(10, 10))
    optimizer = ledger.own("optimizer", torch.optim.SGD(layer.parameters(), momentum=0.9))
    for _ in range(2):
        with ledger:
            layer(torch.ones(1, 10)).sum().backward()
            optimizer.step()
            assert ledger.now() == owned(policy=440, gradients=440, optimizer=440)
            optimizer.zero_grad()
            optimizer.state.clear()
    with ledger, pytest.raises(RuntimeError, match="recording already"), ledger:
        pass


def test_the_ledger_does_not_grow_from_step_to_step(training):
    policy, reference, optimizer, ids = training
    records = []
    with MemoryLedger() as ledger:
        for thing in training:
            ledger.own("policy", thing)
        for _ in range(5):
            loss_of(policy, reference, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            ledger.now()
            records.append((len(ledger._live), len(ledger._freed_since_peak)))
    assert records[2] == records[3] == records[4]


def test_nothing_is_kept_alive_not_even_until_garbage_is_collected():
    gc.disable()
    try:
        with MemoryLedger() as ledger:
            layer = ledger.own("policy", nn.Linear(10, 10))
            optimizer = ledger.own("optimizer", torch.optim.AdamW(layer.parameters()))
            layer(torch.ones(1, 10)).sum().backward()
            optimizer.step()
            assert ledger.now() == owned(policy=440, gradients=440, optimizer=888)
            del layer, optimizer
            assert ledger.now() == owned()
    finally:
        gc.enable()


def test_a_ledger_that_is_let_go_leaves_no_trace():
    layer = nn.Linear(10, 10)
    with MemoryLedger() as ledger:
        ledger.own("policy", layer)
    gone = weakref.ref(ledger)
    del ledger
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("name", "thing", "message"),
    [
        (nn.Linear(1, 1), "policy", r"name of an owner is a Linear; write own\(\"policy\", model\)"),
        ("policy", 3, "'policy' cannot own a int: give a module"),
        ("policy", "weights", "'policy' cannot own a str: give a module"),
    ],
)
def test_what_cannot_be_owned_is_refused(name, thing, message):
    with pytest.raises(TypeError, match=message):
        MemoryLedger().own(name, thing)


# Seen from another thread, and over hours


def test_other_threads_may_read_while_training_goes_on(training):
    policy, reference, optimizer, ids = training
    readings, stop = [], threading.Event()

    def read(ledger):
        while not stop.wait(0.002):
            readings.append((ledger.now(), ledger.peak(), ledger.timeline[-1][1]))

    with MemoryLedger() as ledger, ThreadPoolExecutor() as pool:
        ledger.own("policy", policy)
        ledger.own("optimizer", optimizer)
        reader = pool.submit(read, ledger)
        try:
            for _ in range(5):
                loss_of(policy, reference, ids).backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            stop.set()
        reader.result()  # raises what the reader raised
    assert len(readings) > 5
    assert all(min(owners.values()) >= 0 for reading in readings for owners in reading)
    totals = [total(peak) for _, peak, _ in readings]
    assert totals == sorted(totals)
    trained = unique_bytes(policy.parameters())
    state = 2 * trained + 4 * len(list(policy.parameters()))
    assert ledger.now() == owned(policy=unique_bytes(everything_in(policy)), optimizer=state)


def test_storages_freed_in_another_thread_are_gone():
    with MemoryLedger() as ledger:
        held = [torch.ones(KIB) for _ in range(8)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert ledger.now() == owned()


def test_the_timeline_tells_the_story_in_order_and_ends_now():
    with MemoryLedger() as ledger:
        for _ in range(3):
            scratch = torch.ones(KIB)
            del scratch
        kept = ledger.own("policy", torch.ones(KIB))
    seconds = [point[0] for point in ledger.timeline]
    assert seconds == sorted(seconds)
    assert ledger.timeline[-1][1] == ledger.now() == owned(policy=kept.untyped_storage().nbytes())


def test_the_timeline_learns_who_owns_what_was_made_before():
    with MemoryLedger() as ledger:
        first = torch.zeros(100)
        time.sleep(0.01)
        weights = [torch.zeros(1000) for _ in range(3)]
        time.sleep(0.01)
        ledger.own("reference", weights)
        before, *_, after = ledger.timeline
    assert before[1] == owned(activations=400)
    assert after[1] == owned(activations=400, reference=12_000)
    known = [point["reference"] for _, point in ledger.timeline]
    assert known == sorted(known), "it grew as it was made"
    assert all(point["activations"] == 400 for _, point in ledger.timeline)
    assert first.numel() == 100


def test_a_slice_of_the_timeline_shows_its_highest_moment(monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 7.0)
    with MemoryLedger() as ledger:
        for kib in (1, 3, 2):
            scratch = torch.ones(kib * KIB)
            del scratch
    (_, highest), (_, now) = ledger.timeline
    assert (highest, now) == (owned(activations=3072), owned())


def test_a_timeline_of_hours_is_short_and_has_kept_the_peak(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    with MemoryLedger() as ledger:
        for step in range(5000):
            scratch = torch.ones(KIB if step != 3333 else 2 * KIB)
            del scratch
    points = ledger.timeline
    assert 400 < len(points) <= ledger._timeline.LIMIT + 1
    assert points[0][0] < 20
    assert points[-1][0] > 4990
    assert max(total(owners) for _, owners in points) == total(ledger.peak()) == 2048


def test_a_peak_can_be_forgotten():
    with MemoryLedger() as ledger:
        kept = ledger.own("policy", torch.zeros(KIB))
        torch.zeros(9 * KIB)
        assert ledger.peak() == owned(policy=1024, activations=9 * 1024)
        ledger.reset_peak()
        assert ledger.peak() == ledger.now() == owned(policy=1024)
        torch.zeros(2 * KIB)
        assert ledger.peak() == owned(policy=1024, activations=2 * 1024)
    assert kept.numel() == KIB
