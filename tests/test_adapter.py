"""The adapter switch: identical when it should be, refused when it would not be, invisible afterwards."""

import copy

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from training import train

from refkl_lib import (
    AdapterReference,
    CloneReference,
    add_lora,
    copy_adapter,
    create_reference,
    load_model,
    policy_loss,
    sample_batch,
)
from refkl_lib.reference.adapter import why_not_the_base


@pytest.fixture
def batch():
    return sample_batch("pocket", batch=2, seq=32)


@pytest.fixture
def base():
    return load_model("pocket")


@pytest.fixture
def policy(base):
    torch.manual_seed(0)
    return add_lora(base, rank=4)


def state(policy):
    return (
        policy.active_adapter,
        policy.active_adapters,
        policy._adapters_disabled,
        [getattr(module, "_disable_adapters", None) for module in policy.modules()],
        [list(getattr(module, "merged_adapters", ())) for module in policy.modules()],
        [module.training for module in policy.modules()],
        [weight.requires_grad for weight in policy.parameters()],
    )


def test_off_is_the_base_model_bit_for_bit_before_and_after_training(base, batch):
    clone = CloneReference(base)
    policy = add_lora(base, rank=4)
    reference = AdapterReference(policy)
    assert torch.equal(reference.logits(**batch), clone.logits(**batch))
    assert train(policy, reference, batch, steps=3)[-1] > 0.01
    assert torch.equal(reference.logits(**batch), clone.logits(**batch))
    assert not torch.equal(policy(**batch).logits, clone.logits(**batch))
    assert reference.owned_bytes() == 0


def test_clone_and_adapter_have_one_fingerprint(base):
    before = CloneReference(base).fingerprint()
    reference = AdapterReference(add_lora(base, rank=4, modules_to_save=["lm_head"]))
    assert reference.fingerprint() == before


def test_fingerprint_changes_with_the_base_and_not_with_the_adapter(policy, batch):
    reference = AdapterReference(policy)
    before = reference.fingerprint()
    train(policy, reference, batch, steps=3)
    assert reference.fingerprint() == before
    policy.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.data[0, 0] += 1
    assert reference.fingerprint() != before


# The state of the policy is the same after a pass


def unusual(policy):
    """Set everything that a pass could disturb to something unusual."""
    policy.train()
    policy.base_model.model.model.layers[1].eval()
    frozen = "layers.0.self_attn.q_proj.lora_A"
    for name, weight in policy.named_parameters():
        if frozen in name:
            weight.requires_grad_(False)  # an adapter parameter, frozen on purpose


def test_a_pass_leaves_no_trace(policy, batch):
    reference = AdapterReference(policy)
    unusual(policy)
    before = state(policy)
    reference.logits(**batch)
    assert state(policy) == before


def test_an_exception_inside_a_pass_leaves_no_trace(policy):
    reference = AdapterReference(policy)
    unusual(policy)
    before = state(policy)
    with pytest.raises(IndexError):
        reference.logits(input_ids=torch.tensor([[10**6]]))
    assert state(policy) == before


def test_a_pass_inside_disable_adapter_leaves_it_disabled(policy, batch):
    reference = AdapterReference(policy)
    with policy.disable_adapter():
        before = state(policy)
        reference.logits(**batch)
        assert state(policy) == before


def test_a_frozen_adapter_is_switched_to_and_back(policy, batch):
    train(policy, AdapterReference(policy), batch, steps=3)
    before_copy = policy(**batch).logits.detach()
    copy_adapter(policy, "ref")
    reference = AdapterReference(policy, adapter="ref")
    unusual(policy)
    before = state(policy)
    assert torch.equal(reference.logits(**batch), before_copy)
    assert state(policy) == before
    with pytest.raises(IndexError):
        reference.logits(input_ids=torch.tensor([[10**6]]))
    assert state(policy) == before
    policy.eval()
    assert train(policy, reference, batch, steps=3)[-1] > 0
    assert torch.equal(reference.logits(**batch), before_copy)


def test_two_active_adapters_are_both_active_again(policy, batch):
    copy_adapter(policy, "second")
    copy_adapter(policy, "ref")
    policy.base_model.set_adapter(["default", "second"])
    policy.set_requires_grad("ref", False)
    reference = AdapterReference(policy, adapter="ref")
    before = state(policy)
    reference.logits(**batch)
    assert state(policy) == before
    assert policy.active_adapters == ["default", "second"]


def test_a_frozen_adapter_owns_its_bytes_and_follows_by_replacement(policy, batch):
    copy_adapter(policy, "ref")
    reference = AdapterReference(policy, adapter="ref")
    adapter = [w for n, w in policy.named_parameters() if ".default." in n]
    assert reference.owned_bytes() == sum(4 * weight.numel() for weight in adapter)
    train(policy, reference, batch, steps=3)
    reference.sync(policy)
    policy.eval()
    assert torch.equal(reference.logits(**batch), policy(**batch).logits)
    with pytest.raises(ValueError, match=r"alpha is 0\.5.*only be replaced"):
        reference.sync(policy, alpha=0.5)


def test_a_copy_needs_an_adapter_and_a_name_of_its_own(policy, batch):
    with pytest.raises(TypeError, match=r"policy is a LlamaForCausalLM.*add_lora"):
        copy_adapter(load_model("pocket"))
    train(policy, AdapterReference(policy), batch, steps=1)
    before = state(policy)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        copy_adapter(policy, "default")
    assert state(policy) == before


def test_the_bare_base_cannot_follow_and_says_why(policy):
    with pytest.raises(ValueError, match=r"own base model.*copy_adapter"):
        AdapterReference(policy).sync(policy)


