"""The swap: another model's weights in the policy's place, and the policy's back, bit for bit, whatever happens."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import train

from refkl_lib import (
    CloneReference,
    SwapReference,
    add_lora,
    compute_kl_divergence,
    create_reference,
    load_model,
    policy_loss,
    sample_batch,
)
from refkl_lib.reference.base import fingerprint_of
from refkl_lib.tensors import storage_bytes, storages_of


@pytest.fixture
def batch():
    return sample_batch("pocket", batch=2, seq=32)


@pytest.fixture
def policy():
    return load_model("pocket")


def fingerprint(model):
    return fingerprint_of([*model.named_parameters(), *model.named_buffers()])


def moved(policy, batch):
    """A policy that has trained, and the reference that it had before."""
    reference = SwapReference(policy)
    train(policy, reference, batch, steps=2)
    return reference


def test_it_is_a_clone_that_waits_elsewhere(policy, batch):
    clone = CloneReference(policy)
    reference = moved(policy, batch)
    assert torch.equal(reference.logits(**batch), clone.logits(**batch))
    assert dict(reference.named_weights()).keys() == dict(clone.named_weights()).keys()
    assert compute_kl_divergence(policy, clone, batch) > 0.01


def test_the_policy_trains_as_beside_a_clone(batch):
    kls, ends = [], []
    for strategy in ("clone", "swap"):
        policy = load_model("pocket")
        kls.append(train(policy, create_reference(policy, strategy), batch, steps=4))
        ends.append(fingerprint(policy))
    assert kls[0] == kls[1]
    assert kls[0][-1] > 0.01
    assert ends[0] == ends[1], "every bit"


def test_storages_ties_and_versions_stay(policy, batch):
    reference = moved(policy, batch)
    before = storages_of(policy).keys()
    versions = [weight._version for weight in policy.parameters()]
    with reference.as_reference() as model:
        assert model is policy
        assert storages_of(model).keys() == before
    assert storages_of(policy).keys() == before
    assert [weight._version for weight in policy.parameters()] == versions
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert reference.owned_bytes() == storage_bytes(policy), "what is tied waits once"


def test_a_pass_between_a_forward_and_its_backward_changes_no_gradient(policy, batch):
    reference = moved(policy, batch)

    def gradients(between):
        policy.zero_grad()
        loss = policy(**batch, labels=batch["input_ids"]).loss
        between()
        loss.backward()
        return [weight.grad.clone() for weight in policy.parameters()]

    plain, swapped = gradients(lambda: None), gradients(lambda: reference.logits(**batch))
    assert all(torch.equal(one, other) for one, other in zip(plain, swapped, strict=True))


def test_a_pass_inside_a_pass_is_a_pass(policy, batch):
    reference = moved(policy, batch)
    expected, before = reference.logits(**batch), fingerprint(policy)
    with torch.no_grad(), reference.as_reference() as model:
        assert torch.equal(reference.logits(**batch), expected)
        assert torch.equal(model(**batch).logits, expected)
    assert fingerprint(policy) == before


class Stack(nn.Module):
    """Weights of every kind: tied, a view of another's storage, half precision, a counter, NaN and minus zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.row = nn.Parameter(self.first.weight.data[1])
        self.narrow = nn.Parameter(torch.tensor([float("nan"), -0.0, 1.5], dtype=torch.bfloat16))
        self.register_buffer("counter", torch.tensor(7))

    def forward(self, x):
        return x


def test_every_kind_of_weight_is_exchanged():
    policy = Stack()
    reference = SwapReference(policy)
    start = fingerprint(policy)
    assert reference.fingerprint() == start
    with torch.no_grad():
        policy.first.weight.add_(1)
        policy.narrow.mul_(2)
        policy.counter.add_(1)
    moved_on = fingerprint(policy)
    with reference.as_reference():
        assert fingerprint(policy) == start
        assert torch.equal(policy.row, policy.first.weight[1])
    assert fingerprint(policy) == moved_on != start
    assert reference.owned_bytes() == storage_bytes(policy)


# Exceptions


class Interrupted(BaseException):
    """What Ctrl-C raises is no Exception either."""


class InterruptCopy(TorchDispatchMode):
    """Raise at the n-th copy, before it or after it; count them."""

    def __init__(self, at: int, after: bool) -> None:
        super().__init__()
        self.at, self.after, self.copies = at, after, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        now = func is torch.ops.aten.copy_.default and self.copies == self.at
        self.copies += func is torch.ops.aten.copy_.default
        if now and not self.after:
            raise Interrupted
        result = func(*args, **kwargs or {})
        if now:
            raise Interrupted
        return result


@pytest.mark.parametrize("after", [False, True])
def test_an_interruption_at_any_copy_leaves_policy_and_reference_whole(after):
    policy = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    reference = SwapReference(policy)
    waiting = reference.fingerprint()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(1)
    before = fingerprint(policy)
    interruptions = 0
    while True:
        copies = InterruptCopy(interruptions, after)
        try:
            with copies, reference.as_reference():
                assert fingerprint(policy) == waiting
        except Interrupted:
            interruptions += 1
        assert fingerprint(policy) == before
        assert reference.fingerprint() == waiting
        if copies.copies <= copies.at:
            break
    assert interruptions == 3 * len(list(policy.parameters())), "saved, put in, put back"


def test_an_exception_in_the_pass_brings_the_policy_back(policy, batch):
    reference = moved(policy, batch)
    before = fingerprint(policy)
    seen = []
    hook = policy.lm_head.register_forward_pre_hook(lambda *_: seen.append(fingerprint(policy)))
    with pytest.raises(IndexError):
        reference.logits(input_ids=torch.tensor([[10**6]]))
    policy.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reference.logits(**batch)
    hook.remove()
    assert seen == [reference.fingerprint()]
    assert fingerprint(policy) == before


# What is refused


def test_a_policy_with_an_adapter_is_refused(policy):
    wrapped = add_lora(policy, rank=4)
    for model in (wrapped, policy):  # the model was wrapped in place
        with pytest.raises(ValueError, match=r"has an adapter.*create_reference\(policy, \"adapter\"\)"):
            create_reference(model, "swap")


def test_an_adapter_that_came_later_is_noticed(policy, batch):
    reference = SwapReference(policy)
    add_lora(policy, rank=4)
    for use in (lambda: reference.logits(**batch), reference.fingerprint):
        with pytest.raises(ValueError, match=r"storages with .* when this reference was made"):
            use()


def test_a_partitioned_policy_is_refused(policy):
    policy.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"ZeRO-3.*create_reference\(policy, \"zero3\""):
        create_reference(policy, "swap")


def test_hidden_states_go_through_the_head_of_their_own_time(policy, batch):
    clone = CloneReference(policy)
    reference = moved(policy, batch)
    kl = compute_kl_divergence(policy, reference, batch)
    assert torch.equal(kl, compute_kl_divergence(policy, clone, batch))
    assert kl > 0.01
    for mode in ("full", "linear"):
        ours, theirs = (policy_loss(policy, kept, batch, 0.1, kl=mode) for kept in (reference, clone))
        assert torch.equal(torch.stack(ours), torch.stack(theirs))
