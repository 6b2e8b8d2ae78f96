"""A rank of launch_zero3 that goes wrong on purpose, as $FAULT says; what it does until then is real, or nothing."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from refkl_lib.ranks import worker

HERE = os.environ["RANK"] == "1"


def main() -> None:
    fault = os.environ["FAULT"]
    if fault == "raise at step 1":
        from refkl_lib.ranks import training

        training.steps = _broken_after_a_step(training.steps)
    else:
        sys.modules["refkl_lib.ranks.training"] = instead = ModuleType("instead")
        instead.train = lambda settings: FAULTS[fault]() if HERE else _hang()
    worker.main()


def _broken_after_a_step(steps: Any) -> Any:
    def broken(*arguments: Any) -> Iterator[Any]:
        for facts in steps(*arguments):
            yield facts
            if HERE:
                raise ZeroDivisionError("step 1 has failed")

    return broken


def _hang() -> None:
    time.sleep(600)


def _print_a_lot() -> None:
    print("no end of line " * 10_000, end="")
    raise ValueError("an error with 🦔 in it " + "and a very long text " * 1_000)


FAULTS = {
    "hang": _hang,
    "exit 3": lambda: os._exit(3),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "print a lot": _print_a_lot,
}

if __name__ == "__main__":
    main()
