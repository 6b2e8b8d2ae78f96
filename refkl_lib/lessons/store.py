"""One small file that remembers predictions, exercises and runs: `progress.json` in the user's data folder.

Delete it to begin anew. Several kernels may write at once.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Record = dict[str, Any]
Progress = dict[str, dict[str, Record]]

_LOCK_SECONDS = 10
# What a record may have; the first field is always there.
_FIELDS: dict[str, dict[str, Any]] = {
    "predictions": {"guess": (int, float), "measured": (int, float), "unit": str},
    "exercises": {"tries": int, "solved": bool},
    "runs": {"reward": (int, float), "kl": (int, float), "settings": str},
}
_ALWAYS = {"predictions", "exercises"}  # a file from before there was a capstone has no runs


def progress_file() -> Path:
    """Return the file's path: in `$REFKL_DATA` if that is set, else in `refkl` in the user's data folder."""
    if chosen := os.environ.get("REFKL_DATA"):
        folder = Path(chosen).expanduser().absolute()
    else:
        folder = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "refkl"
    return folder / "progress.json"


def load() -> Progress:
    """Return what is remembered; a file that cannot be understood is set aside, with a warning."""
    with _locked() as file:
        return _read(file)


@contextmanager
def changed() -> Iterator[Progress]:
    """Give what is remembered, to be changed, and write it when the block ends without an exception.

    Raises RuntimeError if the file cannot be written; then it is as it was.
    """
    with _locked() as file:
        progress = _read(file)
        yield progress
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(progress, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(file)  # whole or not at all


@contextmanager
def _locked() -> Iterator[Path]:
    file = progress_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), timeout=_LOCK_SECONDS):
            yield file
    except Timeout as error:
        raise RuntimeError(f"another process has held {error.lock_file} for {_LOCK_SECONDS} s; end it") from error
    except OSError as error:
        raise RuntimeError(
            f"your progress cannot be kept in {file.parent} ({error}): set REFKL_DATA to a folder that can be written"
        ) from error


def _read(file: Path) -> Progress:
    if not file.exists():
        return {kind: {} for kind in _FIELDS}
    try:
        progress = json.loads(file.read_text(encoding="utf-8"))
        _check(progress)
    except ValueError as error:
        aside = next(p for n in range(1, 10**6) if not (p := file.with_name(f"progress.unreadable-{n}.json")).exists())
        file.rename(aside)
        warnings.warn(f"{file} cannot be read ({error}); it is now {aside.name}, a new one begins", stacklevel=4)
        return {kind: {} for kind in _FIELDS}
    return {kind: {} for kind in _FIELDS} | progress


def _check(progress: Any) -> None:
    if not isinstance(progress, dict) or not _ALWAYS <= progress.keys() <= _FIELDS.keys():
        raise ValueError(f"it must hold {' and '.join(sorted(_ALWAYS))}")
    for kind, records in progress.items():
        fields = _FIELDS[kind]
        if not isinstance(records, dict) or not all(_is_record(record, fields) for record in records.values()):
            raise ValueError(f"its {kind} are not what this version writes")


def _is_record(record: Any, fields: dict[str, Any]) -> bool:
    return (
        isinstance(record, dict)
        and next(iter(fields)) in record
        and all(name in fields and isinstance(value, fields[name]) for name, value in record.items())
    )
