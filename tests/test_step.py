"""The training step's loss: from whole logits, from hidden states, and without a reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refkl_lib import (
    PrecomputedReference,
    add_lora,
    create_reference,
    kl_loss,
    load_model,
    load_tokenizer,
    policy_loss,
    token_log_probs,
)
from refkl_lib.step import TimedReference, next_token_loss


def models(lora_rank: int | None) -> tuple[nn.Module, Any]:
    """A policy that has moved away from its reference."""
    model = load_model("pocket")
    reference = create_reference(model, "clone")
    torch.manual_seed(0)
    policy = model if lora_rank is None else add_lora(model, lora_rank)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.02)
    return policy, reference


def padded_batch() -> dict[str, Tensor]:
    ids = torch.randint(259, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_hidden_states_give_the_loss_and_gradients_of_whole_logits(lora_rank):
    found = {}
    for kl in ("full", "linear"):
        policy, reference = models(lora_rank)
        loss, value = policy_loss(policy, reference, padded_batch(), 0.3, kl=kl)
        loss.backward()
        found[kl] = (loss, value, [w.grad for w in policy.parameters() if w.requires_grad])
    for full, linear in zip(found["full"][:2], found["linear"][:2], strict=True):
        torch.testing.assert_close(linear, full, rtol=1e-5, atol=1e-6)
    for full, linear in zip(found["full"][2], found["linear"][2], strict=True):
        torch.testing.assert_close(linear, full, rtol=1e-3, atol=1e-5 * float(full.abs().max()))
    assert found["full"][1] > 0.01


@pytest.mark.parametrize("kl", ["full", "linear"])
def test_beta_zero_is_the_loss_without_a_reference(kl):
    policy, reference = models(None)
    loss, _ = policy_loss(policy, reference, padded_batch(), 0.0, kl=kl)
    torch.testing.assert_close(next_token_loss(policy, padded_batch(), kl=kl), loss)


def test_a_choice_that_there_is_not_is_named():
    policy, reference = models(None)
    with pytest.raises(ValueError, match="kl is 'half', but must be \"full\""):
        policy_loss(policy, reference, padded_batch(), 0.1, kl="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kl is 'half'"):
        next_token_loss(policy, padded_batch(), kl="half")  # type: ignore[arg-type]


def test_a_head_with_an_adapter_is_refused_from_hidden_states():
    policy = add_lora(load_model("pocket"), 4, targets=["lm_head", "q_proj"], ensure_weight_tying=True)
    reference = create_reference(policy, "adapter")
    with pytest.raises(ValueError, match=r'use kl="full".*not a plain linear layer'):
        policy_loss(policy, reference, padded_batch(), 0.1, kl="linear")
    with pytest.raises(ValueError, match=r'use kl="full".*not a plain linear layer'):
        next_token_loss(policy, padded_batch(), kl="linear")
    assert policy_loss(policy, reference, padded_batch(), 0.1, kl="full")[0].isfinite()


@pytest.mark.parametrize("kl", ["full", "linear"])
def test_nothing_to_predict_is_an_error_and_not_nan(kl):
    policy, reference = models(None)
    one_token = {name: tensor[:, :1] for name, tensor in padded_batch().items()}
    masked = padded_batch() | {"attention_mask": torch.zeros_like(padded_batch()["attention_mask"])}
    for batch in (one_token, masked):
        with pytest.raises(ValueError, match="no token after the first counts"):
            policy_loss(policy, reference, batch, 0.1, kl=kl)
        with pytest.raises(ValueError, match="no token after the first counts"):
            next_token_loss(policy, batch, kl=kl)


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_a_beta_that_is_none_is_an_error_and_not_nan(beta):
    policy, reference = models(None)
    with pytest.raises(ValueError, match=f"beta is {beta}, but must be 0"):
        policy_loss(policy, reference, padded_batch(), beta)


# A reference that knows log-probs alone


@pytest.fixture
def precomputed(tmp_path):
    """Log-probs of the model that `models` starts from."""
    options = {"tokenizer": load_tokenizer("pocket"), "progress": False}
    return PrecomputedReference.compute(load_model("pocket"), [padded_batch()], tmp_path, **options)


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("kl", ["full", "linear"])
def test_log_probs_alone_give_the_loss_with_an_estimate(precomputed, lora_rank, kl):
    policy, reference = models(lora_rank)
    batch = padded_batch()
    mask = batch["attention_mask"][:, 1:]
    log_probs = token_log_probs(policy(**batch).logits[:, :-1], batch["input_ids"][:, 1:])
    estimate = kl_loss(log_probs, reference.log_probs(**batch), "k2", mask)
    expected = next_token_loss(policy, batch) + 0.3 * estimate
    loss, value = policy_loss(policy, precomputed, batch, 0.3, kl=kl)
    torch.testing.assert_close(value, estimate, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    assert value > 0.01


def test_what_an_adversary_could_count_in_the_padding_does_not(precomputed):
    policy, _ = models(None)
    batch = padded_batch()
    batch["input_ids"] = batch["input_ids"].roll(9, dims=1)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    batch["input_ids"][0] = padded_batch()["input_ids"][0]
    loss, value = policy_loss(policy, precomputed, batch, 0.3)
    assert torch.isfinite(loss)
    torch.testing.assert_close(value, policy_loss(policy, precomputed, padded_batch(), 0.3)[1], rtol=1e-3, atol=1e-5)


def test_each_look_up_is_timed(precomputed):
    policy, _ = models(None)
    timed = TimedReference(precomputed)
    assert torch.equal(
        policy_loss(policy, timed, padded_batch(), 0.1)[1], policy_loss(policy, precomputed, padded_batch(), 0.1)[1]
    )
    assert len(timed.seconds) == 1
