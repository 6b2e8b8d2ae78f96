"""A few real training steps, for tests of what they leave behind."""

from typing import Any

import torch
from torch import nn

from refkl_lib import policy_loss
from refkl_lib.reference import Reference


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
