"""The training step that the whole kit measures: next-token loss plus a KL penalty."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refkl_lib.kl.divergence import (
    GivesLogits,
    Pass,
    WholeLogitsError,
    hidden_states,
    kl_of_passes,
    policy_states,
)
from refkl_lib.kl.estimators import kl_loss
from refkl_lib.kl.exact import exact_kl
from refkl_lib.kl.head import HeadOutput
from refkl_lib.kl.linear_log_probs import linear_token_log_probs
from refkl_lib.kl.log_probs import token_log_probs
from refkl_lib.kl.reduce import masked_mean
from refkl_lib.reference.base import Reference

KLFrom = Literal["full", "linear"]


def policy_loss(
    policy: nn.Module,
    reference: GivesLogits,
    batch: dict[str, Any],
    beta: float,
    kl: KLFrom = "full",
) -> tuple[Tensor, Tensor]:
    """Return (loss, kl) as scalars: loss = cross-entropy of the next token + beta·KL(policy‖reference).

    `batch` holds input_ids and attention_mask (B, T); the KL is in nats per counted token. With `kl="full"` both
    models give logits (B, T, V), and the policy may be any callable module, a DeepSpeed engine too. With
    `kl="linear"` loss and KL are those same numbers, but from hidden states, a few tokens' logits at a time.

    Of a reference that knows log-probs alone (`has_logits` is False), the KL is the estimate whose gradient is right
    as it is, k2 (`kl_loss`), of the batch's own tokens. If the policy did not sample these, it is not the KL, but
    still 0 where the two models agree and a pull back where they do not.
    Raises ValueError if `kl` is neither, or is "linear" and a head is more than a linear layer on this device
    (`hidden_states`), if beta is negative or not finite, or if no token that counts is there to be predicted.
    """
    _check(kl, batch)
    checked_beta(beta)
    if not getattr(reference, "has_logits", True):
        return _from_log_probs(policy, reference, batch, beta, kl)
    if kl == "full":
        return _from_logits(policy, reference, batch, beta)
    with _whole_logits_as_way_out():
        return _from_hidden_states(policy, reference, batch, beta)


def next_token_loss(policy: nn.Module, batch: dict[str, Any], kl: KLFrom = "full") -> Tensor:
    """Return the loss of `policy_loss` for beta = 0, for which no reference is asked; raises as that does."""
    _check(kl, batch)
    if kl == "full":
        return _cross_entropy(policy(**{"use_cache": False} | batch).logits, batch)
    with _whole_logits_as_way_out():
        return _linear_cross_entropy(*policy_states(policy, batch), batch)


def checked_beta(beta: float) -> float:
    """Return beta. Raises ValueError unless it is a finite number, 0 or more."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta is {beta}, but must be 0 (no leash) or more, and finite: the price of a nat")
    return beta


def _check(kl: str, batch: dict[str, Any]) -> None:
    if kl not in get_args(KLFrom):
        raise ValueError(f'kl is {kl!r}, but must be "full" (from all logits) or "linear" (from hidden states)')
    mask = batch["attention_mask"]
    if not bool(mask[:, 1:].any()):
        raise ValueError(
            f"in a batch of shape {tuple(mask.shape)} no token after the first counts, so there is none to predict: "
            "give sequences of two tokens or more, and a mask that is 1 where a token counts"
        )


@contextmanager
def _whole_logits_as_way_out() -> Iterator[None]:
    """Let the error of a block that wants hidden states say what to do without them."""
    try:
        yield
    except WholeLogitsError as obstacle:
        raise WholeLogitsError(f'kl="linear" cannot be had here, use kl="full": {obstacle}') from obstacle


def _from_logits(
    policy: nn.Module, reference: GivesLogits, batch: dict[str, Any], beta: float
) -> tuple[Tensor, Tensor]:
    # The reference first: it may be the policy's own layers, and under ZeRO-3 a pass through them between a forward
    # and its backward leaves DeepSpeed's count of what to release wrong: the backward gathers the whole model.
    reference_logits = reference.logits(**batch)
    logits = policy(**{"use_cache": False} | batch).logits
    kl = exact_kl(logits, reference_logits, batch["attention_mask"])
    return _cross_entropy(logits, batch) + beta * kl, kl


def _from_hidden_states(
    policy: nn.Module, reference: GivesLogits, batch: dict[str, Any], beta: float
) -> tuple[Tensor, Tensor]:
    p, q, output = hidden_states(policy, reference, batch)
    kl = kl_of_passes(p, q, output, batch["attention_mask"])
    return _linear_cross_entropy(p, output, batch) + beta * kl, kl


def _from_log_probs(
    policy: nn.Module, reference: Any, batch: dict[str, Any], beta: float, kl_from: KLFrom
) -> tuple[Tensor, Tensor]:
    mask = batch["attention_mask"]
    ref_log_probs = reference.log_probs(input_ids=batch["input_ids"], attention_mask=mask)
    log_probs = _next_token_log_probs(policy, batch, kl_from)
    kl = kl_loss(log_probs, ref_log_probs, "k2", mask[:, 1:] * mask[:, :-1])
    return beta * kl - masked_mean(log_probs, mask[:, 1:]), kl


def _next_token_log_probs(policy: nn.Module, batch: dict[str, Any], kl_from: KLFrom) -> Tensor:
    if kl_from == "full":
        logits = policy(**{"use_cache": False} | batch).logits
        return token_log_probs(logits[:, :-1], batch["input_ids"][:, 1:])
    with _whole_logits_as_way_out():
        return _linear_log_probs(*policy_states(policy, batch), batch)


def _cross_entropy(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def _linear_cross_entropy(p: Pass, output: HeadOutput, batch: dict[str, Any]) -> Tensor:
    return -masked_mean(_linear_log_probs(p, output, batch), batch["attention_mask"][:, 1:])


def _linear_log_probs(p: Pass, output: HeadOutput, batch: dict[str, Any]) -> Tensor:
    ids = batch["input_ids"][:, 1:]
    return linear_token_log_probs(p.hidden[:, :-1], p.head, ids, scale=output.scale, softcap=output.softcap)


class TimedReference:
    """A reference that notes how many seconds each of its passes took."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.has_logits = reference.has_logits
        self.seconds: list[float] = []

    def logits(self, **inputs: Any) -> Tensor:
        """Return the reference's logits, and note the time until they are there."""
        return self._timed(self.reference.logits, inputs)

    def log_probs(self, **inputs: Any) -> Tensor:
        """Return the reference's log-probs, and note the time until they are there."""
        return self._timed(self.reference.log_probs, inputs)

    def _timed(self, ask: Callable[..., Tensor], inputs: dict[str, Any]) -> Tensor:
        started = time.perf_counter()
        answer = ask(**inputs)
        if answer.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        return answer
