"""Check a learner's function, and say which mistake it looks like.

The function answers plain cases (one by hand, some at random), then hard ones (where rounding or padding
matters), then it is asked for a gradient. If an answer is wrong, the named mistakes answer the same cases; the
one that answers like the learner is what the learner is told of.
"""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refkl_lib.lessons import store
from refkl_lib.lessons.course import find
from refkl_lib.lessons.exercise import Case, Exercise, Function, Mistake, WrongFormError
from refkl_lib.lessons.timeout import OutOfTimeError, within
from refkl_lib.units import folded

SECONDS = 5.0
_HERE = Path(__file__).parent
_RANDOM_CASES = 3


@dataclass(frozen=True, repr=False)
class Verdict:
    """Whether the exercise is solved, and what to say to the learner; it shows itself as that message."""

    solved: bool
    message: str

    def __repr__(self) -> str:
        return "\n".join(map(folded, self.message.splitlines()))


class _Unanswered(Exception):
    """There is no answer to compare; the message says why."""


class _NotSolvedYet(Exception):
    """The stub has not been touched."""


@dataclass(frozen=True)
class _Question:
    """A case, what kind it is, and the right answer to it."""

    case: Case
    kind: str  # "plain", "hard" or "gradient"
    want: Tensor | None  # None: there must be no gradient

    def right(self, got: Tensor | None) -> bool:
        return _alike(got, self.want, self.case)


def check(exercise: str, answer: Any) -> Verdict:
    """Return what is right or wrong with `answer`, the function that you wrote; it never raises what that raises.

    An untouched stub is "not solved yet". Raises ValueError for an unknown exercise.
    """
    spec = find(exercise)
    try:
        # In a thread of its own a `no_grad` or `inference_mode` around the call does not reach.
        verdict = Verdict(*within(SECONDS, lambda: _examine(spec, answer)))
    except OutOfTimeError:
        verdict = Verdict(False, f"your function had not returned after {SECONDS:g} s. Is there a loop without end?")
    except _Unanswered as reason:
        verdict = Verdict(False, str(reason))
    except _NotSolvedYet as stub:
        lines = (f"  {number}. {line}" for number, line in enumerate(spec.idea, 1))
        return Verdict(False, "\n".join([f"{exercise}: not solved yet{stub}. The idea:", *lines]))
    _remember(exercise, verdict.solved)
    return replace(verdict, message=f"{exercise}: {verdict.message}")


def _examine(spec: Exercise, answer: Any) -> tuple[bool, str]:
    if answer is None or answer is ... or answer is NotImplemented:
        raise _NotSolvedYet
    if not callable(answer):
        return False, f"give check the function itself, not what it returned (this is a {type(answer).__name__})."
    function = _asked(spec, _written(answer))
    questions = list(_questions(spec))
    answers: list[Tensor | None] = []
    for kind in ("plain", "hard", "gradient"):
        asked = [question for question in questions if question.kind == kind]
        answers += [_answer(function, question) for question in asked]
        if wrong := [place for place, got in enumerate(answers) if not questions[place].right(got)]:
            named = next((mistake for mistake in spec.mistakes if _made(spec, mistake, questions, answers)), None)
            return False, _named(spec, named) if named else _difference(spec, questions[wrong[0]], answers[wrong[0]])
    return True, f'solved. solution("{spec.id}") shows one way to write it.'


def _written(function: Function) -> Function:
    """Return a function that raises _NotSolvedYet where `function` answers as a stub does."""

    def call(*args: Any) -> Any:
        got = function(*args)
        if got is None or got is ... or got is NotImplemented:
            raise _NotSolvedYet(f" (your function returned {got})")
        return got

    return call


def _asked(spec: Exercise, function: Function) -> Function:
    return partial(spec.ask, function) if spec.ask else function


def _named(spec: Exercise, mistake: Mistake) -> str:
    where = f"Look at line {mistake.line} of the idea: {spec.idea[mistake.line - 1]}"
    return f"this looks like {mistake.says}.\n  {where}"


def _questions(spec: Exercise) -> Iterator[_Question]:
    generator = torch.Generator().manual_seed(0)
    drawn = [Case("random numbers", spec.draw(generator)) for _ in range(_RANDOM_CASES)]
    for kind, cases in {"plain": [spec.by_hand, *drawn], "hard": spec.hard}.items():
        for case in cases:
            want = spec.oracle(*case.args) if case.want is None else case.want
            yield _Question(case, kind, want.to(case.args[0]))
    case = drawn[0]
    yield _Question(case, "gradient", _gradient(spec.oracle, case) if spec.keeps_gradient else None)


def _answer(function: Function, question: _Question) -> Tensor | None:
    """Return what a function answers; to a "gradient" question that is the gradient, or None without one."""
    if question.kind == "gradient":
        return _ours_or_theirs(lambda: _gradient(function, question.case))
    return _value(function, question.case.args)


