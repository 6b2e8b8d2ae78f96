"""The exercises of notebook 06: a bill by hand, the largest model that fits, and a rule that misleads."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from refkl_lib.lessons.exercise import Case, Exercise, Mistake, WrongFormError


# ---------------------------------------------------------------------------------------------- 06.hand
def held_bytes(frozen: int, trained: int, cloned: int) -> int:
    """Return the bytes that so many frozen, trained and cloned weights hold between two steps of AdamW."""
    # Of a weight that trains: itself and its gradient in bf16, its master and two moments in float32.
    return 2 * frozen + (2 + 2 + 4 + 8) * trained + 2 * cloned


def _ask_hand(function: Callable[[int, int, int], Any], counts: Tensor) -> Tensor:
    held = function(*(int(count) for count in counts))
    if not isinstance(held, int) or isinstance(held, bool):
        raise WrongFormError(f"your function returned a {type(held).__name__}; a number of bytes is an int.")
    return torch.tensor(held).to(counts)


HAND = Exercise(
    id="06.hand",
    idea=(
        "A weight in bf16 has 2 bytes: a frozen one, one that trains, and one of the clone's.",
        "One that trains has a gradient of 2 bytes as well, and a float32 master of 4.",
        "AdamW keeps two float32 moments for each weight that trains: 8 bytes.",
    ),
    solution=held_bytes,
    oracle=lambda counts: (counts * torch.tensor([2.0, 16.0, 2.0])).sum(),
    draw=lambda generator: (torch.randint(1, 1000, (3,), generator=generator).double(),),
    by_hand=Case(
        "100 frozen weights, 10 that train and 100 of a clone",
        (torch.tensor([100.0, 10, 100]),),
        torch.tensor(200.0 + 160 + 200),
    ),
    hard=(Case("no frozen weight and no clone", (torch.tensor([0.0, 7, 0]),), torch.tensor(112.0)),),
    keeps_gradient=False,
    ask=_ask_hand,
    mistakes=(
        Mistake(1, "weights of 4 bytes, as in float32", lambda f, t, c: 4 * f + 18 * t + 4 * c),
        Mistake(1, "a run without its clone", lambda f, t, c: 2 * f + 16 * t),
        Mistake(2, "a weight that trains without its gradient", lambda f, t, c: 2 * f + 14 * t + 2 * c),
        Mistake(2, "gradients for frozen weights as well", lambda f, t, c: 4 * f + 16 * t + 2 * c),
        Mistake(3, "a weight that trains without its moments", lambda f, t, c: 2 * f + 8 * t + 2 * c),
        Mistake(
            3,
            "12 bytes for a weight that trains: no master, or a single moment",
            lambda f, t, c: 2 * f + 12 * t + 2 * c,
        ),
        Mistake(3, "moments for frozen weights as well", lambda f, t, c: 10 * f + 16 * t + 2 * c),
    ),
    hints=(
        "What does a weight that trains need beside itself, so that a step can be made?",
        "Weight 2, gradient 2, master 4, two moments 8. And the others, that do not train?",
        "Return 2 * frozen + 16 * trained + 2 * cloned.",
    ),
)


# ------------------------------------------------------------------------------------------- 06.largest
def largest_that_fits(models: dict[str, int], needed: dict[str, int], memory: int) -> str:
    """Return the model with the most parameters that fits, "nothing" if none does; `needed` is bytes by name."""
    # At most, not less than: a bill that comes out even still fits.
    fitting = [name for name in models if needed[name] <= memory]
    return max(fitting, key=lambda name: models[name], default="nothing")


def _ask_largest(
    function: Callable[[dict[str, int], dict[str, int], int], Any], sizes: Tensor, needs: Tensor, memory: int
) -> Tensor:
    names = [f"model {number}" for number in range(len(sizes))]
    models, needed = ({name: int(v) for name, v in zip(names, values, strict=True)} for values in (sizes, needs))
    name = function(models, needed, memory)
    if not isinstance(name, str):
        raise WrongFormError(f'your function returned a {type(name).__name__}; it must return a name, or "nothing".')
    if name not in (*names, "nothing"):
        raise WrongFormError(f'your function returned {name!r}; that is no name in models, and not "nothing".')
    return torch.tensor(names.index(name) if name in names else -1).to(sizes)


def _largest(sizes: Tensor, needs: Tensor, memory: int) -> Tensor:
    fitting = torch.where(needs <= memory, sizes, -1)
    return fitting.argmax() if fitting.max() >= 0 else torch.tensor(-1)


def _first_by(choose: Callable[..., str], key: int, check: bool = True) -> Callable[..., str]:
    """Return a search that takes another one of those that fit: by models (0) or by what they need (1)."""

    def function(*given: Any) -> str:
        models, needed, memory = given
        names = [name for name in models if needed[name] <= memory or not check]
        return choose(names, key=given[key].get) if names else "nothing"

    return function


def _models(generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    sizes = torch.randperm(40, generator=generator)[:6].double() + 1
    return sizes, sizes * 18 + torch.randint(0, 400, (6,), generator=generator), 500


LARGEST = Exercise(
    id="06.largest",
    idea=(
        "A model fits if what it needs is at most the memory; exactly as much is enough.",
        "The largest is that with the most parameters. It need not be the one that needs most.",
        'If no model fits, the answer is "nothing".',
    ),
    solution=largest_that_fits,
    oracle=_largest,
    draw=_models,
    by_hand=Case(
        "models of 7, 3 and 4 parameters that need 90, 50 and 40 bytes, and 60 bytes",
        (torch.tensor([7.0, 3, 4]), torch.tensor([90.0, 50, 40]), 60),
        torch.tensor(2.0),
    ),
    hard=(
        Case("a bill that comes out even", (torch.tensor([2.0, 5]), torch.tensor([20.0, 50]), 50), torch.tensor(1.0)),
        Case("a GPU too small for all", (torch.tensor([2.0, 5]), torch.tensor([20.0, 50]), 10), torch.tensor(-1.0)),
    ),
    keeps_gradient=False,
    ask=_ask_largest,
    imports="",
    mistakes=(
        Mistake(1, "the largest of all, whether it fits or not", _first_by(max, 0, check=False)),
        Mistake(
            1,
            "less than the memory, where exactly as much would fit",
            lambda models, needed, memory: largest_that_fits(models, needed, memory - 1),
        ),
        Mistake(2, "the one that needs most of those that fit", _first_by(max, 1)),
        Mistake(2, "the smallest that fits", _first_by(min, 0)),
        Mistake(2, "the last in the list that fits", _first_by(lambda names, key: names[-1], 0)),
        Mistake(
            3,
            "the smallest model where none fits",
            lambda models, needed, memory: (
                largest_that_fits(models, needed, memory)
                if min(needed.values()) <= memory
                else min(models, key=lambda name: models[name])
            ),
        ),
    ),
    hints=(
        "Which models would you still look at, once you know which ones do not fit?",
        "First make a list of the names that fit. Then take max of it, by models[name].",
        'max(fitting, key=lambda name: models[name], default="nothing"); fitting are those with needed <= memory.',
    ),
)


# ----------------------------------------------------------------------------------------- 06.misadvice
def misled(parameters: int, memory: int, needed: dict[str, int]) -> bool:
    """Return whether the article's rule names a way that does not fit where another one would."""
    named = "adapter"
    if parameters > 20e9:
        named = "zero3"
    # 80 GB as it is printed on the card: 80e9 bytes, not 80 * 2**30.
    elif memory >= 80e9:
        named = "clone"
    return needed[named] > memory and min(needed.values()) <= memory


