"""Masks and means: which tokens count, and how their values become one number."""

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sequence", "sum", "none"]


def masked_mean(values: Tensor, mask: Tensor | None = None, dim: int | None = None) -> Tensor:
    """Return the mean of `values` where `mask` is 1; with `dim`, along that dimension only.

    Values where the mask is 0 take no part, not even if they are NaN.
    Raises ValueError if the shapes differ, if nothing counts, or if a value that counts is NaN.
    """
    counts = check_mask(values, mask)
    total = counts.sum() if dim is None else counts.sum(dim)
    if not bool((total > 0).all()):
        raise ValueError(
            f"the mask of shape {tuple(counts.shape)} has no token that counts"
            + ("" if dim is None else f" in at least one slice along dim {dim}")
            + ": a mean needs one. Was the mask inverted (1 = counts)?"
        )
    kept = torch.where(counts, values, 0.0)
    return (kept.sum() if dim is None else kept.sum(dim)) / total


def reduce_tokens(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce per-token values (B, T): one number, one per sequence (B,), or as they are.

    "mean" is the mean over all counted tokens, "sequence" the sum over each sequence's counted tokens,
    "sum" the sum over all of them; "none" gives (B, T) with 0 where the mask is 0.
    Raises ValueError as `masked_mean` does, or for an unknown reduction.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}, but must be one of {get_args(Reduction)}")
    if reduction == "mean":
        return masked_mean(values, mask)
    kept = torch.where(check_mask(values, mask), values, 0.0)
    if reduction == "none":
        return kept
    return kept.sum(-1) if reduction == "sequence" else kept.sum()


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
