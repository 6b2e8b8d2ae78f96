"""A number before the measurement, and what became of it."""

import math
from typing import Any

from refkl_lib.lessons import store
from refkl_lib.lessons.exercise import Text


def predict(question: str, value: Any) -> Text:
    """Remember your guess, in the unit that the question asks for; a later guess replaces it.

    `...` is no guess yet, and changes nothing. Raises TypeError or ValueError for anything but one finite number.
    """
    if value is ...:
        return Text(f"{question}: no guess yet. Put a number in place of the dots.")
    guess = _number("your guess", value)
    with store.changed() as progress:
        progress["predictions"][question] = {"guess": guess}
    return Text(f"{question}: your guess is {show(guess)}.")


def reveal(question: str, measured: Any, unit: str = "") -> Text:
    """Return guess and measurement side by side, with their ratio, and remember it.

    A question without a guess gets its measurement alone. Raises as `predict` does.
    """
    truth = _number("the measurement", measured)
    with store.changed() as progress:
        prediction = progress["predictions"].get(question, {})
        if prediction:
            prediction.update(measured=truth, unit=unit)
    if not prediction:
        return Text(f'{question}: measured {show(truth, unit)}; no guess was made with predict("{question}", …).')
    guess = prediction["guess"]
    return Text(
        f"{question}\n  your guess        {show(guess, unit)}\n  measured          {show(truth, unit)}\n"
        f"  measured / guess  {ratio(guess, truth)}"
    )


def show(value: float, unit: str = "") -> str:
    """Return a number as people read it, with four digits or more: "0.0123", "513.1 MiB", "1,234,567"."""
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{number} {unit}".strip()


def ratio(guess: float, measured: float) -> str:
    """Return how many times the guess the measurement is: "1.96"; "1.00" for two zeros, "–" if only the guess is 0."""
    if guess == 0:
        return "1.00" if measured == 0 else "–"
    return f"{measured / guess:.3g}" if abs(measured / guess) < 0.1 else f"{measured / guess:.2f}"


def _number(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} is {value!r}, but must be a number, without quotation marks or unit")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {value!r}, but must be one number") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, but must be finite")
    return number
