"""The same training on real ranks, with a reference that they share.

shared = launch_train(make_run, iterations=3)     # on each of two ranks: make_run("zero3").train(3)
shared.history                                    # as of any other run
shared.reference_bytes                            # what each rank holds of the reference
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cloudpickle

from refkl_lib.counts import check_counts
from refkl_lib.ranks.events import Event
from refkl_lib.ranks.launch import check_system, run_ranks
from refkl_lib.train.records import Record
from refkl_lib.train.run import TrainRun

WORKER = "refkl_lib.train.rank"
MAKE = "make.pickle"  # in the folder through which a function goes to the ranks, and what they found comes back


@dataclass(frozen=True)
class SharedRun:
    """A finished training of several ranks: its history, which is each rank's, and each one's bytes of reference."""

    history: list[Record]
    reference_bytes: tuple[int, ...]


def launch_train(
    make: Callable[[str], TrainRun],
    iterations: int,
    ranks: int = 2,
    *,
    on_event: Callable[[Event], None] | None = None,
    timeout: float = 600.0,
) -> SharedRun:
    """Start `ranks` processes, train in each what `make("zero3")` returns there, and return what came of it.

    `make` goes to the ranks by value, with all that it uses of a notebook (cloudpickle). There it has to keep its
    reference by `create_reference(policy, "zero3")`, in pieces over the ranks. Every rank has a policy of its
    own, whole, and throws the same dice, so all write the same texts and take the same steps; a real job would give
    each rank texts of its own.

    Raises ValueError if `iterations` or `ranks` is less than 1, or if the ranks came apart; what cloudpickle raises if
    `make` cannot be sent; RankError, RuntimeError and ImportError as `launch_zero3` does.
    """
    check_counts(iterations=iterations, ranks=ranks)
    check_system()
    with tempfile.TemporaryDirectory(prefix="refkl-") as folder:
        (Path(folder) / MAKE).write_bytes(cloudpickle.dumps(make))
        run_ranks(ranks, WORKER, {"folder": folder, "iterations": iterations}, on_event, timeout)
        found = [json.loads(found_by(folder, rank).read_text()) for rank in range(ranks)]
    first, *others = ([Record(**record) for record in one["history"]] for one in found)
    for rank, history in enumerate(others, start=1):
        if history != first:
            raise ValueError(
                f"rank {rank} did not train as rank 0 did: make has to do the same on every rank, so begin it with "
                "torch.manual_seed(0)"
            )
    return SharedRun(first, tuple(one["reference_bytes"] for one in found))


def found_by(folder: str, rank: int) -> Path:
    """Return the file in which a rank leaves what it found."""
    return Path(folder) / f"rank-{rank}.json"
