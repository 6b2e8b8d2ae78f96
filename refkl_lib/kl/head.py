"""Heads: the linear layer from hidden states to the vocabulary, and what becomes of its output."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refkl_lib.kl.chunks import widened


@dataclass(frozen=True)
class HeadOutput:
    """What becomes of a head's output x: softcap·tanh(scale·x / softcap) / temperature; without a softcap, no tanh."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}, but it must be a number above 0")

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits, in the dtype of `x`."""
        if self.scale != 1:
            x = x * self.scale
        if self.softcap is not None:
            x = self.softcap * torch.tanh(x / self.softcap)
        return x if self.temperature == 1 else x / self.temperature

    def derivative(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of the logits by `x`."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        tanh = logits.to(widened(logits.dtype)) * (self.temperature / self.softcap)
        return (1 - tanh.square_()).mul_(factor)


def autograd_inputs(hidden: Tensor, head: nn.Linear) -> tuple[Tensor | None, ...]:
    """Return hidden states, weight and bias as a Function wants them."""
    inputs: tuple[Tensor | None, ...] = (hidden, head.weight, head.bias)
    if torch.is_grad_enabled():
        return inputs
    # A Function is told what requires a gradient, but not whether one is wanted.
    return tuple(tensor if tensor is None else tensor.detach() for tensor in inputs)


def check_head(name: str, hidden: Tensor, head: nn.Linear) -> None:
    """Raise TypeError if the head is no nn.Linear, ValueError if it does not fit the hidden states."""
    name = name and f"{name}_"
    if type(head) is not nn.Linear:
        raise TypeError(
            f"{name}head is a {type(head).__name__}, but must be a plain nn.Linear: what another module does to its "
            "input cannot be known. Compute its logits and use exact_kl or token_log_probs"
        )
    if head.weight.shape != (head.out_features, hidden.shape[-1]):
        raise ValueError(
            f"{name}hidden is {tuple(hidden.shape)}, and the weight of {name}head {tuple(head.weight.shape)}: "
            "it must be (vocabulary, hidden size). Under ZeRO-3 it is empty outside of a forward pass"
        )


def check_batch(name: str, hidden: Tensor) -> None:
    """Raise ValueError if hidden states are not (B, T, H)."""
    if hidden.dim() != 3:
        raise ValueError(f"hidden states must be (B, T, H), but {name} is {tuple(hidden.shape)}")
