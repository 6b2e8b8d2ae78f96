"""Optimizers as far as memory goes: what they keep for each weight, and what a step makes on the way."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerName = Literal["adamw", "adamw8bit", "sgd"]
_LEARNING_RATE = 1e-5
# bitsandbytes 0.45: a scale for each block of 256, and weights below 4,096 elements in full precision.
BLOCK, _TOO_SMALL = 256, 4096


class Training:
    """What changes the weights: an optimizer and, `masters` given, a float32 copy of each weight that it works on.

    With masters a weight of half precision gets its gradient widened when its turn comes, one after the other, and
    then the rounded result (arXiv 1710.03740).
    """

    def __init__(self, name: OptimizerName, weights: Iterable[nn.Parameter], fused: bool, masters: bool) -> None:
        self.weights = list(weights)
        self.name, self.fused = name, fused
        halves = [weight for weight in self.weights if masters and weight.dtype.itemsize < 4]
        self.masters = [(weight, nn.Parameter(weight.detach().float())) for weight in halves]
        ids = {id(weight) for weight in halves}
        wide = [weight for weight in self.weights if id(weight) not in ids]
        self._optimizers = [self._make([master]) for _, master in self.masters] + ([self._make(wide)] if wide else [])

    def held(self) -> list[Tensor]:
        """Return what is kept from step to step."""
        states = [state for optimizer in self._optimizers for state in optimizer.state.values()]
        return [*(master for _, master in self.masters), *(t for s in states for t in s.values())]

    @torch.no_grad()
    def step(self) -> None:
        """Take a step with the gradients that are there."""
        for (weight, master), optimizer in zip(self.masters, self._optimizers, strict=False):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            optimizer.step()
            master.grad = None
            weight.copy_(master)
        for optimizer in self._optimizers[len(self.masters) :]:
            optimizer.step()

    def zero_grad(self) -> None:
        """Let the gradients go."""
        for weight in self.weights:
            weight.grad = None

    def warm_up(self) -> None:
        """Take a step of nothing, so that what is kept from step to step is there."""
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self.step()
        self.zero_grad()

    def _make(self, weights: list[nn.Parameter]) -> Optimizer:
        if self.name == "adamw8bit":
            return StatesOnly(weights, _moments_8bit)
        if self.name == "sgd":
            return torch.optim.SGD(weights, lr=_LEARNING_RATE)
        if self.fused:
            return StatesOnly(weights, _moments)
        return torch.optim.AdamW(weights, lr=_LEARNING_RATE)


class StatesOnly(Optimizer):
    """An optimizer whose step is one kernel, which makes nothing but its states; the numbers stay as they are."""

    def __init__(self, weights: list[nn.Parameter], states: Callable[[Tensor], Mapping[str, Tensor]]) -> None:
        self._states = states
        super().__init__(weights, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make the states of weights that have a gradient, the first time."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight not in self.state:
                    self.state[weight] = dict(self._states(weight))


def _moments(weight: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=weight.device)
    return {"step": step, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}


def _moments_8bit(weight: Tensor) -> dict[str, Tensor]:
    if weight.numel() < _TOO_SMALL:
        return {name: torch.zeros_like(weight, dtype=torch.float32) for name in ("state1", "state2")}
    blocks = -(-weight.numel() // BLOCK)
    scales = {f"absmax{n}": torch.zeros(blocks, dtype=torch.float32, device=weight.device) for n in (1, 2)}
    return scales | {f"state{n}": torch.zeros_like(weight, dtype=torch.uint8) for n in (1, 2)}


OPTIMIZERS = get_args(OptimizerName)
