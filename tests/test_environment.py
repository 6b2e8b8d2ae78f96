"""pyproject.toml, the lock, environment.yml, the Makefile and what is installed say the same."""

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata

import pytest
import yaml
from checkout import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "constraints.txt").read_text()
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
INSTALLED = {canonicalize_name(d.name): d.version for d in metadata.distributions()}


def required(project: dict) -> list[Requirement]:
    """The project's dependencies and those of its extras; an extra that names another extra adds none."""
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


def locked(lock: str) -> dict[str, list[Requirement]]:
    """The lock by package; one that has no version for every Python or system has several lines."""
    lines = defaultdict(list)
    for line in lock.splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            lines[canonicalize_name(requirement.name)].append(requirement)
    return lines


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate()


def lock_faults(project: dict, lock: str) -> Iterator[str]:
    """What the project asks for and the lock does not give."""
    lines = locked(lock)
    for requirement in required(project):
        versions = [line.specifier for line in lines[canonicalize_name(requirement.name)]]
        if not versions:
            yield f"{requirement.name} is not locked"
        for exact in versions:
            if not requirement.specifier.contains(str(exact).removeprefix("==")):
                yield f"{requirement.name} is locked to {exact}, not to {requirement.specifier}"


def conda_faults(project: dict, lock: str, conda: dict) -> Iterator[str]:
    """What conda would install otherwise than pip does."""
    *packages, last = conda["dependencies"]
    if last != {"pip": ["-c constraints.txt", "-e .[lab]"]}:
        yield f"pip is told {last}"
    versions = dict(package.partition("=")[::2] for package in packages)
    if Version(versions.pop("python")) not in SpecifierSet(project["requires-python"]):
        yield f"its Python is not {project['requires-python']}"
    yield from (f"{name} comes from conda, not from the lock" for name in versions if name in locked(lock))


def installed_faults(project: dict, lock: str, installed: dict[str, str]) -> Iterator[str]:
    """What is installed here in another version than the lock's, or not at all."""
    for requirement in map(Requirement, project["dependencies"]):
        if applies(requirement) and canonicalize_name(requirement.name) not in installed:
            yield f"{requirement.name} is not installed"
    for name, lines in locked(lock).items():
        for line in filter(applies, lines):
            # "==2.13.0" contains 2.13.0+cpu: PyTorch's builds differ in that label alone.
            if name in installed and installed[name] not in line.specifier:
                yield f"{name} {installed[name]} is installed, the lock has {line.specifier}"


def test_lock_gives_what_the_project_asks_for():
    assert list(lock_faults(PROJECT, LOCK)) == []


def test_conda_installs_the_same():
    assert list(conda_faults(PROJECT, LOCK, CONDA)) == []


def test_this_environment_is_the_locked_one():
    assert list(installed_faults(PROJECT, LOCK, INSTALLED)) == []


def test_makefile_looks_for_the_pythons_that_the_project_supports():
    bounds = r"\((\d+), (\d+)\) <= sys.version_info < \((\d+), (\d+)\)"
    [found] = re.findall(bounds, (ROOT / "Makefile").read_text())
    assert ">={}.{},<{}.{}".format(*found) == PROJECT["requires-python"]


def test_lock_names_packages_and_nothing_else():
    assert all(re.fullmatch(r"#.*|[a-z0-9.-]+==[\w.]+( ; .*)?", line) for line in LOCK.splitlines())


SMALL = {
    "name": "small",
    "requires-python": ">=3.11",
    "dependencies": ["torch==2.13.0"],
    "optional-dependencies": {"lab": ["ipykernel>=7.1"], "test": ["small[lab]"]},
}
SMALL_LOCK = "# made by hand\ntorch==2.13.0\nipykernel==7.4.0 ; python_version >= '3'\n"


@pytest.mark.parametrize(
    ("lock", "fault"),
    [
        (SMALL_LOCK, None),
        (
            SMALL_LOCK.replace("torch==2.13.0", "torch==2.13.1"),
            "torch is locked to ==2.13.1, not to ==2.13.0",
        ),
        (SMALL_LOCK.replace("7.4.0", "7.0.1"), "ipykernel is locked to ==7.0.1, not to >=7.1"),
        (SMALL_LOCK + "torch==2.12.0 ; python_version < '3'", "torch is locked to ==2.12.0, not to ==2.13.0"),
        ("torch==2.13.0", "ipykernel is not locked"),
    ],
)
def test_a_lock_that_drifted_is_noticed(lock, fault):
    assert list(lock_faults(SMALL, lock)) == ([fault] if fault else [])


@pytest.mark.parametrize(
    ("dependencies", "fault"),
    [
        (["python=3.12", "pip"], None),
        (["python=3.10", "pip"], "its Python is not >=3.11"),
        (["python=3.12", "pip", "torch=2.13.0"], "torch comes from conda, not from the lock"),
    ],
)
def test_a_conda_environment_that_drifted_is_noticed(dependencies, fault):
    conda = {"dependencies": [*dependencies, {"pip": ["-c constraints.txt", "-e .[lab]"]}]}
    assert list(conda_faults(SMALL, SMALL_LOCK, conda)) == ([fault] if fault else [])


def test_a_conda_environment_without_the_lock_is_noticed():
    conda = {"dependencies": ["python=3.12", {"pip": ["-e .[lab]"]}]}
    assert list(conda_faults(SMALL, SMALL_LOCK, conda)) == ["pip is told {'pip': ['-e .[lab]']}"]


@pytest.mark.parametrize(
    ("installed", "fault"),
    [
        ({"torch": "2.13.0"}, None),
        ({"torch": "2.13.0+cpu"}, None),
        ({"torch": "2.13.1"}, "torch 2.13.1 is installed, the lock has ==2.13.0"),
        ({"torch": "2.13.0", "ipykernel": "7.3"}, "ipykernel 7.3 is installed, the lock has ==7.4.0"),
        ({}, "torch is not installed"),
    ],
)
def test_an_environment_that_drifted_is_noticed(installed, fault):
    assert list(installed_faults(SMALL, SMALL_LOCK, installed)) == ([fault] if fault else [])
