"""What tests of ranks share: a job that fails as it is told to, and a look at which processes are left."""

import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from refkl_lib.ranks.launch import RankError, launch_zero3

SECONDS_TO_END = 10.0


def failing(fault: str, timeout: float = 100.0, **options: Any) -> RankError:
    """The error of a job of two ranks that goes wrong as faulty_worker.py knows to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULT", fault)
        with pytest.raises(RankError) as caught:
            launch_zero3(2, worker="faulty_worker", timeout=timeout, **options)
    return caught.value


def descendants(mark: str) -> list[psutil.Process]:
    """The processes that were started from here since the fixture `mark` put its mark into the environment."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and is_marked(process, mark)]


def is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("REFKL_TEST") == mark
    except psutil.Error:
        return False


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_END
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