def _ask_misled(function: Callable[[int, int, dict[str, int]], Any], runs: Tensor) -> Tensor:
    said = []
    for parameters, memory, *needs in runs.tolist():
        bills = dict(zip(("zero3", "clone", "adapter"), map(int, needs), strict=True))
        said.append(function(int(parameters), int(memory), bills))
        if not isinstance(said[-1], bool):
            raise WrongFormError(f"your function returned a {type(said[-1]).__name__}; it must return True or False.")
    return torch.tensor(said).to(runs)


def _misled(runs: Tensor) -> Tensor:
    parameters, memory, *needs = runs.T
    zero3, clone, adapter = needs
    named = torch.where(parameters > 20e9, zero3, torch.where(memory >= 80e9, clone, adapter))
    return (named > memory) & (runs[:, 2:].amin(1) <= memory)


def _runs(generator: torch.Generator) -> tuple[Tensor]:
    """Return runs on both sides of every threshold, and on it."""
    parameters = torch.tensor([1e9, 7e9, 20e9, 21e9, 70e9]).double()
    memory = torch.tensor([24e9, 79e9, 80e9, 85e9, 141e9]).double()
    picked = (values[torch.randint(0, 5, (24,), generator=generator)] for values in (parameters, memory))
    needs = torch.randint(10, 200, (24, 3), generator=generator).double() * 1e9
    return (torch.column_stack([*picked, needs]),)


