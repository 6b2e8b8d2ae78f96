"""A few real training steps, for tests of what they leave behind."""

from functools import cache
from typing import Any

import torch
from torch import nn

from refkl_lib import add_lora, create_reference, load_model, policy_loss
from refkl_lib.reference import Reference
from refkl_lib.text import sample_batch


def train(
    policy: nn.Module, reference: Reference, batch: dict[str, Any], steps: int = 1, learning_rate: float = 1e-2
) -> list[float]:
    """Train what requires grad with AdamW and a KL penalty; return the KL before each step."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    kls = []
    for _ in range(steps):
        loss, kl = policy_loss(policy, reference, batch, beta=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kls.append(kl.item())
    return kls


@cache
def kl_of_one_process(steps: int, lora_rank: int | None, batch: int, seq: int) -> list[float]:
    """The KL of a job of `launch_zero3` with the pocket model, trained here beside a clone."""
    policy = load_model("pocket", device="cpu")
    reference = create_reference(policy, "clone")
    if lora_rank is not None:
        torch.manual_seed(0)
        policy = add_lora(policy, lora_rank)
    return train(policy, reference, sample_batch("pocket", batch, seq), steps, learning_rate=1e-3)
