"""What an exercise is made of: an idea, functions and tensors. `check.py` does the rest.

A named mistake is a function like any other: what it computes is how it is recognised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]  # a learner's: it returns a tensor, or what an `ask` asks about


class WrongFormError(Exception):
    """Raised by an `ask`: what is wrong with what the learner's function returned, as a sentence."""


class Text(str):
    """A text that shows itself, unquoted, as the last line of a cell."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Case:
    """Arguments, and what to say of them. `want` is the answer found by hand; None asks the oracle."""

    label: str  # ends "On …, your answer is …"
    args: tuple[Any, ...]
    want: Tensor | None = None
    rtol: float = 1e-4
    atol: float = 1e-6


@dataclass(frozen=True)
class Mistake:
    """A wrong function that people write, what it is, and the line (1, 2, 3) of the idea that it misses."""

    line: int
    says: str  # ends "This looks like …"
    function: Function


@dataclass(frozen=True)
class Exercise:
    """One function to write.

    Answers have the dtype and the device of the first argument. That is also the argument that has a gradient when
    the function is asked for one: `keeps_gradient` says whether it must reach it, as the oracle's does, or must not.

    A function of models, which returns no tensor of numbers to compare, is asked by `ask(function, *args)`: it builds
    what the function needs, calls it, and returns a tensor of 1s and 0s, which of `facts` hold. The oracle then gives
    that tensor of args alone. An `ask` raises WrongFormError for a wrong type. One without `facts` returns numbers.
    """

    id: str  # the notebook's number, a dot, a name
    idea: tuple[str, str, str]
    solution: Function  # its source is shown, so its comments say why
    oracle: Callable[..., Tensor]  # right by other means, in float64 if rounding matters
    draw: Callable[[torch.Generator], tuple[Any, ...]]  # random arguments
    by_hand: Case
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]  # from a question to nearly the code
    hard: tuple[Case, ...] = ()  # where a formula that is right on paper breaks
    keeps_gradient: bool = True
    ask: Callable[..., Tensor] | None = None
    facts: tuple[str, ...] = ()  # each says what must be so: "the copy is in evaluation mode"
    imports: str = "import torch\nfrom torch import Tensor"  # what the solution needs