def _with_rule(name: Callable[[int, int], str]) -> Callable[[int, int, Mapping[str, int]], bool]:
    def function(parameters: int, memory: int, needed: Mapping[str, int]) -> bool:
        return needed[name(parameters, memory)] > memory and min(needed.values()) <= memory

    return function


def _named(parameters: int, memory: int) -> str:
    return "zero3" if parameters > 20e9 else "clone" if memory >= 80e9 else "adapter"


MISADVICE = Exercise(
    id="06.misadvice",
    idea=(
        'The rule: more than 20e9 parameters, "zero3"; else "clone" with 80e9 bytes or more; else "adapter".',
        "It misleads where what it names needs more bytes than there are,",
        "and another of the three would fit. Where nothing fits, no rule could have helped.",
    ),
    solution=misled,
    oracle=_misled,
    draw=_runs,
    by_hand=Case(
        "a 7B on 85 GB, where a clone needs 147 GB and an adapter 26; on 24 GB; and a 1B that fits",
        (
            torch.tensor(
                [[7e9, 85e9, 33e9, 147e9, 26e9], [7e9, 24e9, 33e9, 147e9, 26e9], [1e9, 85e9, 10e9, 20e9, 5e9]]
            ).double(),
        ),
        torch.tensor([1.0, 0, 0]),
    ),
    hard=(
        Case(
            "exactly 20e9 parameters, and exactly 80e9 bytes",
            (torch.tensor([[20e9, 141e9, 30e9, 300e9, 50e9], [7e9, 80e9, 33e9, 147e9, 26e9]]).double(),),
            torch.tensor([1.0, 1.0]),
        ),
    ),
    keeps_gradient=False,
    ask=_ask_misled,
    imports="",
    mistakes=(
        Mistake(
            1,
            "80 GiB where the card says 80 GB",
            _with_rule(lambda p, m: "zero3" if p > 20e9 else "clone" if m >= 80 * 2**30 else "adapter"),
        ),
        Mistake(
            1,
            "ZeRO-3 from 20e9 on, where the rule says more",
            _with_rule(lambda p, m: "zero3" if p >= 20e9 else "clone" if m >= 80e9 else "adapter"),
        ),
        Mistake(
            1,
            "memory asked first, and parameters after it",
            _with_rule(lambda p, m: "clone" if m >= 80e9 else "zero3" if p > 20e9 else "adapter"),
        ),
        Mistake(2, "where the rule names what does fit", lambda p, m, needed: needed[_named(p, m)] <= m),
        Mistake(
            2,
            "wherever the rule does not name what needs least",
            lambda p, m, needed: needed[_named(p, m)] > min(needed.values()),
        ),
        Mistake(3, "where nothing fits as well", lambda p, m, needed: needed[_named(p, m)] > m),
    ),
    hints=(
        "Which of the three does the rule name for 7e9 parameters and 85e9 bytes? What does that need?",
        "First find the name, with if and else. Then compare needed[name], and the least of all, with the memory.",
        "Return needed[named] > memory and min(needed.values()) <= memory.",
    ),
)

EXERCISES = (HAND, LARGEST, MISADVICE)
