"""Masks and means: by hand, against plain Python sums, and for every wrong input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from refkl_lib import combine_means, masked_mean
from refkl_lib.kl.reduce import reduce_tokens

NAN = math.nan
VALUES = torch.tensor([[1.0, 2.0, NAN, NAN], [6.0, NAN, NAN, NAN], [NAN, NAN, NAN, NAN]])
MASK = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_masked_mean_by_hand_and_along_a_dimension():
    values, mask = VALUES[:2], MASK[:2]
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, mask, dim=1).tolist() == [1.5, 6.0]
    assert masked_mean(values[:, :1], dim=0).tolist() == [3.5]
    assert masked_mean(torch.tensor([1.0, 3.0])).item() == 2.0


def test_reductions_by_hand_with_a_fully_masked_row():
    assert reduce_tokens(VALUES, MASK, "mean").item() == 3.0  # (1 + 2 + 6) / 3 tokens
    assert reduce_tokens(VALUES, MASK, "sequence_mean").item() == 3.75  # (1.5 + 6) / 2 sequences that have any
    assert reduce_tokens(VALUES, MASK, "sequence").tolist() == [3.0, 6.0, 0.0]
    assert reduce_tokens(VALUES, MASK, "sum").item() == 9.0
    assert reduce_tokens(VALUES, MASK, "none").tolist() == [[1, 2, 0, 0], [6, 0, 0, 0], [0, 0, 0, 0]]


def test_an_empty_mask_has_no_mean_but_a_sum():
    empty = torch.zeros_like(MASK)
    for reduction in ("mean", "sequence_mean"):
        with pytest.raises(ValueError, match=r"mask of shape \(3, 4\) has no token that counts: a mean needs one"):
            reduce_tokens(VALUES, empty, reduction)
    assert reduce_tokens(VALUES, empty, "sum").item() == 0.0
    assert reduce_tokens(VALUES, empty, "sequence").tolist() == [0.0, 0.0, 0.0]


@st.composite
def masked_values(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    mask = draw(st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    mask[draw(st.integers(0, rows - 1))][draw(st.integers(0, columns - 1))] = True
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return values.to(draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))), mask


@settings(max_examples=80, deadline=None)
@given(case=masked_values(), as_type=st.sampled_from([torch.bool, torch.long, torch.float32]))
def test_reductions_are_plain_sums_over_what_counts(case, as_type):
    values, mask = case
    sequences = [
        [value for value, counts in zip(row, kept, strict=True) if counts]
        for row, kept in zip(values.tolist(), mask, strict=True)
    ]
    total, count = sum(map(sum, sequences)), sum(map(len, sequences))
    tensor_mask = torch.tensor(mask, dtype=as_type)
    poisoned = values.masked_fill(~tensor_mask.bool(), NAN).requires_grad_()

    def reduced(reduction):
        return reduce_tokens(poisoned, tensor_mask, reduction)

    close = {"rel": 1e-5, "abs": 1e-5}
    assert reduced("mean").item() == pytest.approx(total / count, **close)
    assert reduced("sum").item() == pytest.approx(total, **close)
    assert reduced("sequence").tolist() == pytest.approx([sum(row) for row in sequences], **close)
    means = [sum(row) / len(row) for row in sequences if row]
    assert reduced("sequence_mean").item() == pytest.approx(sum(means) / len(means), **close)
    (gradient,) = torch.autograd.grad(reduced("sequence_mean"), poisoned)
    assert gradient.float().sum().item() == pytest.approx(1.0, rel=2e-2)
    assert (gradient[~tensor_mask.bool()] == 0).all()


def test_half_precision_is_widened_before_it_is_summed():
    values = torch.full((2, 1000), 100.0, dtype=torch.float16)  # their sum is over float16's largest number
    assert masked_mean(values).dtype == torch.float32
    assert masked_mean(values).item() == 100.0
    assert masked_mean(torch.tensor([1.0, 2.0**-7], dtype=torch.bfloat16)).item() == (1 + 2.0**-7) / 2


# Ranks


def test_the_ranks_means_combine_to_the_mean_over_all_tokens():
    ranks = [torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([6.0])]
    means, counts = torch.stack([masked_mean(rank) for rank in ranks]), torch.tensor([4, 1])
    assert combine_means(means, counts).item() == 2.0  # (4·1 + 6) / 5
    assert combine_means(means, counts).item() == masked_mean(torch.cat(ranks)).item()
    assert means.mean().item() == 3.5  # what averaging the ranks gives


def test_a_rank_without_tokens_takes_no_part():
    assert combine_means(torch.tensor([2.0, NAN]), torch.tensor([3, 0])).item() == 2.0


def test_averaged_gradients_of_weighted_sums_are_the_gradient_of_the_global_mean():
    weight = torch.tensor(2.0, requires_grad=True)
    ranks = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    losses = [reduce_tokens(weight * tokens, None, "sum") * len(ranks) / 4 for tokens in ranks]
    averaged = sum(torch.autograd.grad(loss, weight)[0] for loss in losses) / len(ranks)
    assert averaged.item() == torch.autograd.grad(masked_mean(weight * torch.cat(ranks)), weight)[0].item() == 4.0
    of_means = sum(torch.autograd.grad(masked_mean(weight * tokens), weight)[0] for tokens in ranks) / len(ranks)
    assert of_means.item() == 6.0


# Published aggregations that are wrong


def test_batchmean_grows_with_the_length_and_counts_padding():
    log_p, log_q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    per_token = (log_p.exp() * (log_p - log_q)).sum().item()
    for length in (1, 10):
        p, q = log_p.expand(2, length, 2), log_q.expand(2, length, 2)
        batchmean = F.kl_div(q, p, log_target=True, reduction="batchmean")
        assert batchmean.item() == pytest.approx(length * per_token)
        mask = torch.ones(2, length)
        mask[1, 1:] = 0
        tokens = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        assert reduce_tokens(tokens, mask, "mean").item() == pytest.approx(per_token)
        assert reduce_tokens(tokens, mask, "sum").item() / 2 == pytest.approx((length + 1) / 2 * per_token)


def test_multiplying_by_the_mask_keeps_the_padding_in_the_mean_and_lets_nan_through():
    zeros = torch.where(MASK.bool(), VALUES, 0.0)
    assert (zeros * MASK).mean().item() == 0.75  # 9 / 12 places
    assert math.isnan((VALUES * MASK).sum() / MASK.sum())
    assert masked_mean(VALUES, MASK).item() == 3.0


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_mean(ONES, torch.ones(2, 4)), r"mask has shape \(2, 4\)"),
        (lambda: masked_mean(ONES, torch.zeros(2, 3)), "no token that counts: .*inverted"),
        (lambda: masked_mean(ONES, torch.tensor([[1, 1, 1], [0, 0, 0]]), dim=1), "at least one slice along dim 1"),
        (lambda: masked_mean(torch.ones(0, 3)), r"mask of shape \(0, 3\) has no token"),
        (lambda: masked_mean(ONES, torch.full((2, 3), 0.5)), "other than 0 and 1"),
        (lambda: masked_mean(ONES, torch.full((2, 3), NAN)), "other than 0 and 1"),
        (lambda: masked_mean(VALUES), "NaN in a value that counts"),
        (lambda: reduce_tokens(VALUES, torch.ones_like(MASK), "sum"), "NaN in a value that counts"),
        (lambda: reduce_tokens(ONES, None, "batchmean"), "'batchmean', but must be one of"),
        (lambda: combine_means(ONES[0], torch.tensor([1, 2])), r"means is \(3,\) and counts is \(2,\)"),
        (lambda: combine_means(ONES[0], torch.tensor([1, 2, -1])), r"counts is \[1, 2, -1\]"),
        (lambda: combine_means(ONES[0], torch.zeros(3)), r"counts is \[0.0, 0.0, 0.0\]"),
        (lambda: combine_means(ONES[0], torch.tensor([1.0, NAN, 1.0])), "numbers of tokens"),
        (lambda: combine_means(ONES[0], torch.tensor([1.0, math.inf, 1.0])), "numbers of tokens"),
        (lambda: combine_means(VALUES[0, 1:3], torch.tensor([1, 1])), "NaN in a value that counts"),
    ],
)
def test_wrong_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
