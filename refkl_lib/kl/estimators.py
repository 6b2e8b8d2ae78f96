"""Estimators: the KL from the sampled tokens alone, without the rest of the vocabulary.

With the log-ratio r = log ref - log policy of a token that the *policy* sampled (Schulman, "Approximating KL
divergence"):

    k1 = -r              unbiased; negative for single tokens; high variance
    k2 = r² / 2          biased; never negative
    k3 = e^r - 1 - r     unbiased; never negative; low variance

A value is not a gradient, and which estimator is right depends on the place where it acts:

    kl_loss(log_probs, ref_log_probs, "k2")        in the loss: back-propagated
    rewards - beta * kl_reward(log_probs, ref_log_probs, "k1")      in the reward: a number like any other
    exact_kl(p_logits, q_logits)                   exactly, where the whole vocabulary is at hand

`kl_gradient_table` shows what each other pairing does (arXiv 2506.09477, 2512.21852).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from refkl_lib.kl.reduce import Reduction, check_mask, reduce_tokens, widen

Estimator = Literal["k1", "k2", "k3"]


def estimate_kl(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    estimator: Estimator = "k3",
    *,
    weights: Tensor | None = None,
    clamp_log_ratio: float | None = None,
    clamp_value: float | None = None,
) -> Tensor:
    """Return each token's estimate of KL(policy‖reference) in nats, of the inputs' shape.

    `log_probs` and `ref_log_probs` are what policy and reference gave to the sampled tokens; half precision
    is widened to float32. The options, and what each does to the bias and to the gradient:

    - `weights` multiply the estimates, for tokens that another policy sampled (see `importance_weights`): the
      expectation is then the on-policy one. As a loss, weights with a gradient are right for k1 and k3,
      detached ones for k2.
    - `clamp_log_ratio=c` keeps r within ±c (verl and NeMo-RL: 20), so that e^r cannot overflow: k3 of a token at
      r = 30 is 1e13, and so is its gradient; from r = 89 on it is inf in float32.
    - `clamp_value=c` keeps the estimate, before its weight, within ±c (OpenRLHF, verl and NeMo-RL: 10).

    Either clamp moves what is outside towards 0, so the mean is biased (down for k2 and k3, either way for k1);
    and there the estimate's gradient is exactly 0: the tokens furthest from the reference are no longer pulled
    back, except through a weight with a gradient.

    Raises ValueError if shapes differ, the policy's log-probs are not finite (it sampled these tokens), the
    reference's are NaN, a weight is negative or not finite, a clamp is not positive, or the estimator is unknown.
    A token that the reference excludes (-inf) has an infinite estimate.
    """
    _check_options(estimator, clamp_log_ratio=clamp_log_ratio, clamp_value=clamp_value)
    _check_same_tokens(log_probs, ref_log_probs=ref_log_probs, weights=weights)
    log_ratio = _log_ratio(log_probs, ref_log_probs)
    if clamp_log_ratio is not None:
        log_ratio = log_ratio.clamp(-clamp_log_ratio, clamp_log_ratio)
    values = _FORMULAS[estimator](log_ratio)
    if clamp_value is not None:
        # Not `values.clamp`: its zero gradient times the infinite slope of an overflown e^r would be NaN.
        outside = values.detach().abs() > clamp_value
        inside = _FORMULAS[estimator](log_ratio.masked_fill(outside, 0.0))
        values = torch.where(outside, values.detach().clamp(-clamp_value, clamp_value), inside)
    return values if weights is None else _weighted(values, weights)


def importance_weights(log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return policy / behaviour for each token: what makes tokens sampled by `behaviour` stand for the policy's.

    The gradient goes to `log_probs` alone; `.detach()` the result for weights without one. With the policy's own
    log-probs given twice every weight is 1, and only its gradient matters (NeMo-RL's exp(x - x.detach())).
    A token's weight corrects for how that token was sampled, not for its prefix. It is 0 where `mask` is 0.
    Raises ValueError if shapes differ or a weight that counts is NaN or infinite.
    """
    _check_same_tokens(log_probs, behaviour_log_probs=behaviour_log_probs)
    counts = check_mask(log_probs, mask)
    log_weights = widen(log_probs) - widen(behaviour_log_probs).detach()
    weights = torch.where(counts, log_weights, -torch.inf).exp()
    if not bool(torch.isfinite(weights.detach()).all()):
        raise ValueError(
            "an importance weight is NaN or infinite: behaviour_log_probs must come from the policy that sampled "
            "these tokens, and so be finite"
        )
    return weights


