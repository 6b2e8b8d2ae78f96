"""All exercises of the course, their hints and their solutions."""

import inspect
import textwrap
from collections import Counter
from importlib import import_module

from refkl_lib.lessons.exercise import Exercise, Text

# The number that a notebook's exercises begin with, and the file here that holds them.
FILES = {
    "01": "why",
    "02": "clone",
    "03": "adapter",
    "04": "zero3",
    "05": "kl",
    "06": "choose",
    "07": "capstone",
    "08": "probes",
}

# What the notebooks ask to predict, in order.
PREDICTIONS = (
    "01.kl-after",
    "01.share-of-five",
    "01.kl-own-text",
    "02.clone-weights",
    "02.shared-layers",
    "02.full-step",
    "03.adapter-share",
    "03.saved",
    "03.pissa",
    "04.policy-shards",
    "04.gather-peak",
    "05.share-of-five",
    "05.k1-below-zero",
    "05.full-growth",
    "06.full-peak",
    "06.adapter-share",
    "06.largest-clone",
    "06.zero3-time",
    "07.kl-free",
    "07.apart",
    "08.hold",
    "08.seven-fp32",
    "08.batchmean",
)

# In memory, not in the file of the progress: a fresh kernel begins with the first hint.
_hints_given: Counter[str] = Counter()


def exercises() -> dict[str, Exercise]:
    """Return the exercises of all notebooks by their id, in order."""
    modules = (import_module(f"refkl_lib.lessons.{file}") for file in FILES.values())
    return {exercise.id: exercise for module in modules for exercise in module.EXERCISES}


def find(exercise: str) -> Exercise:
    """Return the exercise with this id. Raises ValueError if there is none."""
    known = exercises()
    if exercise not in known:
        raise ValueError(f"there is no exercise {exercise!r}; there are {', '.join(known)}")
    return known[exercise]


def hint(exercise: str) -> Text:
    """Return one more hint each time, below those already given. Raises ValueError for an unknown exercise."""
    hints = find(exercise).hints
    given = _hints_given[exercise] = min(_hints_given[exercise] + 1, len(hints))
    lines = [f"Hint {number} of {len(hints)}: {text}" for number, text in enumerate(hints[:given], 1)]
    if given == len(hints):
        lines.append(f'That was the last one; solution("{exercise}") shows the code.')
    return Text("\n".join(lines))


def solution(exercise: str) -> Text:
    """Return the code that solves it, with a comment on why. Raises ValueError for an unknown exercise."""
    spec = find(exercise)
    source = textwrap.dedent(inspect.getsource(spec.solution)).rstrip()
    return Text(f"{spec.imports}\n\n\n{source}")