def _value(function: Function, args: tuple[Any, ...]) -> Tensor:
    given = _copies(args)
    got = _ours_or_theirs(lambda: function(*given))
    if not isinstance(got, Tensor):
        raise _Unanswered(f"your function returned a {type(got).__name__}; it must return a tensor.")
    for place, (before, after) in enumerate(zip(args, given, strict=True), 1):
        if isinstance(before, Tensor) and not _same(before, after):
            raise _Unanswered(f"your function changed its argument {place}, which the caller still needs: copy it.")
    return got.detach()


def _gradient(function: Function, case: Case) -> Tensor | None:
    """Return the gradient of the answer's sum by the first argument, None if the answer carries none."""
    first, *rest = _copies(case.args)
    got = function(first.requires_grad_(), *rest)
    if not got.requires_grad:
        return None
    [gradient] = torch.autograd.grad(got.sum(), first, allow_unused=True)
    return torch.zeros_like(first) if gradient is None else gradient


def _ours_or_theirs(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except _NotSolvedYet:
        raise
    except WrongFormError as error:
        raise _Unanswered(str(error)) from error
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent != _HERE]
        theirs = [frame for frame in frames if frame.filename == frames[0].filename]
        # torch raises it as well, for a dtype that an operator does not know.
        if isinstance(error, NotImplementedError) and frames and (frames[-1].line or "").startswith("raise"):
            raise _NotSolvedYet from error
        raise _Unanswered(_told(error, theirs)) from error


def _told(error: BaseException, theirs: list[traceback.FrameSummary]) -> str:
    """Return the first line of an exception's message, and the last line of the learner's that led to it."""
    words = (str(error).strip().splitlines() or [""])[0][:200]
    told = f"your code raised {type(error).__name__}{words and ': '}{words}"
    return told + (f"\n  line {theirs[-1].lineno}: {theirs[-1].line}" if theirs else "")


def _made(spec: Exercise, mistake: Mistake, questions: list[_Question], answers: list[Tensor | None]) -> bool:
    """Tell whether a mistake gives the answers that the learner gave so far."""
    for question, theirs in zip(questions, answers, strict=False):
        got = _answer(_asked(spec, mistake.function), question)
        if question.kind == "plain" and not _alike(got, theirs, question.case):
            return False
        # Rounding has no digits to compare: it is enough to go wrong as well, and in the same places to be no number.
        if question.right(got) != question.right(theirs) or not _finite_alike(got, theirs):
            return False
    return True


def _difference(spec: Exercise, question: _Question, got: Tensor | None) -> str:
    want, label = question.want, question.case.label
    if question.kind == "gradient":
        return _gradient_difference(got, want)
    assert got is not None  # only gradients can be missing
    assert want is not None
    for name in ("shape", "dtype", "device", "layout"):
        yours, right = getattr(got, name), getattr(want, name)
        if yours != right:
            yours, right = (tuple(yours), tuple(right)) if name == "shape" else (yours, right)
            return f"your answer has the {name} {yours}; it must be {right}."
    if spec.facts:
        missing = [fact for fact, so, must in zip(spec.facts, got, want, strict=True) if so != must]
        return f"on {label}, this is not so: {'; '.join(missing)}."
    lead = "right on ordinary numbers, but not here: on" if question.kind == "hard" else "on"
    return f"{lead} {label}, your answer is {_short(got)}; it must be {_short(want)}."


def _gradient_difference(got: Tensor | None, want: Tensor | None) -> str:
    if want is None:
        return "the numbers are right, but your answer still carries a gradient, and it must not: detach it."
    if got is None:
        return "the numbers are right, but your answer has lost its gradient: it cannot be trained on."
    return "the numbers are right, but their gradient is not: is a part of it detached?"


def _alike(got: Tensor | None, want: Tensor | None, case: Case) -> bool:
    if got is None or want is None:
        return got is want
    if _form(got) != _form(want):
        return False
    return torch.allclose(got, want, case.rtol, case.atol, equal_nan=True)


def _finite_alike(got: Tensor | None, theirs: Tensor | None) -> bool:
    if got is None or theirs is None:
        return got is theirs
    return got.device == theirs.device and torch.equal(got.isfinite(), theirs.isfinite())


def _form(values: Tensor) -> tuple[Any, ...]:
    return values.shape, values.dtype, values.device, values.layout


def _same(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and torch.allclose(before, after, 0.0, 0.0, equal_nan=True)


def _short(values: Tensor) -> str:
    numbers = [f"{value:.4g}" for value in values.flatten().tolist()[:6]]
    return numbers[0] if values.dim() == 0 else f"[{', '.join(numbers)}{', …' if values.numel() > 6 else ''}]"


def _copies(args: tuple[Any, ...]) -> list[Any]:
    return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]


def _remember(exercise: str, solved: bool) -> None:
    with store.changed() as progress:
        record = progress["exercises"].setdefault(exercise, {"tries": 0, "solved": False})
        record["tries"] += 1
        record["solved"] = record["solved"] or solved
