"""Mixing: how weights move from one model to another."""

import torch
from torch import Tensor, nn


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless alpha is in [0, 1]."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(
            f"alpha is {alpha}, but it is the policy's share in the new reference: "
            "0 (keep the reference) to 1 (copy the policy)"
        )


@torch.no_grad()
def mix_weights(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """Set every weight of `reference` to (1 - alpha)·reference + alpha·policy, in place.

    Parameters and buffers take part; a buffer that is not floating point (a counter) is copied.
    Raises ValueError if alpha is not in [0, 1] or the two models do not have the same weights.
    """
    check_alpha(alpha)
    ours, theirs = _weights(reference), _weights(policy)
    _check_same(ours, theirs)
    for name, weight in ours.items():
        source = theirs[name].to(weight.device, weight.dtype)
        if weight.is_floating_point():
            weight.lerp_(source, alpha)
        else:
            weight.copy_(source)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _check_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    differing = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]
    if differing:
        raise ValueError(
            f"the policy and the reference are not the same model: they differ in {differing[0]!r} "
            f"({len(differing)} weights in all). Sync a policy only into a reference made from it"
        )
