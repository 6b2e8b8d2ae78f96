"""verify_reference: silent for a reference, and a sentence for each way not to be one."""

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
    verify_reference,
)


@pytest.fixture
def batch():
    return sample_batch("pocket", batch=2, seq=32)


@pytest.fixture
def policy():
    return load_model("pocket")


def only_finding(policy, reference, batch, **options):
    report = verify_reference(policy, reference, batch, **options)
    assert not report.ok
    assert len(report.findings) == 1, report.findings
    with pytest.raises(ValueError, match="not a frozen reference"):
        report.raise_for_findings()
    assert report.findings[0] in str(report)
    return report.findings[0]


def test_a_batch_that_shows_nothing_is_refused(policy, batch):
    reference = create_reference(policy, "clone")
    masked = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    for nothing in (sample_batch("pocket", batch=2, seq=1), masked):
        with pytest.raises(ValueError, match="nothing to compare"):
            verify_reference(policy, reference, nothing)


@pytest.mark.parametrize("strategy", ["clone", "adapter", "swap"])
def test_a_reference_passes_before_and_after_training(policy, batch, strategy):
    if strategy == "adapter":
        policy = add_lora(policy, rank=4)
    reference = create_reference(policy, strategy)
    before = verify_reference(policy, reference, batch)
    before.raise_for_findings()
    assert (before.kl, before.max_log_prob_difference) == (0.0, 0.0)
    train(policy, reference, batch)
    after = verify_reference(policy, reference, batch, since=before)
    after.raise_for_findings()
    assert after.kl > 0
    assert after.fingerprint == before.fingerprint
    assert f"{strategy}: a reference" in str(after)
    assert before.unchecked == after.unchecked == ()


@pytest.fixture
def precomputed(policy, batch, tmp_path):
    return PrecomputedReference.compute(policy, [batch], tmp_path, tokenizer=load_tokenizer("pocket"), progress=False)


def test_log_probs_pass_by_log_probs_and_what_they_cannot_tell_is_said(policy, batch, precomputed):
    before = verify_reference(policy, precomputed, batch)
    before.raise_for_findings()
    assert (before.kl, before.max_log_prob_difference) == (None, 0.0)
    train(policy, precomputed, batch)
    after = verify_reference(policy, precomputed, batch, since=before)
    after.raise_for_findings()
    assert after.max_log_prob_difference > 0.01
    assert len(after.unchecked) == 2
    assert "not checked: the KL" in str(after)
    assert "not checked: the weights" in str(after)
    assert "largest |Δ log-prob|" in str(after)


def test_log_probs_of_another_model_are_found(policy, batch, precomputed):
    with torch.no_grad():
        policy.model.norm.weight.mul_(1.5)
    assert "not the model that training starts from" in only_finding(policy, precomputed, batch)
    other = verify_reference(policy, CloneReference(policy), batch)
    assert "changed since" in only_finding(policy, precomputed, batch, since=other)


def test_log_probs_of_padded_batches(policy, batch, tmp_path):
    batch["attention_mask"][0, :5] = 0
    batch["attention_mask"][1, -5:] = 0
    reference = PrecomputedReference.compute(
        policy, [batch], tmp_path, tokenizer=load_tokenizer("pocket"), progress=False
    )
    assert verify_reference(policy, reference, batch).ok


def test_a_swap_without_its_way_back(policy, batch):
    class Careless(SwapReference):
        def logits(self, **inputs):
            for place, weights in zip(self._places(), self.waiting, strict=True):
                place.copy_(weights)
            with torch.no_grad():
                return self.policy(**inputs, use_cache=False).logits

    reference = Careless(policy)
    before = verify_reference(policy, reference, batch)
    train(policy, CloneReference(policy), batch, steps=2)
    assert only_finding(policy, reference, batch, since=before) == "a pass changes the policy's weights"


def test_a_model_that_training_did_not_start_from(policy, batch):
    reference = create_reference(policy, "clone")
    train(policy, reference, batch)
    assert "not the model that training starts from" in only_finding(policy, reference, batch)


def test_a_reference_that_has_changed(policy, batch):
    reference = create_reference(policy, "clone")
    before = verify_reference(policy, reference, batch)
    reference.model.lm_head.weight[0, 0] += 1e-6
    assert "changed since" in only_finding(policy, reference, batch, since=before)


def test_a_reference_that_trains(policy, batch):
    reference = create_reference(policy, "clone")
    reference.model.model.norm.weight.requires_grad_(True)
    assert "'model.norm.weight' requires grad" in only_finding(policy, reference, batch)


def test_a_reference_that_shares_storage_with_a_weight_that_trains(policy, batch):
    reference = create_reference(policy, "clone")
    reference.model.model.norm.weight.data = policy.model.norm.weight.data
    assert "'model.norm.weight' shares storage" in only_finding(policy, reference, batch)


def test_embeddings_unfrozen_after_the_adapter_reference_was_made(policy, batch):
    policy = add_lora(policy, rank=4)
    reference = create_reference(policy, "adapter")
    policy.get_input_embeddings().weight.requires_grad_(True)
    findings = verify_reference(policy, reference, batch).findings
    assert len(findings) == 2
    assert "requires grad" in findings[0]
    assert "shares storage" in findings[1]


def test_dropout_left_on(policy, batch):
    class Careless(CloneReference):
        def logits(self, **inputs):
            return torch.nn.functional.dropout(super().logits(**inputs), 0.1)

    findings = verify_reference(policy, Careless(policy), batch).findings
    assert any("dropout" in finding for finding in findings)


def test_a_pass_that_carries_a_gradient_and_disturbs_the_policy(policy, batch):
    class Careless(CloneReference):
        def logits(self, **inputs):
            self.policy.train(not self.policy.training)
            return self.model(**inputs, use_cache=False).logits.requires_grad_()

    findings = verify_reference(policy, Careless(policy), batch).findings
    assert "its logits carry a gradient" in findings
    # Called three times, an odd number: the policy's mode is not what it was.
    assert not any("dropout" in finding for finding in findings)


def test_reloading_by_path_loses_resized_embeddings(policy, batch):
    policy.resize_token_embeddings(300, mean_resizing=False)
    reloaded = CloneReference(load_model("pocket"))
    report = verify_reference(policy, reloaded, batch)
    assert report.kl is None
    assert "vocabularies differ: 300 tokens in the policy" in report.findings[0]


def test_reloading_by_path_loses_a_change_in_memory(policy, batch):
    policy.model.norm.weight.data *= 1.5
    reloaded = CloneReference(load_model("pocket"))
    assert "not the model that training starts from" in only_finding(policy, reloaded, batch)


class PlainSwitch(AdapterReference):
    """The adapter switched off as PEFT does it."""

    def logits(self, **inputs):
        with torch.no_grad(), self.policy.disable_adapter():
            return self.policy(**inputs, use_cache=False).logits


def test_a_pass_that_thaws_what_was_frozen_on_purpose_is_found(policy, batch):
    policy = add_lora(policy, rank=4).eval()
    policy.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.requires_grad_(False)
    assert "changes the policy's training modes or requires_grad" in only_finding(policy, PlainSwitch(policy), batch)
