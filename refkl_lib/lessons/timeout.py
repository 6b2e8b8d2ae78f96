"""A time limit for code that may never end."""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_ATTEMPTS, _GRACE_SECONDS = 10, 0.1


class OutOfTimeError(BaseException):
    """Raised inside code that ran too long. Not an Exception, so that its `except Exception` lets it through."""


def within(seconds: float, function: Callable[[], T]) -> T:
    """Return `function()`, or raise what it raises, or OutOfTimeError if that takes longer.

    It runs in a thread: an alarm signal works neither on Windows nor in every kernel's threads.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # handed to the caller, whatever it is
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:  # also when the learner interrupts the kernel
        in_time = not thread.is_alive()
        _end(thread)
    if not in_time or not outcome:
        raise OutOfTimeError
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # there is one where there is no error


def _end(thread: threading.Thread) -> None:
    # A loop around `except:` swallows it now and then. One call that never returns (a sleep) cannot be ended, but
    # it does not keep the learner waiting, nor the kernel from ending.
    for _ in range(_ATTEMPTS):
        if not thread.is_alive():
            return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(OutOfTimeError))
        thread.join(_GRACE_SECONDS)
