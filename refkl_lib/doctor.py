"""Look at this machine before a lesson or a workshop, and say what the notebooks would miss.

    python -m refkl_lib.doctor

Prints a line for each thing: "ok", "note" for what only some cells need, or "no" and what to do about it. It takes
half a minute, most of it for two real ranks and a JupyterLab. The exit status is 0 if no line says "no".
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from refkl_lib.memory.meters import machine
from refkl_lib.models.cache import CHECKOUT, ModelUnavailableError, cache_folder
from refkl_lib.models.load import load_model
from refkl_lib.ranks.launch import check_system, launch_zero3
from refkl_lib.units import GIB, show_bytes

CORES = 2
MEMORY, MEMORY_FOR_RANKS = 4 * GIB, 6 * GIB  # as the README says
DISK = 1 * GIB
RANKS_SECONDS, LAB_SECONDS = 35, 15

OK, NOTE, NO = "ok", "note", "no"


class Finding(NamedTuple):
    """How one thing is ("ok", "note" or "no"), and what to say of it."""

    state: str
    says: str


Check = Callable[[], Finding]


def main(checks: dict[str, Check] | None = None) -> int:
    """Print a line for each check as soon as it is known; return 1 if one says "no", else 0."""
    states = []
    for name, check in (CHECKS if checks is None else checks).items():
        finding = examined(check)
        states.append(finding.state)
        print(f"{finding.state:<6}{name:<14}{finding.says}", flush=True)
    missing = states.count(NO)
    print("\nAll is there." if not missing else f"\nTo do: {missing} of {len(states)} lines say {NO!r}.")
    return int(missing > 0)


def examined(check: Check) -> Finding:
    """Return what a check finds; whatever it raises is a "no" with the first line of the message."""
    try:
        return check()
    except Exception as error:
        return Finding(NO, f"{type(error).__name__}: {(str(error).strip().splitlines() or ['without a message'])[0]}")


def packages() -> Finding:
    """Compare the installed packages with the lock or, without one, with what this library requires."""
    lock = CHECKOUT / "constraints.txt"
    required = [Requirement(line) for line in importlib.metadata.requires("refkl-lib") or ()]
    locked = [Requirement(line) for line in lock.read_text().splitlines() if line[0] != "#"] if lock.is_file() else []
    if faults := list(package_faults(required, locked)):
        way_out = f"pip install -c {lock} -e {CHECKOUT}[lab]" if locked else "pip install refkl-lib"
        return Finding(NO, f"{'; '.join(faults)}: make lab, or {way_out}")
    return Finding(OK, f"Python {machine().python}, and the versions of {'the lock' if locked else 'this release'}")


def package_faults(required: Sequence[Requirement], locked: Sequence[Requirement]) -> Iterator[str]:
    """Yield each required package that is missing, and each package in another version than the required or locked."""
    installed = {canonicalize_name(found.name): found.version for found in importlib.metadata.distributions()}
    for requirement in required:
        if _applies(requirement) and canonicalize_name(requirement.name) not in installed:
            yield f"{requirement.name} is not installed"
    for requirement in locked or required:
        version = installed.get(canonicalize_name(requirement.name))
        if _applies(requirement) and version and version not in requirement.specifier:
            yield f"{requirement.name} is {version}, not {requirement.specifier}"


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def cores() -> Finding:
    """Count the processor cores that this process may use."""
    count = machine().cores
    if count < CORES:
        return Finding(NOTE, f"{count}, not {CORES}: everything works, and takes twice as long")
    return Finding(OK, str(count))


def memory() -> Finding:
    """Ask how much memory is available to this process."""
    available = machine().available
    says = f"{show_bytes(available)} available"
    if available < MEMORY:
        return Finding(NO, f"{says}, and the notebooks need {show_bytes(MEMORY)}: close other programs or kernels")
    if available < MEMORY_FOR_RANKS:
        want = show_bytes(MEMORY_FOR_RANKS)
        return Finding(NOTE, f'{says}: cells that train smollm2 in two ranks want {want}; model="pocket" takes less')
    return Finding(OK, says)


def disk() -> Finding:
    """Ask how much space is left where models and temporary files go."""
    for folder in (_existing(cache_folder()), Path(tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        if free < DISK:
            return Finding(NO, f"{show_bytes(free)} free in {folder}, {show_bytes(DISK)} are needed: free some there")
    return Finding(OK, f"{show_bytes(free)} free")


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def compiler() -> Finding:
    """Say whether there is a C++ compiler, which nothing here needs."""
    return Finding(OK, "there is one; none is needed" if machine().has_compiler else "none, and none is needed")


def model() -> Finding:
    """Load smollm2 from the cache."""
    try:
        parameters = load_model("smollm2", device="cpu").num_parameters()
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(
            f"smollm2 in {cache_folder()} cannot be read ({error}): delete that folder, and fetch it again with: "
            "python -m refkl_lib.models fetch smollm2"
        ) from error
    return Finding(OK, f"smollm2, {parameters:,} parameters, in {cache_folder()}")


def ranks() -> Finding:
    """Train the pocket model for a step in two real ranks."""
    try:
        check_system()
    except RuntimeError as error:
        return Finding(NOTE, f"{error}; all other cells work here")
    began = time.monotonic()
    launch_zero3(ranks=2, model="pocket", steps=1, timeout=RANKS_SECONDS)
    return Finding(OK, f"two trained a step in {time.monotonic() - began:.0f} s")


def lab() -> Finding:
    """Start a JupyterLab, and ask for its page."""
    try:
        importlib.metadata.version("jupyterlab")
    except importlib.metadata.PackageNotFoundError:
        return Finding(NO, "JupyterLab is not installed: make lab, or pip install refkl-lib[lab]")
    with tempfile.TemporaryDirectory() as folder, _jupyter(Path(folder)) as page:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(page, timeout=LAB_SECONDS).close()
    return Finding(OK, "JupyterLab answers")


@contextmanager
def _jupyter(folder: Path) -> Iterator[str]:
    """Run JupyterLab in a folder of its own, and give its address; it ends with the block."""
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0"]
    server = subprocess.Popen(
        [*command, f"--ServerApp.root_dir={folder}"],
        env=os.environ | {"JUPYTER_RUNTIME_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield _address(server, folder)
    finally:
        server.terminate()
        server.wait(timeout=LAB_SECONDS)


def _address(server: subprocess.Popen[bytes], folder: Path) -> str:
    """Return where JupyterLab listens, as soon as it has written that down. Raises RuntimeError if it does not."""
    deadline = time.monotonic() + LAB_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        for note in folder.glob("jpserver-*.json"):
            if text := note.read_text():
                here = json.loads(text)
                return f"{here['url']}lab?token={here['token']}"
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start in {LAB_SECONDS} s; python -m jupyterlab says why")


CHECKS: dict[str, Check] = {
    "packages": packages,
    "cores": cores,
    "memory": memory,
    "disk": disk,
    "C++ compiler": compiler,
    "model": model,
    "ranks": ranks,
    "JupyterLab": lab,
}

if __name__ == "__main__":
    sys.exit(main())