def test_prompt_tuning_has_nothing_to_switch(base):
    policy = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(TypeError, match=r"PROMPT_TUNING.*no layers"):
        AdapterReference(policy)


def test_a_copy_leaves_every_flag_as_it_was(policy):
    unusual(policy)
    before = {name: weight.requires_grad for name, weight in policy.named_parameters()}
    copy_adapter(policy, "ref")
    after = {name: weight.requires_grad for name, weight in policy.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(flag for name, flag in after.items() if ".ref." in name)


def test_what_has_no_adapter_is_refused(base, policy):
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.*no adapter.*add_lora"):
        create_reference(base, "adapter")
    with pytest.raises(ValueError, match=r"no adapter 'ref', only \['default'\]"):
        create_reference(add_lora(load_model("pocket")), "adapter", adapter="ref")


def test_a_second_adapter_is_refused(policy, base):
    for model in (policy, base):  # the model was wrapped in place
        with pytest.raises(ValueError, match="carries an adapter already"):
            add_lora(model)


# The ways to go wrong


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(base, init, batch):
    original = CloneReference(base)
    policy = add_lora(base, rank=4, init_lora_weights=init)
    with policy.disable_adapter(), torch.no_grad():
        off = policy(**batch).logits
    assert (off - original.logits(**batch)).abs().max() > 1e-3, "the pitfall is real"
    with pytest.raises(ValueError, match=rf"{init}.*moves part of the base weight"):
        AdapterReference(policy)


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga", "an initialisation of next year"])
def test_an_initialisation_is_refused_unless_it_is_known_to_keep_the_base(policy, init):
    policy.peft_config["default"].init_lora_weights = init
    with pytest.raises(ValueError, match=init):
        AdapterReference(policy)


def test_a_frozen_copy_of_a_pissa_adapter_is_the_way_out(base, batch):
    original = CloneReference(base)
    policy = add_lora(base, rank=4, init_lora_weights="pissa")
    copy_adapter(policy, "ref")
    reference = AdapterReference(policy, adapter="ref")
    torch.testing.assert_close(reference.logits(**batch), original.logits(**batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_initialisations_that_keep_the_base_give_it_back(base, init, dora, batch):
    original = CloneReference(base)
    policy = add_lora(base, rank=4, init_lora_weights=init, use_dora=dora)
    assert torch.equal(AdapterReference(policy).logits(**batch), original.logits(**batch))


def test_modules_to_save_give_the_base_back(base, batch):
    original = CloneReference(base)
    policy = add_lora(base, rank=4, modules_to_save=["lm_head"])
    reference = AdapterReference(policy)
    train(policy, reference, batch, steps=3)
    assert torch.equal(reference.logits(**batch), original.logits(**batch))


def test_trained_biases_are_refused():
    base = load_model("pocket")
    attention = base.model.layers[0].self_attn
    attention.q_proj.bias = torch.nn.Parameter(torch.zeros(attention.q_proj.out_features))
    policy = add_lora(base, rank=4, bias="all")
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.bias' trains.*bias=\"none\""):
        AdapterReference(policy)


def test_hand_unfrozen_embeddings_are_refused(policy):
    policy.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight' trains"):
        AdapterReference(policy)


def test_a_merged_adapter_is_refused_at_the_start_and_at_a_pass(policy, batch):
    reference = AdapterReference(policy)
    policy.merge_adapter()
    before = state(policy)
    with pytest.raises(ValueError, match=r"'default' is merged.*unmerge_adapter"):
        AdapterReference(policy)
    with pytest.raises(ValueError, match="is merged"):
        reference.logits(**batch)
    assert state(policy) == before
    policy.unmerge_adapter()
    assert not why_not_the_base(policy)


def test_a_merged_bfloat16_base_comes_back_only_to_rounding(batch):
    base = load_model("pocket", dtype=torch.bfloat16)
    original = CloneReference(base)
    policy = add_lora(base, rank=4)
    reference = AdapterReference(policy)
    train(policy, reference, batch, steps=5)
    assert reference.fingerprint() == original.fingerprint()
    policy.merge_adapter()
    policy.unmerge_adapter()
    assert reference.fingerprint() != original.fingerprint(), "the pitfall that a merged adapter is refused for"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(policy, batch, reentrant):
    reference = AdapterReference(policy)
    train(policy, reference, batch, steps=3)
    policy.train()

    def gradients():
        policy.zero_grad()
        loss, _ = policy_loss(policy, reference, batch, beta=0.5)
        loss.backward()
        return {n: w.grad.clone() for n, w in policy.named_parameters() if w.requires_grad}

    plain = gradients()
    policy.enable_input_require_grads()
    policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())


def test_no_gradient_even_when_an_input_requires_grad(policy, batch):
    embedded = policy.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
    assert not AdapterReference(policy).logits(inputs_embeds=embedded).requires_grad


def test_lora_dropout_never_reaches_the_reference(base, batch):
    policy = add_lora(base, rank=4, lora_dropout=0.5).train()
    copy_adapter(policy, "ref")
    for adapter in (None, "ref"):
        reference = AdapterReference(policy, adapter)
        assert torch.equal(reference.logits(**batch), reference.logits(**batch))


def test_training_with_the_reference_updates_the_adapter_alone(policy, batch):
    before = copy.deepcopy(dict(policy.named_parameters()))
    train(policy, AdapterReference(policy), batch, steps=3)
    changed = {n for n, weight in policy.named_parameters() if not torch.equal(weight, before[n])}
    assert changed == {n for n in before if "lora_" in n}
