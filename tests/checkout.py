"""The files of this checkout: what a clone holds, without what set-up and tools made."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LINES = (ROOT / ".gitignore").read_text().splitlines()
ignored = shutil.ignore_patterns(".git", *(line.strip("/") for line in _LINES if line and line[0] != "#"))


def files() -> Iterator[Path]:
    """Yield every file of the checkout."""
    for folder, folders, names in os.walk(ROOT):
        out = ignored(folder, folders + names)
        folders[:] = [name for name in folders if name not in out]
        yield from (Path(folder) / name for name in names if name not in out)


def copy_to(folder: Path) -> None:
    """Copy the checkout to a folder that does not exist yet."""
    shutil.copytree(ROOT, folder, ignore=ignored)
