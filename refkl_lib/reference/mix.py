"""Mixing: how weights move from one model to another."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

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
def mix_weights(
    reference: nn.Module | Iterable[tuple[str, Tensor]],
    policy: nn.Module,
    alpha: float,
    whole: Callable[[Tensor, Tensor], AbstractContextManager] = lambda *_: nullcontext(),
) -> None:
    """Set every weight of `reference` to (1 - alpha)·reference + alpha·policy, in place.

    Parameters and buffers take part; a buffer that is not floating point (a counter) is copied. `reference` is a
    model, or the named weights of one. `whole` is entered for each pair of weights: where models are partitioned, it
    gathers the two.
    Raises ValueError if alpha is not in [0, 1] or the two models do not have the same weights.
    """
    check_alpha(alpha)
    ours, theirs = _weights(reference), _weights(policy)
    _check_same_model(ours, theirs)
    for name, weight in ours.items():
        with whole(weight, theirs[name]):
            _move(weight, theirs[name].to(weight.device, weight.dtype), alpha)


def _move(weight: Tensor, towards: Tensor, alpha: float) -> None:
    if weight.is_floating_point():
        weight.lerp_(towards, alpha)
    else:
        weight.copy_(towards)


def _weights(model: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        return dict(model)
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _check_same_model(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    shapes = [{(name, _shape(weight)) for name, weight in weights.items()} for weights in (ours, theirs)]
    differing = sorted({name for name, _ in shapes[0] ^ shapes[1]})
    if differing:
        raise ValueError(
            f"the policy and the reference are not the same model: they differ in {differing[0]!r} "
            f"({len(differing)} weights in all). Sync a policy only into a reference made from it; merge "
            "an adapter first"
        )


def _shape(weight: Tensor) -> torch.Size:
    # A ZeRO-3 partition is empty; DeepSpeed keeps the shape of the whole as `ds_shape`.
    return getattr(weight, "ds_shape", weight.shape)
