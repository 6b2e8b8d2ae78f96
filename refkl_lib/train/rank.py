"""What each rank of `launch_train` runs: it makes the run anew, trains it, and leaves its history in a file."""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cloudpickle
import torch

from refkl_lib.ranks.events import tell
from refkl_lib.ranks.training import connect
from refkl_lib.ranks.worker import telling
from refkl_lib.train.launch import MAKE, found_by
from refkl_lib.train.records import Record
from refkl_lib.train.run import TrainRun


def main() -> None:
    """Train what was sent, as the command line says."""
    parser = argparse.ArgumentParser(prog="refkl_lib.train.rank", description="One rank of launch_train.")
    parser.add_argument("--folder", required=True, help="where the function waits, and the history is left")
    parser.add_argument("--iterations", type=int, required=True, help="of the training")
    settings = parser.parse_args()
    with telling():
        connect()
        run = made(settings.folder)
        tell("loaded")
        reference_bytes = run.reference.owned_bytes()
        run.train(settings.iterations, on_record=_teller())
        found = {"reference_bytes": reference_bytes, "history": [asdict(record) for record in run.history]}
        found_by(settings.folder, int(os.environ["RANK"])).write_text(json.dumps(found))
        tell("done")
        torch.distributed.destroy_process_group()


def made(folder: str) -> TrainRun:
    """Return the run that the function in `folder` makes here, if ranks can share its reference."""
    run = cloudpickle.loads((Path(folder) / MAKE).read_bytes())("zero3")
    if not isinstance(run, TrainRun):
        raise TypeError(f'make("zero3") returned a {type(run).__name__}, but must return a TrainRun')
    if run.reference.strategy != "zero3":
        raise ValueError(
            f'make("zero3") keeps its reference by "{run.reference.strategy}", which ranks do not share: it has to '
            "hand its argument on, create_reference(policy, strategy)"
        )
    return run


def _teller() -> Callable[[Record], None]:
    started = time.perf_counter()

    def tell_step(record: Record) -> None:
        nonlocal started
        now = time.perf_counter()
        tell("step", step=record.iteration, kl=record.kl, seconds=now - started)
        started = now

    return tell_step


if __name__ == "__main__":
    main()
