"""The clone: independent, frozen, and shared only where asked."""

import pytest
import torch
from torch import nn
from training import train
from transformers import Trainer, TrainingArguments

from refkl_lib import (
    CloneReference,
    SyncRefModelCallback,
    create_reference,
    create_reference_model,
    load_model,
    sample_batch,
)
from refkl_lib.tensors import storage_bytes, storages_of


@pytest.fixture
def policy():
    return load_model("pocket")


@pytest.fixture
def batch():
    return sample_batch("pocket", batch=2, seq=32)


def test_copy_is_frozen_in_evaluation_mode_and_shares_no_storage(policy):
    policy.train()
    reference = create_reference_model(policy)
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert not any(module.training for module in reference.modules())
    assert not storages_of(reference).keys() & storages_of(policy).keys()
    assert policy.training
    assert all(weight.requires_grad for weight in policy.parameters())


def test_tied_embeddings_stay_tied_in_the_copy_and_count_once(policy):
    reference = CloneReference(policy)
    head, embeddings = reference.model.get_output_embeddings(), reference.model.get_input_embeddings()
    assert head.weight is embeddings.weight
    assert reference.owned_bytes() == storage_bytes(policy)


def test_training_moves_the_policy_and_not_the_copy(policy, batch):
    reference = create_reference(policy, "clone")
    fingerprint, logits = reference.fingerprint(), reference.logits(**batch)
    assert train(policy, reference, batch) == [0.0]
    assert train(policy, reference, batch, steps=10)[-1] > 0.01
    assert reference.fingerprint() == fingerprint
    assert torch.equal(reference.logits(**batch), logits)


def test_fingerprint_sees_the_last_bit_of_any_weight_and_buffer(policy):
    reference = create_reference(policy, "clone")
    before = reference.fingerprint()
    for tensor in (*reference.model.parameters(), *reference.model.buffers()):
        bits = tensor.data.view(torch.int32).flatten()
        bits[-1] ^= 1
        assert reference.fingerprint() != before
        bits[-1] ^= 1
    assert reference.fingerprint() == before


def test_shared_layers_alias_storage_and_are_frozen_in_the_policy(policy):
    reference = CloneReference(policy, num_shared_layers=2)
    shared = [policy.get_input_embeddings(), *policy.model.layers[:2]]
    assert reference.owned_bytes() == storage_bytes(policy) - storage_bytes(shared)
    frozen = {name for name, weight in policy.named_parameters() if not weight.requires_grad}
    expected = {id(weight) for module in shared for weight in module.parameters()}
    assert frozen == {name for name, weight in policy.named_parameters() if id(weight) in expected}
    # The head of this model is tied to its embeddings, so it is frozen with them.
    assert not policy.get_output_embeddings().weight.requires_grad


def test_shared_layers_do_not_move_the_reference_in_training(policy, batch):
    reference = create_reference(policy, "clone", num_shared_layers=2)
    fingerprint = reference.fingerprint()
    train(policy, reference, batch, steps=3)
    assert reference.fingerprint() == fingerprint
    assert train(policy, reference, batch)[0] > 0


@pytest.mark.parametrize("layers", [-1, 7, 100])
def test_a_wrong_number_of_shared_layers_is_named(policy, layers):
    with pytest.raises(ValueError, match=f"num_shared_layers is {layers}, but this model has 6 layers"):
        create_reference_model(policy, num_shared_layers=layers)


def test_a_partitioned_policy_is_refused(policy):
    # What DeepSpeed puts on every parameter of a ZeRO-3 model; the real thing is in the tests of ranks.
    policy.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"ZeRO-3.*copy of nothing.*zero3"):
        create_reference(policy, "clone")


def test_no_gradient_even_when_an_input_requires_grad(policy, batch):
    reference = create_reference(policy, "clone")
    embedded = policy.get_input_embeddings()(batch["input_ids"])
    assert embedded.requires_grad
    assert not reference.logits(inputs_embeds=embedded).requires_grad