def kl_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    estimator: Estimator = "k2",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    weights: Tensor | None = None,
    clamp_log_ratio: float | None = None,
    clamp_value: float | None = None,
) -> Tensor:
    """Return a loss in nats whose gradient, for tokens that the policy sampled, is on average that of a KL.

    Right: k2 as it is, or k1 or k3 with `weights` that carry a gradient (even where every weight is 1).
    Wrong, and widespread (arXiv 2506.09477, 2512.21852): k1 as it is has zero expected gradient; k3 as it is
    follows ∇KL(reference‖policy), the other direction; k2 with weights that carry a gradient follows neither.

    Each position's KL is that of the next token given its prefix: unlike in the reward, no token answers for the
    KL that it causes further on. `mask` (B, T) and `reduction` are `exact_kl`'s, options `estimate_kl`'s; what
    stands where the mask is 0 changes nothing, not even as NaN. Raises ValueError as these do.
    """
    _check_same_tokens(log_probs, ref_log_probs=ref_log_probs, weights=weights)
    estimates = estimate_kl(
        _counted(log_probs, mask),
        _counted(ref_log_probs, mask),
        estimator,
        weights=None if weights is None else _counted(weights, mask),
        clamp_log_ratio=clamp_log_ratio,
        clamp_value=clamp_value,
    )
    return reduce_tokens(estimates, mask, reduction)


def kl_reward(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    estimator: Estimator = "k1",
    mask: Tensor | None = None,
    reduction: Reduction = "none",
    *,
    clamp_log_ratio: float | None = None,
    clamp_value: float | None = None,
) -> Tensor:
    """Return what to subtract from the reward, times beta: nats for each token (B, T), without a gradient.

    Right (arXiv 2512.21852): k1, whose score-function gradient is on average ∇KL(policy‖reference), also over
    whole sequences (`reduction="sequence"` for one penalty each). Wrong: k2 follows neither direction's gradient,
    k3 follows ∇KL(policy‖reference) - ∇KL(reference‖policy), though its *value* is unbiased.

    There are no weights: for tokens of another policy, the loss that the reward goes into has them already.
    `mask` and `reduction` are `exact_kl`'s, the clamps `estimate_kl`'s. Raises ValueError as these do.
    """
    return kl_loss(
        log_probs.detach(),
        ref_log_probs.detach(),
        estimator,
        mask,
        reduction,
        clamp_log_ratio=clamp_log_ratio,
        clamp_value=clamp_value,
    )


# expm1 keeps the digits that e^r - 1 loses where the two models nearly agree.
_FORMULAS = {
    "k1": torch.neg,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: torch.expm1(log_ratio) - log_ratio,
}


def _log_ratio(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    if not bool(torch.isfinite(log_probs.detach()).all()):
        raise ValueError(
            "log_probs has NaN or an infinite entry: the policy sampled these tokens, so it gave each of them some "
            "probability. Is that padding? kl_loss and kl_reward take a mask"
        )
    if not bool((ref_log_probs.detach() < torch.inf).all()):
        raise ValueError("ref_log_probs has NaN or +inf: no estimate can be made of it")
    return widen(ref_log_probs) - widen(log_probs)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    seen = weights.detach()
    if not bool((torch.isfinite(seen) & (seen >= 0)).all()):
        raise ValueError("weights has an entry that is negative, NaN or infinite: see importance_weights")
    weighted = values * weights
    if bool(torch.isnan(weighted.detach()).any()):
        raise ValueError("a weight of 0 meets an infinite estimate: pass clamp_log_ratio")
    return weighted


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    return torch.where(check_mask(values, mask), values, 0.0)


def _check_options(estimator: str, **clamps: float | None) -> None:
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator is {estimator!r}, but must be one of {get_args(Estimator)}")
    for name, clamp in clamps.items():
        if clamp is not None and not clamp > 0:
            raise ValueError(f"{name} is {clamp}, but must be positive: the largest size that is let through")


def _check_same_tokens(log_probs: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.shape != log_probs.shape:
            raise ValueError(
                f"log_probs is {tuple(log_probs.shape)} and {name} is {tuple(other.shape)}: "
                "both must be about the same tokens"
            )
