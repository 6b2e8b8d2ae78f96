"""What all tests share: the same environment variables everywhere, and no test that is skipped unseen."""

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from unittest import mock

import pytest

Report = pytest.TestReport | pytest.CollectReport

# Left in a shell by a launcher or a batch system, these would decide how many ranks and devices a test sees.
LAUNCHER = [
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DS_ACCELERATOR",
]


def pytest_configure() -> None:
    for name in LAUNCHER:
        os.environ.pop(name, None)
    # A learner's own progress is not for tests, nor for the kernels that run the notebooks.
    os.environ["REFKL_DATA"] = tempfile.mkdtemp(prefix="refkl-")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["REFKL_DATA"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, Report, Report]:
    return seen((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, Report, Report]:
    return seen((yield))


def seen(report: Report) -> Report:
    """Return the report; if REFKL_NO_SKIP is set, as CI does, a skip has become a failure."""
    if "REFKL_NO_SKIP" in os.environ and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"REFKL_NO_SKIP is set, so this may not be skipped. {reason}"
    return report