def test_dropout_is_off_in_the_reference_whatever_anyone_does(batch):
    policy = load_model("pocket")
    policy.config.attention_dropout = 0.5
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.train()
    reference = create_reference(policy, "clone")
    reference.model.train()
    assert torch.equal(reference.logits(**batch), reference.logits(**batch))
    assert reference.model.training, "a mode that was set by hand comes back after the pass"


def test_log_probs_are_those_of_the_next_token(policy, batch):
    reference = create_reference(policy, "clone")
    log_probs = reference.log_probs(**batch)
    everything = reference.logits(**batch).log_softmax(-1)
    assert log_probs.shape == (2, 31)
    row, position = 1, 7
    token = batch["input_ids"][row, position + 1]
    torch.testing.assert_close(log_probs[row, position], everything[row, position, token])


def test_unknown_strategy_names_the_choices(policy):
    with pytest.raises(ValueError, match=r"'cloen'.*clone.*adapter.*zero3"):
        create_reference(policy, "cloen")


# Sync


class Toy(nn.Module):
    """A model with a parameter, a running mean, and a counter."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.norm = nn.BatchNorm1d(1, affine=False)
        nn.init.constant_(self.layer.weight, weight)

    def forward(self, x, labels=None):
        logits = self.norm(self.layer(x))
        return {"loss": (logits - 1).square().mean(), "logits": logits}


def test_sync_mixes_parameters_and_buffers_by_hand_worked_numbers():
    policy = Toy(1.0)
    reference = create_reference(policy, "clone")
    policy.layer.weight.data.fill_(3.0)
    policy.norm.running_mean.fill_(10.0)
    policy.norm.num_batches_tracked.fill_(7)
    reference.sync(policy, alpha=0.25)
    assert reference.model.layer.weight.item() == 1.5  # 0.75·1 + 0.25·3
    assert reference.model.norm.running_mean.item() == 2.5  # 0.75·0 + 0.25·10
    assert reference.model.norm.num_batches_tracked.item() == 7  # a counter is copied
    assert policy.layer.weight.item() == 3.0
    reference.sync(policy)
    assert reference.model.layer.weight.item() == 3.0
    assert not reference.model.layer.weight.requires_grad


def test_sync_refuses_wrong_alpha_and_another_model(policy):
    reference = create_reference(Toy(1.0), "clone")
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        reference.sync(Toy(2.0), alpha=1.5)
    with pytest.raises(ValueError, match="not the same model"):
        reference.sync(policy, alpha=0.5)
    with pytest.raises(ValueError, match="every is 0"):
        SyncRefModelCallback(reference, every=0)
    with pytest.raises(ValueError, match=r"alpha is -0\.1"):
        SyncRefModelCallback(reference, alpha=-0.1)


def test_callback_syncs_at_its_period_in_a_real_trainer(tmp_path):
    torch.manual_seed(0)
    policy = Toy(1.0)
    reference = create_reference(policy, "clone")
    seen: list[tuple[float, float, float]] = []

    class Watch(SyncRefModelCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            before = reference.model.layer.weight.item()
            super().on_step_end(args, state, control, model, **kwargs)
            seen.append((before, reference.model.layer.weight.item(), model.layer.weight.item()))

    data = [{"x": torch.randn(1), "labels": torch.zeros(1)} for _ in range(20)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = Watch(reference, alpha=0.25, every=2)
    Trainer(policy, arguments, train_dataset=data, callbacks=[callback]).train()
    assert len(seen) == 5
    for step, (before, after, policys) in enumerate(seen, start=1):
        expected = 0.75 * before + 0.25 * policys if step % 2 == 0 else before
        assert after == pytest.approx(expected, abs=1e-7)
    moved = [after != before for before, after, _ in seen]
    assert moved == [False, True, False, True, False]
    # Two syncs of a counter that Trainer's forward passes advanced: it is the policy's at step 4.
    assert reference.model.norm.num_batches_tracked.item() == 4
