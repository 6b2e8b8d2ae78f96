"""What lets a training go on from where it stopped: whole files, whole steps, and dice for each iteration."""

import pickle
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refkl_lib.models.cache import flush

State = dict[str, Any]


def write_checkpoint(file: str | Path, state: State) -> None:
    """Write `state` (tensors, numbers, texts, and lists and dictionaries of these) to a file, whole or not at all.

    A file of that name is replaced when the new one is on disk, never before. Raises ValueError if its folder does not
    exist.
    """
    target = Path(file)
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist: make it first, or name another one")
    partial = target.with_name(f".{target.name}.partial")
    try:
        torch.save(state, partial)
        flush(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(file: str | Path, like: State) -> State:
    """Return what `write_checkpoint` wrote; only plain data is read, no code that a file may hold.

    Raises FileNotFoundError if there is no such file, and ValueError if it is no checkpoint, or if its "settings" or
    the names and shapes of its "weights" are not those of `like`.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        settings, weights = state["settings"], state["weights"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a checkpoint of a training, or not a whole one ({error})") from error
    for name, value in like["settings"].items():
        if settings.get(name) != value:
            raise ValueError(
                f"{file} is of a training with {name}={settings.get(name)!r}, but this one has {name}={value!r}: "
                "make the run with the same settings, then load"
            )
    if _shapes(weights) != _shapes(like["weights"]):
        odd = sorted(name for name, _ in _shapes(weights).items() ^ _shapes(like["weights"]).items())
        raise ValueError(
            f"{file} is of a training of other weights: they differ in {odd[0]!r} ({len(set(odd))} in all). Make the "
            "run with the same model and adapter, then load"
        )
    return state


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


@contextmanager
def dice(seed: int, iteration: int) -> Iterator[None]:
    """Let what a block samples depend on these two alone; the caller's random state comes back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(1_000_003 * seed + iteration)
        yield


@contextmanager
def unbroken() -> Iterator[None]:
    """Let a Ctrl-C wait for the end of a block, so that weights, optimizer and history stay together."""
    if threading.current_thread() is not threading.main_thread():  # no other thread is interrupted
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)
