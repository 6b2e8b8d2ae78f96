"""Exact KL: the divergence itself, summed over the whole vocabulary.

    KL(p‖q) = Σ_v p(v)·(log p(v) - log q(v))

    ∂KL/∂p_logits(v) = p(v)·(log p(v) - log q(v) - KL)        ∂KL/∂q_logits(v) = q(v) - p(v)

The first argument is the distribution that the expectation is taken over: KL(policy‖reference) is what a
fine-tuning penalty means. `torch.nn.functional.kl_div(input, target)` has it the other way round.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refkl_lib.kl.chunks import Rows, chunk_of_logits, chunks_of, log_softmax_, widened
from refkl_lib.kl.reduce import Reduction, check_mask, reduce_tokens


def exact_kl(
    p_logits: Tensor,
    q_logits: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return KL(p‖q) in nats from logits (B, T, V), with gradients to both.

    `mask` (B, T) is 1 for the tokens that count. `reduction`: "mean" over the counted tokens, "sequence_mean",
    "sequence" (a sum for each, (B,)), "sum", or "none" (B, T); see `reduce_tokens`. Half-precision logits are
    widened to float32 first. A word that both masked to -inf adds nothing; one that only q excludes makes the KL
    infinite, and its gradient has no value. Beyond the gradients it takes the memory of a few tokens' logits;
    `linear_kl` spares those as well.
    Raises ValueError if shapes or vocabularies differ, the mask is empty, or a counted KL is NaN.
    """
    _check_shapes(p_logits, q_logits)
    counts = check_mask(torch.zeros(p_logits.shape[:-1], device=p_logits.device), mask)
    return reduce_tokens(_TokenKL.apply(p_logits, q_logits, counts), mask, reduction)


def kl_terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and p·(log p - log q), whose sum is the KL, in the memory of `log_p` and `log_q`."""
    impossible = log_p == -torch.inf
    # 0·log 0 = 0: -inf - (-inf) would be NaN, and so would 0 times the -inf that is left.
    terms = torch.sub(log_p, log_q, out=log_q).masked_fill_(impossible, 0.0)
    p = log_p.exp_()
    return p, terms.mul_(p)


def kl_slope(p: Tensor, terms: Tensor, kl: Tensor) -> Tensor:
    """Return ∂KL/∂p_logits = p·(log p - log q) - p·KL, in the memory of `terms`."""
    return terms.addcmul_(p, kl.unsqueeze(-1), value=-1)


class _TokenKL(torch.autograd.Function):
    """The KL of each token that counts, 0 for the others; for the backward pass only the logits are kept."""

    @staticmethod
    def forward(ctx: Any, p_logits: Tensor, q_logits: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(p_logits, q_logits, counts)
        dtype = widened(p_logits.dtype, q_logits.dtype)
        values = torch.zeros(counts.shape, dtype=dtype, device=p_logits.device)
        for rows in chunks_of(counts, chunk_of_logits(p_logits)):
            values[rows] = kl_terms(*_log_probs(p_logits, q_logits, rows))[1].sum(-1)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        p_logits, q_logits, counts = ctx.saved_tensors
        p_grad, q_grad = (
            torch.zeros_like(logits) if needed else None
            for logits, needed in zip((p_logits, q_logits), ctx.needs_input_grad, strict=False)
        )
        for rows in chunks_of(counts, chunk_of_logits(p_logits)):
            log_p, log_q = _log_probs(p_logits, q_logits, rows)
            scale = grad[rows].unsqueeze(-1)
            if q_grad is not None:
                q_grad[rows] = log_q.exp().sub_(log_p.exp()).mul_(scale).to(q_grad.dtype)
            if p_grad is not None:
                p, terms = kl_terms(log_p, log_q)
                p_grad[rows] = kl_slope(p, terms, terms.sum(-1)).mul_(scale).to(p_grad.dtype)
        return p_grad, q_grad, None


def _log_probs(p_logits: Tensor, q_logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    dtype = widened(p_logits.dtype, q_logits.dtype)
    return log_softmax_(p_logits[rows], dtype), log_softmax_(q_logits[rows], dtype)


def _check_shapes(p_logits: Tensor, q_logits: Tensor) -> None:
    if p_logits.dim() != 3:
        raise ValueError(f"logits must be (B, T, V), but p_logits is {tuple(p_logits.shape)}")
    check_vocabularies(p_logits.shape[-1], q_logits.shape[-1])
    if p_logits.shape != q_logits.shape:
        raise ValueError(
            f"p_logits is {tuple(p_logits.shape)} and q_logits is {tuple(q_logits.shape)}: "
            "both must come from the same batch"
        )


def check_vocabularies(p: int, q: int) -> None:
    """Raise ValueError if the two vocabularies are not of one size."""
    if p != q:
        raise ValueError(
            f"p has a vocabulary of {p} and q of {q}: a KL needs one. "
            "Were the embeddings resized after the reference was loaded?"
        )
