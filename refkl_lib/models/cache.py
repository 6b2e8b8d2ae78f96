"""The folder in which models wait, and how a new one gets there: whole, or not at all."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ORIGIN = "origin.json"  # beside the weights; says where they come from
CHECKOUT = Path(__file__).resolve().parents[2]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last is what `ulimit -f` sets
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class ModelUnavailableError(RuntimeError):
    """A model exists but is not here, and could not be brought here now; nothing is left half-written."""


def cache_folder() -> Path:
    """Return the folder that holds the kit's models.

    It is `$REFKL_CACHE` if that is set, else `.cache` in the checkout that this library is run from, else
    `refkl` in the user's cache folder.
    """
    if chosen := os.environ.get("REFKL_CACHE"):
        return Path(chosen).expanduser().absolute()
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "refkl"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder `name`; if there is none, `build(folder)` fills an empty one first.

    The folder gets its name when it is complete and on disk, never before. Of several processes that want it
    at once, one builds and the others wait. Raises ModelUnavailableError if the disk is full or read-only.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    with explained_disk_errors(target.parent, "set REFKL_CACHE to another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(name):
            if not target.is_dir():
                write_whole(target, build)
    return target


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with an empty folder beside `target`, which gets that name when all of it is on disk.

    `target` must not exist, or be empty. No other process may write it at the same time.
    """
    # We are alone with this name, so what lies under it was left by a process that died.
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        for path in filter(Path.is_file, partial.rglob("*")):
            flush(path)
            path.chmod(0o644)  # safetensors shuts others out, but a class may share one cache
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write to a folder what `from_pretrained` reads from it.

    The files are those of `model.save_pretrained`. That would import DeepSpeed where it is installed, which
    takes seconds and writes to the screen.
    """
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def note_origin(folder: Path, origin: str, weights: str) -> None:
    """Write down where the weights in a folder come from, and what they are (it ends "The weights are …")."""
    note = json.dumps({"from": origin, "weights": weights}, indent=2)
    (folder / ORIGIN).write_text(note + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Return when a file's bytes are on disk: a rename that outlived them would name an empty file."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def explained_disk_errors(folder: Path, elsewhere: str) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into ModelUnavailableError.

    Its message names the folder, and says how to write `elsewhere`.
    """
    try:
        yield
    except Exception as error:
        if _is(error, FULL):
            trouble = "the disk (or your quota on it) is full; free some space there"
        elif _is(error, FORBIDDEN):
            trouble = "you may not write there; make it writable"
        else:
            raise
        raise ModelUnavailableError(f"no model could be written to {folder}: {trouble}, or {elsewhere}") from error


def _is(error: Exception, codes: tuple[int, ...]) -> bool:
    # Libraries written in Rust (safetensors, tokenizers) pass on what the system said as text alone.
    as_text = any(f"(os error {code})" in str(error) for code in codes)
    return as_text or (isinstance(error, OSError) and error.errno in codes)


def _alone(name: str) -> AbstractContextManager[object]:
    """Return a block that one process at a time is in; the system ends it for a process that dies."""
    lock = FileLock(cache_folder() / f".{name}.lock")
    try:
        return lock.acquire(timeout=5)
    except Timeout:
        print(f"Another process is making {name}; waiting for it.", file=sys.stderr, flush=True)
        return lock.acquire()
