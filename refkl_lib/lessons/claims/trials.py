"""What claims are tried on: the pocket model, a batch, a few steps of training, and jobs of real ranks."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from refkl_lib.kl.divergence import GivesLogits
from refkl_lib.kl.exact import exact_kl
from refkl_lib.models import load_model
from refkl_lib.ranks.copies import Copied, CopyOutcome, copy_under_zero3
from refkl_lib.ranks.launch import ZeRO3Run, launch_zero3
from refkl_lib.reference import create_reference
from refkl_lib.reference.adapter import add_lora
from refkl_lib.step import next_token_loss, policy_loss
from refkl_lib.text import sample_batch


@cache
def job(ranks: int, **options: Any) -> ZeRO3Run:
    """Return `launch_zero3` of the pocket model, two steps; each job is run once in a session, whoever asks for it."""
    return launch_zero3(ranks, "pocket", **{"steps": 2} | options)


@cache
def copied(what: Copied, gathered: bool = False) -> CopyOutcome:
    """Return `copy_under_zero3` on two ranks; each is run once in a session."""
    return copy_under_zero3(what, gathered=gathered)


def small_batch() -> dict[str, Tensor]:
    """Return 64 tokens of real text for the pocket model."""
    return sample_batch("pocket", batch=1, seq=64)


def small_lora(base: Any = None, **options: Any) -> Any:
    """Return a model, the pocket model if none is given, with a LoRA adapter that is always the same."""
    base = base or load_model("pocket", device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return add_lora(base, rank=4, **options)


def train(
    policy: nn.Module,
    reference: GivesLogits | None = None,
    *,
    beta: float = 0.0,
    learning_rate: float = 1e-2,
    after_step: Callable[[], None] = lambda: None,
) -> Any:
    """Train what is trainable in a policy for six steps on `small_batch`, and return it."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for _ in range(6):
        if reference is None:
            loss = next_token_loss(policy, small_batch())
        else:
            loss, _kl = policy_loss(policy, reference, small_batch(), beta)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return policy


def drifted() -> tuple[Tensor, Tensor]:
    """Return logits (1, T, V) of a policy that drifted, with a gradient, and of its reference."""
    policy = small_lora()
    reference = create_reference(policy, "adapter")
    train(policy)
    return policy(**small_batch(), use_cache=False).logits, reference.logits(**small_batch())


def adapter_off(policy: Any) -> Tensor:
    """Return the logits with the adapter off, by PEFT alone: nothing is asked about whether they are a reference's."""
    with torch.no_grad(), policy.disable_adapter():
        return policy(**small_batch(), use_cache=False).logits


def kl(p: Tensor, q: Tensor) -> float:
    """Return KL(p‖q) in nats per token."""
    return exact_kl(p.detach(), q.detach()).item()
