"""Measure what it costs to look: training with a live panel beside training without, in a real kernel.

    python benchmarks/panel_overhead.py
    python benchmarks/panel_overhead.py --batch 4 --tokens 256 --rounds 20

With and without take turns. A step and the empty mode are those of ledger_overhead.py; an iteration is notebook 07's:
sample, score, learn. The last lines are about an hour: as many drawings of a MemoryPanel as an hour brings, as fast as
they come, and the kernel's memory after a tenth of them and after all.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nbformat
import psutil
import torch
from ledger_overhead import PassOn, Watcher, seconds_of, shuffled, training_step
from nbclient import NotebookClient

from refkl_lib import MemoryPanel, TrainPanel, TrainRun

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "07_capstone.ipynb"
ITERATIONS = 10  # as many as there; the panel weighs two of them
HOUR = 3600  # seconds
MIB = 2**20


def steps(rounds: int, batch: int, tokens: int) -> None:
    """Print how long a training step takes with nothing, an empty dispatch mode, a ledger and a MemoryPanel."""
    step, ledger = training_step("smollm2", batch, tokens)
    watchers: dict[str, Watcher] = {
        "nothing": nullcontext,
        "empty mode": PassOn,
        "ledger": lambda: ledger,
        "MemoryPanel": MemoryPanel,
    }
    times: dict[str, list[float]] = {name: [] for name in watchers}
    for turn in range(rounds + 1):
        for name, watcher in shuffled(watchers):
            with watcher():
                seconds, _ = seconds_of(step)
            if turn:  # the first step of each kind makes the optimizer's state and fills caches
                times[name].append(seconds)
    report(f"a step, {batch} x {tokens}", times)


async def iterations(make_run: Callable[..., TrainRun], rounds: int) -> None:
    """Print how long an iteration of the capstone takes with and without a TrainPanel."""
    times: dict[str, list[float]] = {"nothing": [], "TrainPanel": []}
    started = 0.0

    def made(**chosen: Any) -> TrainRun:
        nonlocal started
        run = make_run(**chosen)
        started = time.perf_counter()
        return run

    for _ in range(rounds):
        made().train(ITERATIONS)
        times["nothing"].append((time.perf_counter() - started) / ITERATIONS)
        with TrainPanel(made, ITERATIONS) as panel:
            await panel.train()
            times["TrainPanel"].append((time.perf_counter() - started) / ITERATIONS)
    report("an iteration", times)


def report(what: str, times: dict[str, list[float]]) -> None:
    """Print a table of medians."""
    bare = statistics.median(times["nothing"])
    print(f"{what:<20}{'seconds':>10}{'ratio':>8}")
    for name, seconds in times.items():
        print(f"{name:<20}{statistics.median(seconds):>10.3f}{statistics.median(seconds) / bare:>8.3f}")


def hour() -> None:
    """Print this kernel's memory while a MemoryPanel draws as often as in an hour."""
    drawings = HOUR * 3
    seen = 0

    def count(_: object) -> None:
        nonlocal seen
        seen += 1

    with MemoryPanel(rate=10_000) as panel:
        panel.widget.observe(count, "value")
        for goal in (drawings // 10, drawings):
            while seen < goal:
                panel.own("policy", torch.ones(seen % 1000 + 1))
                time.sleep(0.001)
            print(f"after {seen:>6,} drawings {psutil.Process().memory_info().rss / MIB:>8.0f} MiB")


def capstone_code() -> list[str]:
    """Return the notebook's cells up to the one that defines `make_run`."""
    code = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    last = next(place for place, source in enumerate(code) if "def make_run" in source)
    return code[: last + 1]


def main() -> None:
    """Measure in a kernel, and print what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2, help="sequences in the step's batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a sequence")
    options = parser.parse_args()
    rounds = options.rounds
    print(f"smollm2, medians of {rounds} rounds")
    measured = [
        f"steps({rounds}, {options.batch}, {options.tokens})",
        f"await iterations(make_run, {rounds})",
        "hour()",
    ]
    sources = [*capstone_code(), "from panel_overhead import *", *measured]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": Path(__file__).parent}}).execute()
    for cell in notebook.cells[-len(measured) :]:
        print(*(output.text for output in cell.outputs if output.output_type == "stream"), sep="", end="")


if __name__ == "__main__":
    main()
