"""What an iteration is remembered by."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from refkl_lib.kl.exact import exact_kl


@dataclass(frozen=True)
class Record:
    """What an iteration saw before its step: means over its texts, and one of them.

    `kl` is the exact KL(policy‖reference) in nats a text, whatever the loss has; `entropy` is in nats a token.
    """

    iteration: int
    beta: float
    reward: float
    kl: float
    entropy: float
    loss: float
    sample: str


@torch.no_grad()
def kl_and_entropy(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> tuple[float, float]:
    """Return the KL in nats a text and the entropy in nats a token, of logits (B, L, V) where `mask` (B, L) is 1.

    The entropy is log V - KL(policy‖uniform).
    """
    uniform = logits.new_zeros(1).expand_as(logits)
    kl = exact_kl(logits, ref_logits, mask, "sequence").mean()
    return kl.item(), math.log(logits.shape[-1]) - exact_kl(logits, uniform, mask).item()
