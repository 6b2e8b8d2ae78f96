"""The exact KL and the log-probs of given tokens, from logits: against float64, by hand, and for every wrong input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_oracle import DTYPES, masks, normal, oracle

from refkl_lib import MemoryLedger, exact_kl, token_log_probs

INF, NAN = math.inf, math.nan


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(2, 3000),
    mask=masks(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    near=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_value_and_gradients_agree_with_the_float64_oracle(seed, vocabulary, mask, scale, near, dtype):
    p = normal(seed, *mask.shape, vocabulary, scale=scale)
    q = p + 0.01 * normal(seed + 1, *p.shape) if near else normal(seed + 1, *p.shape, scale=scale)
    p, q = p.to(dtype).requires_grad_(), q.to(dtype).requires_grad_()
    before = p.detach().clone(), q.detach().clone()
    wide_p, wide_q = (x.detach().double().requires_grad_() for x in (p, q))
    ours, theirs = exact_kl(p, q, mask, "none"), torch.where(mask == 1, oracle(wide_p, wide_q), 0.0)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * max(1, scale))
    ours.sum().backward()
    theirs.sum().backward()
    rtol, atol = (torch.finfo(dtype).eps, 1e-3) if dtype.itemsize == 2 else (1e-5, 1e-6 * max(1, scale))
    for x, wide in ((p, wide_p), (q, wide_q)):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=rtol, atol=atol)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


@pytest.mark.parametrize("vocabulary", [2, 49_152, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies_lose_no_digits(vocabulary, dtype):
    p, q = normal(0, 1, 3, vocabulary, dtype=dtype), normal(1, 1, 3, vocabulary, dtype=dtype)
    torch.testing.assert_close(exact_kl(p, q, reduction="none").double(), oracle(p, q), rtol=1e-5, atol=1e-6)


def test_direction_by_hand():
    p = torch.tensor([[[0.75, 0.25]]]).log()
    q = torch.tensor([[[0.5, 0.5]]]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert exact_kl(p, q).item() == pytest.approx(forward, abs=1e-6)
    assert exact_kl(q, p).item() == pytest.approx(reverse, abs=1e-6)
    assert forward != pytest.approx(reverse, abs=1e-3)


def test_identical_logits_give_exactly_zero():
    p = normal(0, 2, 5, 1000).requires_grad_()
    kl = exact_kl(p, p.detach().clone())
    kl.backward()
    assert kl.item() == 0.0
    assert (p.grad == 0).all()


def test_gradients_check_against_finite_differences():
    p = normal(0, 2, 3, 5, dtype=torch.float64).requires_grad_()
    q = normal(1, 2, 3, 5, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for reduction in ("mean", "sequence_mean", "sequence", "sum", "none"):
        assert torch.autograd.gradcheck(lambda p, q, r=reduction: exact_kl(p, q, mask, r), (p, q))


def test_gradient_to_p_is_the_formula():
    p, q = normal(0, 1, 2, 7, dtype=torch.float64).requires_grad_(), normal(1, 1, 2, 7, dtype=torch.float64)
    exact_kl(p, q, reduction="sum").backward()
    log_ratio = p.log_softmax(-1) - q.log_softmax(-1)
    kl = oracle(p, q).unsqueeze(-1)
    torch.testing.assert_close(p.grad, (p.softmax(-1) * (log_ratio - kl)).detach())


def test_a_gradient_is_only_made_for_what_requires_one():
    p, q = normal(0, 1, 2, 7), normal(1, 1, 2, 7).requires_grad_()
    exact_kl(p, q).backward()
    assert p.grad is None
    torch.testing.assert_close(q.grad, (q.softmax(-1) - p.softmax(-1)).detach() / 2)


def test_the_backward_pass_can_run_twice():
    p, q = normal(0, 1, 2, 7).requires_grad_(), normal(1, 1, 2, 7)
    kl = exact_kl(p, q)
    once, twice = (torch.autograd.grad(kl, p, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


def test_a_word_that_both_exclude_adds_nothing():
    p, q = normal(0, 1, 3, 8), normal(1, 1, 3, 8)
    expected = exact_kl(p, q, reduction="none")
    hole = torch.full((1, 3, 4), -INF)
    wide_p, wide_q = (torch.cat([x, hole], -1).requires_grad_() for x in (p, q))
    result = exact_kl(wide_p, wide_q, reduction="none")
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    for wide in (wide_p, wide_q):
        assert torch.isfinite(wide.grad).all()
        assert (wide.grad[..., 8:] == 0).all()


def test_what_only_p_excludes_is_finite_and_what_only_q_excludes_is_infinite():
    p = torch.tensor([[[0.0, -INF, 0.0]]]).requires_grad_()
    q = torch.tensor([[[0.0, 0.0, 0.0]]])
    kl = exact_kl(p, q)
    kl.backward()
    assert kl.item() == pytest.approx(math.log(3 / 2), abs=1e-6)
    assert torch.isfinite(p.grad).all()
    assert exact_kl(q, p).item() == INF


def test_a_constant_added_to_all_logits_changes_nothing():
    p, q = (normal(seed, 1, 4, 1000).mul(16).round().div(16) for seed in (0, 1))  # so that the sums below are exact
    assert torch.equal(exact_kl(p + 2.0**13, q - 2.0**13), exact_kl(p, q))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(size):
    p = torch.tensor([[[size, 0.0, -size]]]).requires_grad_()
    q = torch.tensor([[[0.0, 1.0, 2.0]]]).requires_grad_()
    kl = exact_kl(p, q)
    kl.backward()
    assert kl.item() == pytest.approx(oracle(p, q).item())
    assert torch.isfinite(p.grad).all()
    assert torch.isfinite(q.grad).all()


# Reductions and masks


def test_reductions_by_hand():
    p, q = normal(0, 2, 3, 5), normal(1, 2, 3, 5)
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
    p, q = normal(0, 2, 3, 5), normal(1, 2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = exact_kl(p, q, mask)
    p[mask == 0] = NAN
    p.requires_grad_()
    result = exact_kl(p, q, mask)
    assert torch.equal(result, expected)
    result.backward()
    assert torch.isfinite(p.grad).all()
    assert (p.grad[mask == 0] == 0).all()


def test_a_mask_without_tokens_has_a_sum():
    p = normal(0, 1, 2, 5).requires_grad_()
    kl = exact_kl(p, normal(1, 1, 2, 5), torch.zeros(1, 2), "sum")
    kl.backward()
    assert kl.item() == 0.0
    assert (p.grad == 0).all()


# Log-probs of given tokens


def test_token_log_probs_by_hand():
    logits = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]).log()
    result = token_log_probs(logits, torch.tensor([[1, 0]]))
    assert result[0].tolist() == pytest.approx([math.log(0.25), math.log(0.5)])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(), (3,), (2, 3), (2, 1, 2), (0, 3)]),
    vocabulary=st.integers(2, 200_000),
    scale=st.sampled_from([1.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
)
def test_token_log_probs_agree_with_float64(seed, shape, vocabulary, scale, dtype):
    logits = normal(seed, *shape, vocabulary, scale=scale).to(dtype).requires_grad_()
    before = logits.detach().clone()
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    wide = logits.detach().double().requires_grad_()
    ours, theirs = token_log_probs(logits, ids), wide.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    ours.sum().backward()
    theirs.sum().backward()
    tolerance = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-5
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=tolerance, atol=1e-6)
    assert torch.equal(logits, before)


def test_token_log_probs_gradients_check_against_finite_differences():
    logits = normal(0, 2, 3, 5, dtype=torch.float64).requires_grad_()
    # A view like logits[:, :-1], of which no flat view exists.
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x[:, :-1], torch.tensor([[1, 4], [0, 2]])), logits)


# Memory: the gradients that must be returned, and a few rows


def extra_peak(run):
    with MemoryLedger() as ledger:
        run()
        return sum(ledger.peak().values())


def test_the_value_takes_the_memory_of_a_few_rows_and_the_gradient_itself_besides():
    tokens, vocabulary = 64, 50_000
    p, q = normal(0, 2, tokens // 2, vocabulary), normal(1, 2, tokens // 2, vocabulary)
    ids = torch.zeros(2, tokens // 2, dtype=torch.long)
    few_rows, whole = 40 * 4 * vocabulary, 4 * tokens * vocabulary
    assert extra_peak(lambda: exact_kl(p, q)) < few_rows
    assert extra_peak(lambda: token_log_probs(p[:, :-1], ids[:, 1:])) < few_rows
    p.requires_grad_()
    assert whole <= extra_peak(lambda: exact_kl(p, q).backward()) < whole + few_rows
    assert whole <= extra_peak(lambda: token_log_probs(p, ids).sum().backward()) < whole + few_rows


# Wrong inputs, each with its own sentence

P = torch.zeros(2, 3, 5)
IDS = torch.zeros(2, 3, dtype=torch.long)


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
        (lambda: exact_kl(P * NAN, P), "NaN in a value that counts"),
        (lambda: exact_kl(P, P * NAN), "NaN in a value that counts"),
        (lambda: exact_kl(P - INF, P), "NaN in a value that counts"),
        (lambda: token_log_probs(P, torch.zeros(2, 2, dtype=torch.long)), "need token_ids of shape"),
        (lambda: token_log_probs(P, IDS - 100), "token_ids has -100, which is not in a vocabulary of 5"),
        (lambda: token_log_probs(P, IDS + 5), "token_ids has 5, which"),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
