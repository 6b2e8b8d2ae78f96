"""What every reference can do, however it is kept.

A reference answers one question: what would the model have said before training? A strategy only says
where that model is (`as_reference`); the pass itself is the same for all and written here once.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from refkl_lib.kl.log_probs import token_log_probs
from refkl_lib.tensors import storage_bytes


class Reference(ABC):
    """A frozen model beside a policy that trains."""

    strategy: ClassVar[str]
    # Whether it is a model, with logits to compare; one that only knows log-probs allows estimates of the KL alone.
    has_logits: ClassVar[bool] = True
    # Whether the head of the model that a pass gives is still the reference's after the pass.
    keeps_head: ClassVar[bool] = True

    @abstractmethod
    def as_reference(self) -> AbstractContextManager[nn.Module]:
        """Enter a block in which the module it gives is the reference, in evaluation mode.

        On leaving the block, also by an exception, the policy is as it was before.
        """

    @abstractmethod
    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Yield the reference's parameters and buffers, whole, named as in the original model."""

    @abstractmethod
    def held(self) -> nn.Module | list[Tensor]:
        """Return what this reference keeps beside the policy (on this rank)."""

    def owned_bytes(self) -> int:
        """Return the bytes of storage this reference adds beyond the policy's (on this rank)."""
        return storage_bytes(self.held())

    @abstractmethod
    def sync(self, policy: nn.Module, alpha: float = 1.0) -> None:
        """Move the reference towards the policy: ref ← (1 - alpha)·ref + alpha·policy.

        Raises ValueError if alpha is not in [0, 1], or if this strategy cannot follow a policy.
        """

    @torch.no_grad()
    def logits(self, **inputs: Any) -> Tensor:
        """Return the reference's logits (B, T, V); they carry no gradient, whatever the inputs do."""
        with self.as_reference() as model:
            return model(**{"use_cache": False} | inputs).logits

    def log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the log-prob of each next token, (B, T-1), in float32; padding is not removed."""
        logits = self.logits(input_ids=input_ids, attention_mask=attention_mask)
        return token_log_probs(logits[:, :-1], input_ids[:, 1:])

    def fingerprint(self) -> str:
        """Return the `fingerprint_of` this reference's weights.

        References kept in different ways have the same fingerprint if they hold the same model.
        """
        return fingerprint_of(self.named_weights())


def fingerprint_of(named_weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 over the names, shapes, dtypes and bytes of weights, in their order."""
    digest = hashlib.sha256()
    for name, weight in named_weights:
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put every submodule in evaluation mode for a block; each gets its own mode back afterwards."""
    # Not model.eval() and model.train(): some submodules may have been in evaluation mode on purpose.
    were_training = [module for module in model.modules() if module.training]
    for module in were_training:
        module.training = False
    try:
        yield model
    finally:
        for module in were_training:
            module.training = True
