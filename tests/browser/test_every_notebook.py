"""No notebook is left out, and the runs leave nothing beside them."""

from importlib import import_module
from pathlib import Path

from .notebook import NOTEBOOKS, Notebook


def test_every_notebook_is_opened() -> None:
    for file in Path(__file__).parent.glob("test_[0-9]*.py"):
        import_module(f"{__package__}.{file.stem}")
    assert sorted(case.name for case in Notebook.__subclasses__()) == NOTEBOOKS


def test_the_runs_left_nothing_beside_the_notebooks(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "notebooks").glob("[!.]*")) == NOTEBOOKS
