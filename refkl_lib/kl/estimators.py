"""Estimators: the KL from the sampled tokens alone, without the rest of the vocabulary.

With the log-ratio r = log ref - log policy of a token that the *policy* sampled (Schulman, "Approximating KL
divergence"):

    k1 = -r              unbiased; negative for single tokens; high variance
    k2 = r² / 2          biased; never negative
    k3 = e^r - 1 - r     unbiased; never negative; low variance
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def estimate_kl(log_probs: Tensor, ref_log_probs: Tensor, estimator: Estimator = "k3") -> Tensor:
    """Return each token's estimate of KL(policy‖reference) in nats, of the inputs' shape.

    `log_probs` and `ref_log_probs` are what policy and reference gave to tokens that the policy sampled.
    A value is not a gradient: the mean of k1 as a loss, for one, has zero expected gradient.
    Raises ValueError if the shapes differ, an entry is NaN, or the estimator is unknown.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator is {estimator!r}, but must be one of {get_args(Estimator)}")
    if log_probs.shape != ref_log_probs.shape:
        raise ValueError(
            f"log_probs is {tuple(log_probs.shape)} and ref_log_probs is {tuple(ref_log_probs.shape)}: "
            "both must be about the same tokens"
        )
    log_ratio = _widen(ref_log_probs) - _widen(log_probs)
    if bool(torch.isnan(log_ratio.detach()).any()):
        raise ValueError("NaN in the log-probs (or -inf in both): no estimate can be made of it")
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    # expm1 keeps the digits that e^r - 1 loses where the two models nearly agree.
    return torch.expm1(log_ratio) - log_ratio


def _widen(log_probs: Tensor) -> Tensor:
    return log_probs if log_probs.dtype == torch.float64 else log_probs.float()
