"""Exact KL: the divergence itself, summed over the whole vocabulary.

    KL(p‖q) = Σ_v p(v)·(log p(v) - log q(v))

The first argument is the distribution that the expectation is taken over: KL(policy‖reference) is what a
fine-tuning penalty means. `torch.nn.functional.kl_div(input, target)` has it the other way round.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from refkl_lib.kl.reduce import Reduction, reduce_tokens


class GivesLogits(Protocol):
    """What a KL needs of a reference, however that is kept."""

    def logits(self, **inputs: Any) -> Tensor:
        """Return logits (B, T, V) without a gradient."""


def exact_kl(
    p_logits: Tensor,
    q_logits: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return KL(p‖q) in nats from logits (B, T, V), with gradients to both.

    `mask` (B, T) is 1 for the tokens that count. `reduction`: "mean" over the counted tokens, "sequence"
    (a sum for each, (B,)), "sum", or "none" (B, T). Half-precision logits are widened to float32 first.
    A token that both masked to -inf adds nothing; one that only q excludes makes the KL infinite.
    Raises ValueError if shapes or vocabularies differ, the mask is empty, or a counted KL is NaN.
    """
    _check_shapes(p_logits, q_logits)
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    # 0·log 0 = 0, also where log p is -inf; masked before the product so that no NaN reaches a gradient.
    log_ratio = (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    return reduce_tokens((log_p.exp() * log_ratio).sum(-1), mask, reduction)


def compute_kl_divergence(
    policy: nn.Module,
    reference: GivesLogits,
    inputs: dict[str, Any],
    reduction: Reduction = "mean",
) -> Tensor:
    """Return KL(policy‖reference) in nats on `inputs`, with a gradient to the policy alone.

    Every position of `inputs["attention_mask"]` counts (all of them without one): the value at a position
    compares what the two models expect *after* that token. Reduction and errors are `exact_kl`'s.
    """
    policy_logits = policy(**{"use_cache": False} | inputs).logits
    reference_logits = reference.logits(**inputs)
    return exact_kl(policy_logits, reference_logits, inputs.get("attention_mask"), reduction)


def _check_shapes(p_logits: Tensor, q_logits: Tensor) -> None:
    if p_logits.dim() != 3:
        raise ValueError(f"logits must be (B, T, V), but p_logits is {tuple(p_logits.shape)}")
    if p_logits.shape[-1] != q_logits.shape[-1]:
        raise ValueError(
            f"p has a vocabulary of {p_logits.shape[-1]} and q of {q_logits.shape[-1]}: a KL needs one. "
            "Were the embeddings resized after the reference was loaded?"
        )
    if p_logits.shape != q_logits.shape:
        raise ValueError(
            f"p_logits is {tuple(p_logits.shape)} and q_logits is {tuple(q_logits.shape)}: "
            "both must come from the same batch"
        )


def _log_softmax(logits: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits, dim=-1, dtype=dtype)
