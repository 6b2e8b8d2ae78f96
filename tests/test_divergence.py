"""The KL between two models: the same number from hidden states as from logits, and a word when these are needed."""

import warnings

import pytest
import torch
from kl_oracle import oracle
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from refkl_lib import (
    MemoryLedger,
    add_lora,
    compute_kl_divergence,
    create_reference,
    exact_kl,
    load_model,
    sample_batch,
)
from refkl_lib.step import TimedReference

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


@pytest.fixture
def inputs():
    batch = sample_batch("pocket", batch=2, seq=16)
    batch["attention_mask"][1, 10:] = 0
    return batch


def drifted(model, strategy="clone"):
    """A reference, and its policy after some training."""
    reference = create_reference(model, strategy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    return model, reference


def from_logits(policy, reference, inputs, reduction="mean"):
    return exact_kl(policy(**inputs).logits, reference.logits(**inputs), inputs.get("attention_mask"), reduction)


def test_direction_and_a_gradient_to_the_policy_alone(inputs):
    policy, reference = drifted(load_model("pocket"))
    kl = compute_kl_divergence(policy, reference, inputs)
    with torch.no_grad():
        p, q = policy(**inputs).logits, reference.logits(**inputs)
    counted = inputs["attention_mask"].bool()
    assert kl.item() == pytest.approx(oracle(p, q)[counted].mean().item(), rel=1e-5)
    assert kl.item() != pytest.approx(oracle(q, p)[counted].mean().item(), rel=1e-3)
    kl.backward()
    assert policy.lm_head.weight.grad.abs().max() > 0
    assert all(weight.grad is None for weight in reference.model.parameters())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reduction", ["mean", "sequence", "none"])
@pytest.mark.parametrize("strategy", ["clone", "adapter"])
def test_hidden_states_give_what_logits_give(strategy, reduction, inputs):
    model = load_model("pocket")
    policy, reference = drifted(add_lora(model, rank=2) if strategy == "adapter" else model, strategy)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    ours, theirs = (f(policy, reference, inputs, reduction) for f in (compute_kl_divergence, from_logits))
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    pairs = zip(*(torch.autograd.grad(kl.sum(), trained) for kl in (ours, theirs)), strict=True)
    for our, their in pairs:
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5 * their.abs().max().item())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**TINY, final_logit_softcapping=2.0)),
        (CohereForCausalLM, CohereConfig(**TINY, logit_scale=0.3)),
        (GraniteForCausalLM, GraniteConfig(**TINY, logits_scaling=7.0)),
    ],
)
def test_what_an_architecture_does_to_its_logits_is_done(architecture, config, dtype):
    torch.manual_seed(0)
    policy, reference = drifted(architecture(config).to(dtype).eval())
    inputs = {"input_ids": torch.randint(64, (2, 7))}
    kl, expected = (f(policy, reference, inputs) for f in (compute_kl_divergence, from_logits))
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5 if dtype == torch.float32 else 1e-2)
    kl.backward()
    assert policy.get_output_embeddings().weight.grad.abs().max() > 0


def test_no_logits_of_all_tokens_are_made(monkeypatch):
    policy = load_model("pocket")
    policy.resize_token_embeddings(20_000)
    policy.requires_grad_(False)
    reference = create_reference(policy, "clone")
    monkeypatch.setattr("refkl_lib.kl.linear.chunk_before_head", lambda *_: 8)
    inputs = {"input_ids": torch.zeros(2, 100, dtype=torch.long)}
    with MemoryLedger() as ledger, torch.no_grad():
        compute_kl_divergence(policy, reference, inputs)
        assert sum(ledger.peak().values()) < 2 * 100 * 20_000 * 4 / 2


class Doubling(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def doubles_its_logits(policy):
    policy.get_output_embeddings().register_forward_hook(lambda _module, _args, output: 2 * output)


def other_head(policy):
    head = policy.get_output_embeddings()
    doubling = Doubling(head.in_features, head.out_features, bias=False)
    doubling.weight = head.weight
    policy.set_output_embeddings(doubling)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (doubles_its_logits, "the policy's logits are not what its head makes of its last hidden states"),
        (other_head, "its head is a Doubling, not a plain linear layer"),
        (lambda policy: setattr(policy.lm_head.weight, "ds_id", 0), "ZeRO-3 has its head in one piece only"),
    ],
)
def test_whole_logits_are_used_and_said_to_be_where_the_head_is_not_plain(change, reason, inputs):
    policy, reference = drifted(load_model("pocket"))
    change(policy)
    with pytest.warns(UserWarning, match=f"computing the KL from whole logits.*{reason}"):
        kl = compute_kl_divergence(policy, reference, inputs)
    assert torch.equal(kl, from_logits(policy, reference, inputs))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_the_head_is_seen(inputs):
    policy, reference = drifted(add_lora(load_model("pocket"), rank=2, targets=["lm_head", "q_proj"]), "adapter")
    with pytest.warns(UserWarning, match="not a plain linear layer; is an adapter on it"):
        kl = compute_kl_divergence(policy, reference, inputs)
    assert torch.equal(kl, from_logits(policy, reference, inputs))


def test_a_reference_that_only_gives_logits_is_enough(inputs):
    policy, reference = drifted(load_model("pocket"))
    with pytest.warns(UserWarning, match="a TimedReference does not give its model"):
        kl = compute_kl_divergence(policy, TimedReference(reference), inputs)
    assert torch.equal(kl, from_logits(policy, reference, inputs))


def test_a_wrapped_policy_keeps_its_own_forward(inputs):
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    policy, reference = drifted(load_model("pocket"))
    with pytest.warns(UserWarning, match="the forward pass of a Wrapped makes the logits of every token"):
        kl = compute_kl_divergence(Wrapped(policy), reference, inputs)
    assert torch.equal(kl, from_logits(policy, reference, inputs))


def test_a_head_that_was_only_lent_is_noticed(inputs):
    policy, reference = drifted(load_model("pocket"))
    expected = from_logits(policy, reference, inputs)

    class Swapped(type(reference)):
        """Its weights are in the policy during the pass, and nowhere to be found as a module afterwards."""

        def __init__(self):
            self.inner = reference

        def as_reference(self):
            return swapped(policy, reference.model)

    with pytest.warns(UserWarning, match="the reference's logits are not what its head makes"):
        kl = compute_kl_divergence(policy, Swapped(), inputs)
    assert kl.item() == pytest.approx(expected.item(), rel=1e-6)


class swapped:
    def __init__(self, policy, reference):
        self.policy, self.reference = policy, reference

    def swap(self):
        for mine, theirs in zip(self.policy.parameters(), self.reference.parameters(), strict=True):
            mine.data, theirs.data = theirs.data, mine.data

    def __enter__(self):
        self.swap()
        return self.policy

    def __exit__(self, *_):
        self.swap()


def test_labels_and_a_choice_of_logits_change_nothing(inputs):
    policy, reference = drifted(load_model("pocket"))
    expected = compute_kl_divergence(policy, reference, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compute_kl_divergence(policy, reference, inputs | {"labels": inputs["input_ids"]}), expected)
    few = {"input_ids": inputs["input_ids"], "logits_to_keep": 3}
    with pytest.warns(UserWarning, match="logits_to_keep"):
        kl = compute_kl_divergence(policy, reference, few)
    assert torch.equal(kl, from_logits(policy, reference, few))
