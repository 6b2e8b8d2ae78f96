"""KL: against a float64 oracle, by hand, and for every wrong input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refkl_lib import (
    compute_kl_divergence,
    create_reference,
    exact_kl,
    load_model,
    sample_batch,
    token_log_probs,
)

INF = math.inf


def oracle(p_logits, q_logits):
    """KL(p‖q) for each token by its definition in float64: Σ p·log(p/q), with 0·log 0 = 0."""
    p, q = p_logits.double().softmax(-1), q_logits.double().softmax(-1)
    terms = torch.where(p > 0, p * (p.log() - q.log()), 0.0)
    return terms.sum(-1)


def logits(seed, *shape, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(2, 3000),
    tokens=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    near=st.booleans(),
)
def test_float32_agrees_with_the_float64_oracle(seed, vocabulary, tokens, scale, near):
    p = logits(seed, 2, tokens, vocabulary, scale=scale)
    q = p + 0.01 * logits(seed + 1, *p.shape) if near else logits(seed + 1, *p.shape, scale=scale)
    torch.testing.assert_close(exact_kl(p, q, reduction="none").double(), oracle(p, q), rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_accumulated_in_float32():
    p, q = logits(0, 1, 4, 50_000, dtype=torch.bfloat16), logits(1, 1, 4, 50_000, dtype=torch.bfloat16)
    result = exact_kl(p, q, reduction="none")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), oracle(p, q), rtol=1e-5, atol=1e-6)


def test_direction_by_hand():
    p = torch.tensor([[[0.75, 0.25]]]).log()
    q = torch.tensor([[[0.5, 0.5]]]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert exact_kl(p, q).item() == pytest.approx(forward, abs=1e-6)
    assert exact_kl(q, p).item() == pytest.approx(reverse, abs=1e-6)
    assert forward != pytest.approx(reverse, abs=1e-3)


def test_identical_logits_give_exactly_zero():
    p = logits(0, 2, 5, 1000)
    assert exact_kl(p, p.clone()).item() == 0.0


def test_gradients_check_against_finite_differences():
    p = logits(0, 2, 3, 5, dtype=torch.float64).requires_grad_()
    q = logits(1, 2, 3, 5, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for reduction in ("mean", "sequence", "sum", "none"):
        assert torch.autograd.gradcheck(lambda p, q, r=reduction: exact_kl(p, q, mask, r), (p, q))


def test_gradient_to_p_is_the_formula():
    p, q = logits(0, 1, 2, 7, dtype=torch.float64).requires_grad_(), logits(1, 1, 2, 7, dtype=torch.float64)
    exact_kl(p, q, reduction="sum").backward()
    log_ratio = p.log_softmax(-1) - q.log_softmax(-1)
    kl = oracle(p, q).unsqueeze(-1)
    torch.testing.assert_close(p.grad, (p.softmax(-1) * (log_ratio - kl)).detach())


def test_a_vocabulary_masked_in_both_adds_nothing():
    p, q = logits(0, 1, 3, 8), logits(1, 1, 3, 8)
    expected = exact_kl(p, q, reduction="none")
    hole = torch.full((1, 3, 4), -INF)
    wide_p = torch.cat([p, hole], -1).requires_grad_()
    result = exact_kl(wide_p, torch.cat([q, hole], -1), reduction="none")
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert torch.isfinite(wide_p.grad).all()
    assert (wide_p.grad[..., 8:] == 0).all()


def test_what_only_p_excludes_is_finite_and_what_only_q_excludes_is_infinite():
    p = torch.tensor([[[0.0, -INF, 0.0]]])
    q = torch.tensor([[[0.0, 0.0, 0.0]]])
    assert exact_kl(p, q).item() == pytest.approx(math.log(3 / 2), abs=1e-6)
    assert exact_kl(q, p).item() == INF


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(size):
    p = torch.tensor([[[size, 0.0, -size]]]).requires_grad_()
    q = torch.tensor([[[0.0, 1.0, 2.0]]])
    kl = exact_kl(p, q)
    kl.backward()
    assert math.isfinite(kl.item())
    assert torch.isfinite(p.grad).all()


# Reductions


def test_reductions_by_hand():
    p, q = logits(0, 2, 3, 5), logits(1, 2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    tokens = exact_kl(p, q, reduction="none")
    masked = exact_kl(p, q, mask, "none")
    assert torch.equal(masked, tokens * mask)
    counted = tokens[0, 0] + tokens[0, 1] + tokens[1, 0]
    torch.testing.assert_close(exact_kl(p, q, mask), counted / 3)
    torch.testing.assert_close(exact_kl(p, q, mask, "sum"), counted)
    torch.testing.assert_close(
        exact_kl(p, q, mask, "sequence"), torch.stack([tokens[0, 0] + tokens[0, 1], tokens[1, 0]])
    )


def test_padding_changes_nothing_whatever_it_holds():
    p, q = logits(0, 2, 3, 5), logits(1, 2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = exact_kl(p, q, mask)
    p[mask == 0] = math.nan
    p.requires_grad_()
    result = exact_kl(p, q, mask)
    assert torch.equal(result, expected)
    result.backward()
    assert torch.isfinite(p.grad[mask == 1]).all()


def test_token_log_probs_by_hand():
    given = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]).log()
    result = token_log_probs(given, torch.tensor([[1, 0]]))
    assert result[0].tolist() == pytest.approx([math.log(0.25), math.log(0.5)])


# Wrong inputs, each with its own sentence

P = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_kl(P, torch.zeros(2, 3, 6)), "vocabulary of 5 and q of 6"),
        (lambda: exact_kl(P, torch.zeros(2, 4, 5)), r"\(2, 3, 5\) and q_logits is \(2, 4, 5\)"),
        (lambda: exact_kl(P[0], P[0]), r"must be \(B, T, V\)"),
        (lambda: exact_kl(P, P, torch.ones(2, 4)), r"mask has shape \(2, 4\)"),
        (lambda: exact_kl(P, P, torch.zeros(2, 3)), "no token that counts"),
        (lambda: exact_kl(P, P, torch.full((2, 3), 0.5)), "other than 0 and 1"),
        (lambda: exact_kl(P, P, reduction="batchmean"), "'batchmean', but must be one of"),
        (lambda: exact_kl(P * math.nan, P), "NaN in a value that counts"),
        (lambda: exact_kl(P - INF, P), "NaN in a value that counts"),
        (lambda: token_log_probs(P, torch.zeros(2, 2, dtype=torch.long)), "need token_ids of shape"),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The article's function


def test_compute_kl_divergence_has_the_right_direction_and_a_gradient_to_the_policy_alone():
    policy = load_model("pocket")
    reference = create_reference(policy, "clone")
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.1)
    inputs = sample_batch("pocket", batch=2, seq=16)
    inputs["attention_mask"][1, 10:] = 0
    kl = compute_kl_divergence(policy, reference, inputs)
    with torch.no_grad():
        p, q = policy(**inputs).logits, reference.logits(**inputs)
    counted = inputs["attention_mask"].bool()
    assert kl.item() == pytest.approx(oracle(p, q)[counted].mean().item(), rel=1e-5)
    assert kl.item() != pytest.approx(oracle(q, p)[counted].mean().item(), rel=1e-3)
    kl.backward()
    assert policy.lm_head.weight.grad.abs().max() > 0
    assert all(weight.grad is None for weight in reference.model.parameters())
