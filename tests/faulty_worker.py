"""A rank of launch_zero3 that goes wrong on purpose, as $FAULT says; what it does until then is real, or nothing."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from refkl_lib.ranks import worker
from refkl_lib.ranks.events import tell

HERE = os.environ["RANK"] == "1"


def main() -> None:
    fault = os.environ["FAULT"]
    if fault in AT_STEP:
        from refkl_lib.ranks import training

        training.steps = _broken_at(*AT_STEP[fault], training.steps)
    elif fault == "a disk of its own":
        from refkl_lib.ranks import training

        training.train = _elsewhere(training.train)
    elif fault in WHILE_SAVING:
        from refkl_lib.ranks import save

        save.write_whole = _broken_by(WHILE_SAVING[fault], save.write_whole)
    else:
        sys.modules["refkl_lib.ranks.training"] = instead = ModuleType("instead")
        instead.train = lambda settings: FAULTS[fault]() if HERE or fault == "none" else _hang()
    worker.main()


def _broken_at(step: int, fault: Callable[[], object], steps: Any) -> Any:
    """Let the fault happen right before a step."""

    def broken(*arguments: Any) -> Iterator[Any]:
        if step == 0:
            fault()
        for facts in steps(*arguments):
            yield facts
            if facts["step"] + 1 == step:
                fault()

    return broken


def _raise() -> None:
    if HERE:
        raise ZeroDivisionError("step 1 has failed")


def _leave_no_memory() -> None:
    if HERE:
        limit = psutil.Process().memory_info().vms + 2**24
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _be_killed_in_a_gather() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Gathers(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "allgather" in str(func):
                tell("gathering")
                if HERE:
                    time.sleep(0.5)  # meanwhile, the other rank has come to wait for this one's part
                    os.kill(os.getpid(), signal.SIGKILL)
            return func(*args, **(kwargs or {}))

    Gathers().__enter__()  # for good


def _elsewhere(train: Any) -> Any:
    """Let the rank read the folder that its own disk has in place of the model's."""

    def train_elsewhere(settings: Any) -> None:
        if HERE:
            settings.model += "-of-rank-1"
        train(settings)

    return train_elsewhere


def _broken_by(fault: Callable[[], object], write_whole: Any) -> Any:
    """Let the fault happen when a saved model's folder is there and nothing is in it."""

    def broken(target: Path, write: Callable[[Path], None]) -> None:
        def write_and_fail(folder: Path) -> None:
            fault()
            write(folder)

        write_whole(target, write_and_fail)

    return broken


def _leave_a_mebibyte() -> None:
    """Let no file grow larger than that: room for all files of the pocket model but its weights."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def _be_killed_after_a_mebibyte() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    _leave_a_mebibyte()


def _hang() -> None:
    time.sleep(600)


def _print_a_lot() -> None:
    print("no end of line " * 10_000, end="")
    raise ValueError("an error with 🦔 in it " + "and a very long text " * 1_000)


FAULTS = {
    "none": lambda: tell("done"),
    "hang": _hang,
    "exit 3": lambda: os._exit(3),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "print a lot": _print_a_lot,
}

AT_STEP = {
    "raise at step 1": (1, _raise),
    "killed in an all-gather": (1, _be_killed_in_a_gather),
    "out of memory": (0, _leave_no_memory),
}
WHILE_SAVING = {"disk full while saving": _leave_a_mebibyte, "killed while saving": _be_killed_after_a_mebibyte}

if __name__ == "__main__":
    main()
