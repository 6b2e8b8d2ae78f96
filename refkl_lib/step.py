"""The training step that the whole kit measures: next-token loss plus a KL penalty."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from refkl_lib.kl.exact import exact_kl
from refkl_lib.reference.base import Reference


def policy_loss(
    policy: nn.Module, reference: Reference, batch: dict[str, Any], beta: float
) -> tuple[Tensor, Tensor]:
    """Return (loss, kl) as scalars: loss = cross-entropy of the next token + beta·KL(policy‖reference).

    `batch` holds input_ids and attention_mask (B, T); the KL is in nats per counted token. The policy may
    be any callable module, a DeepSpeed engine too.
    """
    mask = batch["attention_mask"]
    logits = policy(**{"use_cache": False} | batch).logits
    kl = exact_kl(logits, reference.logits(**batch), mask)
    targets = batch["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
    cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
    return cross_entropy + beta * kl, kl
