"""The rules of the house: who may import whom, and what no file of it may mention."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
from checkout import ROOT, files
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Each room imports from its own floor and those before it, never from one after it.
FLOORS = [
    {"counts", "tensors", "units", "models", "text"},
    {"kl"},
    {"reference"},
    {"step"},
    {"memory", "ranks"},
    {"comparison", "train", "advisor"},
    {"view", "lessons", "doctor"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ONLY_IN = {
    "anywidget": ("refkl_lib/view/",),
    "ipywidgets": ("refkl_lib/view/",),
    "matplotlib": ("refkl_lib/view/",),
    "peft": ("refkl_lib/reference/adapter.py",),
    "deepspeed": ("refkl_lib/reference/zero3.py", "refkl_lib/ranks/"),
}
LESSON_PACKAGES = {"refkl_lib", "torch", "transformers", "peft", "deepspeed", "copy", "tempfile"}
SLOW_OR_OPTIONAL = ["torch", "transformers", "peft", "deepspeed", "accelerate", "matplotlib", "ipywidgets"]

# A machine's own paths and package registries' hosts; written so that this file does not mention them.
UNMENTIONABLE = re.compile(r"/(?:root)/\w|pypi(?:\.)org|python(?:hosted)|npmjs(?:\.)org|deb(?:\.)debian")

LIBRARY = sorted(path for path in files() if path.is_relative_to(ROOT / "refkl_lib") and path.suffix == ".py")
PYTHON = sorted(path for path in files() if path.suffix == ".py")
PROVIDERS = packages_distributions()
NOTEBOOKS = sorted(path for path in files() if path.suffix == ".ipynb")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(source: str, package: str = "") -> Iterator[str]:
    """Every dotted name that Python source imports, at whatever depth; relative ones from `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package(file: str) -> str:
    return ".".join(Path(file).parent.parts)


def room(file: str) -> str:
    """refkl_lib/kl/exact.py and refkl_lib.kl.exact are both in the room "kl"."""
    return re.split(r"[/.]", file)[1]


def rooms_entered(file: str, source: str) -> set[str]:
    names = imports(source, package(file))
    return {room(found) for found in names if found.startswith("refkl_lib.")} - {room(file)}


def floor_faults(file: str, source: str) -> Iterator[str]:
    """Where a file imports from a room above its own, or from one that has no floor yet."""
    for entered in sorted(rooms_entered(file, source)):
        if entered not in FLOOR or room(file) not in FLOOR:
            yield f"{file} imports {entered}: give {room(file)} and {entered} a floor in FLOORS"
        elif FLOOR[entered] > FLOOR[room(file)]:
            yield f"{file} imports {entered}, which is above it"


def package_faults(file: str, source: str) -> Iterator[str]:
    """Where a file imports a package that belongs to other files alone."""
    for found in sorted({found.split(".")[0] for found in imports(source)} & ONLY_IN.keys()):
        if not file.startswith(ONLY_IN[found]):
            yield f"{file} imports {found}, which is for {' and '.join(ONLY_IN[found])}"


def notebook_imports(path: Path) -> set[str]:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    sources = [TransformerManager().transform_cell(cell.source) for cell in cells]  # `%` and `!` become calls
    return {found.split(".")[0] for source in sources for found in imports(source)}


def test_the_rules_have_something_to_hold_for():
    assert {"tensors", "kl", "reference", "memory", "view"} <= {room(name(path)) for path in LIBRARY}


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_arrows_point_down(path):
    assert list(floor_faults(name(path), path.read_text())) == []


def test_no_files_import_each_other_in_a_circle():
    modules = {name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in LIBRARY}
    graph = {
        module: {
            prefix
            for found in imports(path.read_text(), package(name(path)))
            for prefix in [found, found.rpartition(".")[0]]
            if prefix in modules
        }
        for module, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # CycleError names the modules


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_packages_are_imported_where_they_belong(path):
    assert list(package_faults(name(path), path.read_text())) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_import_the_library_and_what_the_lesson_is_about(path):
    assert notebook_imports(path) <= LESSON_PACKAGES


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_packages_that_are_imported_are_dependencies(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    known = {"refkl_lib", "tools", "tests", *(path.stem for path in PYTHON), *sys.stdlib_module_names}
    names = imports(path.read_text(), package(name(path)))
    for outside in {found.split(".")[0] for found in names} - known:
        providers = map(canonicalize_name, PROVIDERS.get(outside, []))
        assert declared & set(providers), f"{outside} is not in pyproject.toml"


@pytest.mark.parametrize("path", sorted(files()), ids=name)
def test_files_speak_of_the_project_alone(path):
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return  # a picture
    assert not UNMENTIONABLE.search(text)


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_the_library_imports_nothing_slow():
    loaded = python("import refkl_lib, sys; print(*sys.modules)").split()
    assert "refkl_lib" in loaded
    assert not set(SLOW_OR_OPTIONAL) & set(loaded)


def test_everything_public_can_be_had_without_deepspeed():
    # None in sys.modules makes Python say that there is no such module.
    got = python(
        "import sys; sys.modules['deepspeed'] = None\n"
        "import refkl_lib; print(*(getattr(refkl_lib, name).__name__ for name in refkl_lib.__all__))"
    )
    assert "create_reference_model" in got.split()


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import refkl_lib.kl.exact", None),
        ("from refkl_lib.memory import ledger", "refkl_lib/kl/x.py imports memory, which is above it"),
        ("def f():\n    from refkl_lib import view", "refkl_lib/kl/x.py imports view, which is above it"),
        ("from ..train import Trainer", "refkl_lib/kl/x.py imports train, which is above it"),
        ("from . import exact", None),
        ("import refkl_lib.attic", "refkl_lib/kl/x.py imports attic: give kl and attic a floor in FLOORS"),
    ],
)
def test_an_arrow_that_points_up_is_noticed(source, fault):
    assert list(floor_faults("refkl_lib/kl/x.py", source)) == ([fault] if fault else [])


@pytest.mark.parametrize("source", ["import deepspeed", "def f():\n    from deepspeed.ops import adam"])
def test_a_package_in_the_wrong_file_is_noticed(source):
    assert list(package_faults("refkl_lib/ranks/worker.py", source)) == []
    assert len(list(package_faults("refkl_lib/reference/clone.py", source))) == 1


def test_magics_do_not_hide_a_notebooks_imports(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("%time import requests", "!ls\nfrom torch import nn")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "small.ipynb")
    assert "torch" in notebook_imports(tmp_path / "small.ipynb")


@pytest.mark.parametrize("path", ["see py" + "pi.org", "~ is /" + "root/x"])
def test_a_mention_is_noticed(path):
    assert UNMENTIONABLE.search(path)
