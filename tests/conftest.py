"""What all tests share: the same environment variables everywhere, no network, and no test that is skipped unseen."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from bs4 import BeautifulSoup
from filelock import FileLock

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
OFFLINE = Path(__file__).parent / "offline"
BROWSER = Path(__file__).parent / "browser"
# Any order of the notebooks is right. A run says which it took, and can be asked to take it again.
ORDER = os.environ.setdefault("REFKL_ORDER", str(random.randrange(1000)))


def pytest_configure() -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the Makefile does
    # Hundreds of processes start here, and each would compile the library anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if "PYTEST_XDIST_WORKER" in os.environ:
        share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        # Threads of two workers that wait for each other's processors take many times as long.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    for name in LAUNCHER:
        os.environ.pop(name, None)
    # A learner's own progress is not for tests, nor for the kernels that run the notebooks.
    os.environ["REFKL_DATA"] = tempfile.mkdtemp(prefix="refkl-")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["REFKL_RAN"] = tempfile.mkdtemp(prefix="refkl-")


def pytest_report_header() -> str:
    return f"order of the notebooks: REFKL_ORDER={ORDER}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest first, and let nbval compare what the browser's runs of the notebooks put out."""
    items.sort(key=lambda item: place(item.path))
    for notebook in {item.parent for item in items if item.path.suffix == ".ipynb"}:
        from replay import set_up  # which imports nbval

        notebook.setup = partial(set_up, notebook)


def place(path: Path) -> tuple[int, float]:
    """Return where a file's tests come: the browser's, in any order of the notebooks; all others; nbval's, likewise.

    What runs in the browser takes longest, and a worker that has one left at the end works while the others wait.
    """
    shuffled = random.Random(ORDER + path.stem).random()
    if path.suffix == ".ipynb":
        return 3, shuffled
    if BROWSER in path.parents:
        return (0, shuffled) if path.name.startswith("test_0") else (1, 0)
    return 2, 0


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["REFKL_DATA"], ignore_errors=True)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["REFKL_RAN"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def mark() -> Iterator[str]:
    """Mark the environment that every process started from here inherits, orphans as well."""
    with pytest.MonkeyPatch.context() as patch:
        mark = uuid.uuid4().hex
        patch.setenv("REFKL_TEST", mark)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield mark


@pytest.fixture
def nothing_left(mark: str) -> Iterator[None]:
    """Fail a test that leaves a process."""
    from faults import descendants  # which imports torch; most tests do without

    yield
    assert descendants(mark) == []


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site in both languages, built as `make site` does; once for all workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "site.lock"):
        if not (folder / "site").exists():
            build_site(folder / "site")
    return folder / "site"


def build_site(folder: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-c", "docs"]
    for edition in ([".", folder], ["-D", "language=zh_CN", ".", folder / "zh"]):
        build = subprocess.run([*command, *edition], cwd=Path(__file__).parents[1], capture_output=True, text=True)
        if build.returncode != 0:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.fail(build.stderr)


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, BeautifulSoup]:
    """Every page that a reader can open, by its path in the site."""
    found = (path for path in site.rglob("*.html") if "_static" not in path.parts)
    return {path.relative_to(site).as_posix(): BeautifulSoup(path.read_text(), "html.parser") for path in found}


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
