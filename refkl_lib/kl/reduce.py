"""Masks and means: which tokens count, and how their values become one number."""

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sequence_mean", "sequence", "sum", "none"]


def masked_mean(values: Tensor, mask: Tensor | None = None, dim: int | None = None) -> Tensor:
    """Return the mean of `values` where `mask` is 1; with `dim`, along that dimension only.

    Values where the mask is 0 take no part, not even if they are NaN; half precision is widened to float32.
    Raises ValueError if the shapes differ, if nothing counts (with `dim`: in any slice), or if a value that
    counts is NaN.
    """
    counts = check_mask(values, mask)
    total = counts.sum() if dim is None else counts.sum(dim)
    if total.numel() == 0 or not bool((total > 0).all()):
        raise ValueError(
            f"the mask of shape {tuple(counts.shape)} has no token that counts"
            + ("" if dim is None or not counts.any() else f" in at least one slice along dim {dim}")
            + ": a mean needs one. Was the mask inverted (1 = counts)?"
        )
    kept = _kept(values, counts)
    return (kept.sum() if dim is None else kept.sum(dim)) / total


def reduce_tokens(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce per-token values (B, T): one number, one per sequence (B,), or as they are.

    - "mean": over all counted tokens, so a long sequence weighs more than a short one
    - "sequence_mean": over the sequences, of each one's mean over its counted tokens, so all weigh the same
    - "sequence": the sum over each sequence's counted tokens (B,); its `.mean()` grows with their length
    - "sum": over all counted tokens
    - "none": (B, T), with 0 where the mask is 0

    A fully masked row takes no part in either mean, and its sum is 0. A mask without any token is an error for
    the means, and a sum of 0 for the others: what a rank without a counted token adds to the ranks' sum.
    Raises ValueError as `masked_mean` does, or for an unknown reduction.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}, but must be one of {get_args(Reduction)}")
    if reduction == "mean":
        return masked_mean(values, mask)
    counts = check_mask(values, mask)
    if reduction == "sequence_mean":
        rows = counts.any(-1) | ~counts.any()  # an empty mask keeps its rows, and so gets its own error
        return masked_mean(masked_mean(values[rows], counts[rows], dim=-1))
    kept = _kept(values, counts)
    if reduction == "none":
        return kept
    return kept.sum(-1) if reduction == "sequence" else kept.sum()


def combine_means(means: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over all tokens, from the ranks' means (R,) and how many tokens each counted (R,).

    The plain mean of the ranks' means is another number as soon as their counts differ. A mean whose count is 0
    takes no part, not even as NaN. For a loss under data parallelism, which averages the ranks' gradients, the
    same weighting is: each rank's "sum", times the number of ranks, over the count of all of them.
    Raises ValueError if the shapes differ, a count is negative or not finite, all are 0, or a mean that counts is NaN.
    """
    if means.shape != counts.shape:
        raise ValueError(
            f"means is {tuple(means.shape)} and counts is {tuple(counts.shape)}: each rank has one of both"
        )
    if not bool(((counts >= 0) & (counts < torch.inf)).all() & (counts > 0).any()):
        raise ValueError(f"counts is {counts.tolist()}, but must be numbers of tokens, of which one is not 0")
    kept = _kept(means, check_mask(means, counts > 0))
    return (kept * counts).sum() / counts.sum()


def check_mask(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask as booleans, all True for None.

    Raises ValueError if its shape is not that of `values`, if it has an entry other than 0 and 1, or if
    a value that counts is NaN.
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    if mask.shape != values.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, but there is one value for each token: {tuple(values.shape)}"
        )
    counts = mask.bool()
    if mask.dtype != torch.bool and not bool((mask == counts).all()):
        raise ValueError("mask has entries other than 0 and 1; weights are not a mask")
    if bool(torch.isnan(values.detach()[counts]).any()):
        raise ValueError(
            "NaN in a value that counts: look for NaN in the logits (an overflow in float16, a "
            "position whose every token is masked to -inf)"
        )
    return counts


def widen(values: Tensor) -> Tensor:
    """Return float64 values as they are, others as float32: half precision has no digits left for a sum."""
    return values if values.dtype == torch.float64 else values.float()


def _kept(values: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, widen(values), 0.0)
