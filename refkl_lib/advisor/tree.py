"""The decision tree: questions in order, each with the way that it leads to.

After the first question there are two ladders. On each, the first question that is answered "yes" ends it. A picture
and a text are made of the same data.
"""

from dataclasses import dataclass

from refkl_lib.advisor.ways import WAYS, Option, Run, Way


@dataclass(frozen=True)
class Question:
    """A question whose "yes" leads to a way."""

    text: str
    way: Way


@dataclass(frozen=True)
class Answer:
    """How a run answers a question, and why."""

    question: str
    yes: bool
    because: str

    def __str__(self) -> str:
        """Return all three in words."""
        return f"{self.question} {'Yes' if self.yes else 'No'}: {self.because}."


FIRST = "Does an adapter train (LoRA)?"
# By the answer to the first question; the simplest way comes first.
LADDERS = {
    True: (
        Question("Does the policy fit each GPU whole?", WAYS["adapter"]),
        Question("Are there several ranks, and does a share fit?", WAYS["adapter, zero3"]),
    ),
    False: (
        Question("Do policy and clone fit each GPU whole?", WAYS["clone"]),
        Question("Are there several ranks, and do shares of both fit?", WAYS["zero3"]),
        Question("Is there host memory to swap weights with?", WAYS["swap"]),
        Question("Is the data known, and does the policy fit?", WAYS["precomputed"]),
    ),
}
NOTHING = "nothing fits"


def walk(run: Run) -> tuple[tuple[Answer, ...], Option | None]:
    """Return the path that a run takes through the tree, and the way at its end; None if nothing fits.

    Only ways on the path are priced.
    """
    answers = [Answer(FIRST, run.trains_adapter, run.trains if run.trains_adapter else f"{run.trains} do")]
    for question, option in zip(LADDERS[run.trains_adapter], ways_of(run), strict=True):
        answers.append(Answer(question.text, option.usable, option.lacks or option.verdict))
        if option.usable:
            return tuple(answers), option
    return tuple(answers), None


def ways_of(run: Run) -> tuple[Option, ...]:
    """Return the ways on the ladder that a run is on."""
    return tuple(Option(run, question.way) for question in LADDERS[run.trains_adapter])


def step_of(option: Option | None) -> int:
    """Return how far down its ladder an option stands, from 0; below all of them if there is none."""
    steps = {question.way: step for ladder in LADDERS.values() for step, question in enumerate(ladder)}
    return max(steps.values()) + 1 if option is None else steps[option.way]
