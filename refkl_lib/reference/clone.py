"""Clone: a second model, frozen.

The simplest way to keep a reference: copy the policy before training and never touch the copy again.
It costs the weights a second time, less whatever layers the two models share.

    reference = CloneReference(policy)
    reference.logits(**batch)            # (B, T, V), no gradient
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch import Tensor, nn

from refkl_lib.reference.base import Reference, evaluating
from refkl_lib.reference.mix import mix_weights
from refkl_lib.tensors import is_partitioned, storage_bytes


class CloneReference(Reference):
    """A deep copy of the policy. Takes and raises what `create_reference_model` does."""

    strategy = "clone"

    def __init__(self, policy: nn.Module, num_shared_layers: int = 0) -> None:
        self.policy = policy
        self.model = create_reference_model(policy, num_shared_layers)

    def as_reference(self) -> AbstractContextManager[nn.Module]:
        """Give the copy; the policy takes no part."""
        return evaluating(self.model)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the copy's parameters and buffers."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def held(self) -> nn.Module:
        """Return the copy."""
        return self.model

    def owned_bytes(self) -> int:
        """Return the bytes of the copy, without the storages it shares with the policy."""
        return storage_bytes(self.model, beyond=self.policy)

    def sync(self, policy: nn.Module, alpha: float = 1.0) -> None:
        """Move every weight towards the policy's; layers that are shared are the policy's already."""
        mix_weights(self.model, policy, alpha)


def create_reference_model(model: nn.Module, num_shared_layers: int = 0) -> nn.Module:
    """Return a frozen copy of `model` in evaluation mode: deepcopy, `requires_grad_(False)`, `eval()`.

    With `num_shared_layers` = n > 0 the embeddings and the first n layers are not copied: both models
    hold the same parameters, which are frozen *in the policy too*, as a shared layer that trained would
    move the reference. If the output head is tied to the embeddings, as in SmolLM2, it is that same
    storage and so frozen with them. The idea and the name are TRL's.

    Raises ValueError if `model` is partitioned by ZeRO-3, or has fewer than `num_shared_layers` layers.
    """
    if is_partitioned(model):
        raise ValueError(
            "this model is partitioned by DeepSpeed ZeRO-3: its parameters are empty outside of a "
            "forward pass, so a deep copy would be a copy of nothing. Load the checkpoint again with "
            'create_reference(policy, "zero3", source=…), or use an adapter: '
            'create_reference(policy, "adapter")'
        )
    shared = _shared_weights(model, num_shared_layers)
    # deepcopy takes what it finds in its memo for copied already: shared weights are never doubled,
    # not even for a moment.
    reference = copy.deepcopy(model, memo={id(weight): weight for weight in shared})
    return reference.requires_grad_(False).eval()


def _shared_weights(model: nn.Module, num_shared_layers: int) -> list[Tensor]:
    if num_shared_layers == 0:
        return []
    layers = _layers(model)
    if not 0 < num_shared_layers <= len(layers):
        raise ValueError(
            f"num_shared_layers is {num_shared_layers}, but this model has {len(layers)} layers: "
            f"choose 0 (share nothing) to {len(layers)}"
        )
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    shared = [embeddings, *layers[:num_shared_layers]]
    return [weight for module in shared for weight in module.parameters()]


def _layers(model: nn.Module) -> nn.ModuleList:
    """Return the stack of transformer layers: the longest ModuleList of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())
