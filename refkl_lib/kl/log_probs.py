"""The log-probability that a model gave to tokens that are known.

log p(token) = logit(token) - logsumexp(logits)        ∂/∂logit(v) = [v = token] - p(v)
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refkl_lib.kl.chunks import Rows, chunk_of_logits, chunks_of, log_softmax_, widened


def token_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-prob of each given token: logits (…, V), token_ids (…) -> (…).

    The result is float32 (float64 for float64 logits): the logits are widened before the sum over the
    vocabulary, a few tokens at a time. Raises ValueError if the shapes do not match, or an id is not in the
    vocabulary.
    """
    if logits.shape[:-1] != token_ids.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} need token_ids of shape "
            f"{tuple(logits.shape[:-1])}, not {tuple(token_ids.shape)}; "
            "for next-token log-probs pass logits[:, :-1] and token_ids[:, 1:]"
        )
    check_ids(token_ids, logits.shape[-1])
    if token_ids.dim() == 0:  # nothing to take chunks of
        return _TokenLogProbs.apply(logits[None], token_ids[None])[0]
    return _TokenLogProbs.apply(logits, token_ids)


def check_ids(token_ids: Tensor, vocabulary: int) -> None:
    """Raise ValueError if an id is not in the vocabulary."""
    outside = token_ids[(token_ids < 0) | (token_ids >= vocabulary)]
    if outside.numel():
        raise ValueError(
            f"token_ids has {outside[0].item()}, which is not in a vocabulary of {vocabulary}; "
            "give tokens that do not count some id, and leave them out by a mask afterwards"
        )


def chosen(log_p: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-prob of one token for each row: log_p (C, V), token_ids (C,) -> (C,)."""
    return log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def chosen_slope(log_p: Tensor, token_ids: Tensor) -> Tensor:
    """Return the derivative of `chosen` by the logits, (C, V), in the memory of `log_p`."""
    ones = torch.ones_like(token_ids, dtype=log_p.dtype).unsqueeze(-1)
    return log_p.exp_().neg_().scatter_add_(-1, token_ids.unsqueeze(-1), ones)


class _TokenLogProbs(torch.autograd.Function):
    """The log-prob of each token; for the backward pass only the logits are kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, token_ids)
        values = torch.empty(token_ids.shape, dtype=widened(logits.dtype), device=logits.device)
        for rows in _chunks(logits, token_ids):
            values[rows] = chosen(log_softmax_(logits[rows], values.dtype), token_ids[rows])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, token_ids = ctx.saved_tensors
        logits_grad = torch.empty_like(logits)
        for rows in _chunks(logits, token_ids):
            log_p = log_softmax_(logits[rows], grad.dtype)
            slope = chosen_slope(log_p, token_ids[rows])
            logits_grad[rows] = slope.mul_(grad[rows].unsqueeze(-1)).to(logits.dtype)
        return logits_grad, None


def _chunks(logits: Tensor, token_ids: Tensor) -> Iterator[Rows]:
    return chunks_of(torch.ones_like(token_ids, dtype=torch.bool), chunk_of_logits(logits))
