"""The training step that the whole kit measures: next-token loss plus a KL penalty."""

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refkl_lib.kl.divergence import GivesLogits
from refkl_lib.kl.exact import exact_kl


def policy_loss(policy: nn.Module, reference: GivesLogits, batch: dict[str, Any], beta: float) -> tuple[Tensor, Tensor]:
    """Return (loss, kl) as scalars: loss = cross-entropy of the next token + beta·KL(policy‖reference).

    `batch` holds input_ids and attention_mask (B, T); the KL is in nats per counted token. The policy may
    be any callable module, a DeepSpeed engine too.
    """
    mask = batch["attention_mask"]
    # The reference first: it may be the policy's own layers, and under ZeRO-3 a pass through them between a forward
    # and its backward leaves DeepSpeed's count of what to release wrong: the backward gathers the whole model.
    reference_logits = reference.logits(**batch)
    logits = policy(**{"use_cache": False} | batch).logits
    kl = exact_kl(logits, reference_logits, mask)
    targets = batch["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
    cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
    return cross_entropy + beta * kl, kl


class TimedReference:
    """A reference that notes how many seconds each of its passes took."""

    def __init__(self, reference: GivesLogits) -> None:
        self.reference = reference
        self.seconds: list[float] = []

    def logits(self, **inputs: Any) -> Tensor:
        """Return the reference's logits, and note the time until they are there."""
        started = time.perf_counter()
        logits = self.reference.logits(**inputs)
        if logits.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        return logits
