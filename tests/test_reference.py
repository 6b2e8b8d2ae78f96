"""What holds for a reference however it is kept, in one process."""

import pytest
import torch
from training import train

from refkl_lib import (
    AdapterReference,
    CloneReference,
    PrecomputedReference,
    SwapReference,
    add_lora,
    create_reference,
    load_model,
    load_tokenizer,
    sample_batch,
    storage_bytes,
)

STRATEGIES = ("clone", "adapter", "swap", "precomputed")


@pytest.fixture
def batch():
    return sample_batch("pocket", batch=2, seq=32)


@pytest.fixture
def kept(batch, tmp_path):
    """Make a policy of the pocket model, and a reference kept by a strategy."""

    def make(strategy):
        policy = load_model("pocket")
        if strategy == "adapter":
            policy = add_lora(policy, rank=4)
        options = {"batches": [batch], "folder": tmp_path / "log-probs", "tokenizer": load_tokenizer("pocket")}
        if strategy == "precomputed":
            return policy, create_reference(policy, strategy, progress=False, **options)
        return policy, create_reference(policy, strategy)

    return make


def answer(reference, batch):
    return reference.logits(**batch) if reference.has_logits else reference.log_probs(**batch)


def test_each_strategy_has_its_class(kept):
    classes = [CloneReference, AdapterReference, SwapReference, PrecomputedReference]
    references = [kept(strategy)[1] for strategy in STRATEGIES]
    assert [type(reference) for reference in references] == classes
    assert [reference.strategy for reference in references] == list(STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_says_what_the_model_said_before_training(kept, batch, strategy):
    expected = CloneReference(load_model("pocket"))
    policy, reference = kept(strategy)
    log_probs = expected.log_probs(**batch)
    assert torch.equal(reference.log_probs(**batch), log_probs)
    assert train(policy, reference, batch, steps=3)[0] == 0.0
    assert torch.equal(reference.log_probs(**batch), log_probs)
    assert not torch.equal(CloneReference(policy).log_probs(**batch), log_probs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_model_has_one_fingerprint(kept, batch, strategy):
    policy, reference = kept(strategy)
    before = CloneReference(load_model("pocket")).fingerprint()
    assert reference.fingerprint() == before
    train(policy, reference, batch)
    assert reference.fingerprint() == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pass_leaves_the_policy_as_it_was(kept, batch, strategy):
    policy, reference = kept(strategy)
    policy.train()
    next(module for module in policy.modules() if not list(module.children())).eval()  # on purpose
    next(policy.parameters()).requires_grad_(False)

    def state():
        weights = [weight.detach().clone() for weight in policy.parameters()]
        return weights, [m.training for m in policy.modules()], [w.requires_grad for w in policy.parameters()]

    weights, modes, flags = state()
    assert not answer(reference, batch).requires_grad
    with pytest.raises((IndexError, ValueError)):
        reference.log_probs(torch.tensor([[10**6, 1]]))
    after, *rest = state()
    assert rest == [modes, flags]
    assert all(torch.equal(one, other) for one, other in zip(weights, after, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_is_off(kept, batch, strategy):
    policy, reference = kept(strategy)
    expected = answer(reference, batch)
    for module in policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    policy.train()
    assert not torch.equal(policy(**batch).logits, policy(**batch).logits), "dropout is on in the policy"
    assert torch.equal(answer(reference, batch), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_it_owns(kept, strategy):
    _, reference = kept(strategy)
    whole = storage_bytes(load_model("pocket"))
    assert reference.owned_bytes() == (whole if strategy in ("clone", "swap") else 0)


@pytest.mark.parametrize("strategy", ["clone", "swap"])
def test_it_follows_the_policy(kept, batch, strategy):
    policy, reference = kept(strategy)
    before = {name: weight.clone() for name, weight in reference.named_weights()}
    train(policy, reference, batch, steps=2)
    reference.sync(policy, alpha=0.25)
    named = dict(policy.named_parameters()) | dict(policy.named_buffers())
    for name, weight in reference.named_weights():
        torch.testing.assert_close(weight, 0.75 * before[name] + 0.25 * named[name].detach(), rtol=1e-6, atol=1e-7)
    reference.sync(policy)
    assert reference.fingerprint() == CloneReference(policy).fingerprint()


@pytest.mark.parametrize("strategy", ["adapter", "precomputed"])
def test_it_cannot_follow_and_says_so(kept, strategy):
    policy, reference = kept(strategy)
    with pytest.raises(ValueError, match="clone"):
        reference.sync(policy)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        reference.sync(policy, alpha=1.5)
