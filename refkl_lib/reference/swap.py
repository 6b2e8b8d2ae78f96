"""Swap: one model's room on the GPU, two models' weights.

The reference's weights wait in host memory. For a pass the policy's weights are saved beside them, the reference's
take their place, and afterwards the policy's come back. It is for policies that train all their weights, where there
is no adapter to switch off: the GPU holds one model, and a pass pays with three copies of the weights over the bus.

    reference = SwapReference(policy)
    reference.logits(**batch)            # (B, T, V), no gradient

NeMo-RL (`use_reference_model`) and NeMo-Aligner (`cpu_weight_swap`) keep their references like this. slime's actor
switches to "ref" and back (`_switch_model`) without a `finally`: after an exception in between, the reference's weights
are in the policy.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from refkl_lib.reference.base import Reference, evaluating
from refkl_lib.reference.mix import mix_weights
from refkl_lib.tensors import is_partitioned, storages_of


class SwapReference(Reference):
    """The policy's own modules, with the weights that it had when this reference was made.

    `owned_bytes` are in host memory, pinned if the policy is on a GPU (where PyTorch rounds each block up to a power of
    two); in a pass as much again holds the policy's weights there. On the GPU there is nothing more, but where a KL is
    made of hidden states: that copies the head while it is there.
    Raises ValueError if `policy` has an adapter, or is partitioned by ZeRO-3.
    """

    strategy = "swap"
    keeps_head = False

    def __init__(self, policy: nn.Module) -> None:
        _check_whole(policy)
        self.policy = policy
        self.waiting = [_to_host(weights) for weights in _storages(policy)]

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """Exchange the weights, give the policy, and exchange them back, bit for bit.

        Raises ValueError if the policy's weights are not those it had when this reference was made: a new adapter, say.
        """
        places = self._places()
        policys = [_to_host(weights) for weights in places]
        try:
            _fill(places, self.waiting)
            with evaluating(self.policy):
                yield self.policy
        finally:
            _fill_at_any_cost(places, policys)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that wait, named and shaped as in the policy."""
        places = [place.untyped_storage()._cdata for place in self._places()]
        waiting = dict(zip(places, self.waiting, strict=True))
        for name, weight in (*self.policy.named_parameters(), *self.policy.named_buffers()):
            yield name, _like(weight, waiting[weight.untyped_storage()._cdata])

    def held(self) -> list[Tensor]:
        """Return the weights that wait, each storage as its bytes."""
        return self.waiting

    def sync(self, policy: nn.Module, alpha: float = 1.0) -> None:
        """Move every weight that waits towards the policy's."""
        mix_weights(self.named_weights(), policy, alpha)

    def _places(self) -> list[Tensor]:
        places = _storages(self.policy)
        _check_same(places, self.waiting)
        return places


def _storages(model: nn.Module) -> list[Tensor]:
    """Return the bytes of a model's parameters and buffers; what is tied is one storage, and there once."""
    # Written to through these, a weight keeps its version: autograd, which may have a graph waiting for its backward
    # pass, is to see no change, as there will be none.
    storages = storages_of(model).values()
    return [torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage) for storage in storages]


def _to_host(weights: Tensor) -> Tensor:
    host = "meta" if weights.is_meta else "cpu"
    return torch.empty_like(weights, device=host, pin_memory=weights.is_cuda).copy_(weights)


def _like(weight: Tensor, storage: Tensor) -> Tensor:
    """Return what `weight` is of its own storage, of another one."""
    view = torch.empty(0, dtype=weight.dtype, device=storage.device)
    return view.set_(storage.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())


def _fill(places: list[Tensor], weights: list[Tensor]) -> None:
    for place, values in zip(places, weights, strict=True):
        place.copy_(values)


def _fill_at_any_cost(places: list[Tensor], weights: list[Tensor]) -> None:
    try:
        _fill(places, weights)
    except BaseException:  # Ctrl-C in the middle: all that was saved is still there, so begin again
        _fill(places, weights)
        raise


def _check_whole(policy: nn.Module) -> None:
    if is_partitioned(policy):
        raise ValueError(
            "this policy is partitioned by DeepSpeed ZeRO-3: outside of a forward pass there are no weights to "
            'exchange. Load the checkpoint again with create_reference(policy, "zero3", source=…, offload="cpu")'
        )
    if hasattr(policy, "peft_config"):
        raise ValueError(
            "this policy has an adapter, and with that off it is the reference already, without a copy: use "
            'create_reference(policy, "adapter"). A swap is for a policy that trains all its weights'
        )


def _check_same(places: list[Tensor], waiting: list[Tensor]) -> None:
    ours, theirs = ([weights.numel() for weights in held] for held in (waiting, places))
    if ours != theirs:
        raise ValueError(
            f"the policy has {len(theirs)} storages with {sum(theirs):,} bytes in all, but had {len(ours)} with "
            f"{sum(ours):,} when this reference was made, so the two cannot change places: make the reference when no "
            "more layers of the policy will change"
        )
