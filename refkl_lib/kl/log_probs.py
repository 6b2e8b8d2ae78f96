"""The log-probability that a model gave to tokens that are known."""

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-prob of each given token: logits (…, V), token_ids (…) -> (…).

    The result is float32 (float64 for float64 logits): the logits are widened before the sum over the
    vocabulary. Raises ValueError if the shapes do not match.
    """
    if logits.shape[:-1] != token_ids.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} need token_ids of shape "
            f"{tuple(logits.shape[:-1])}, not {tuple(token_ids.shape)}; "
            "for next-token log-probs pass logits[:, :-1] and token_ids[:, 1:]"
        )
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    chosen = wide.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - wide.logsumexp(-1)
