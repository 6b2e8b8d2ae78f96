"""Measure what a class on one server needs: many kernels, each with the first notebook up to its first picture.

    python benchmarks/classroom.py                    20 learners on the pocket model
    python benchmarks/classroom.py --learners 4 --model smollm2

The kernels start at once and run the same cells, as a class does that is told to begin. Memory is each kernel's PSS,
which splits what they share, at the end, when all have drawn their picture; seconds are from the start of all.
"""

import argparse
import asyncio
import time
from pathlib import Path
from statistics import median

import nbformat
import psutil
from nbclient import NotebookClient
from nbformat import NotebookNode

from refkl_lib.memory.meters import machine
from refkl_lib.units import MIB

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "00_start_here.ipynb"


def up_to_a_picture(model: str) -> NotebookNode:
    """Return the notebook's cells up to the first that draws what it measured, about `model`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    last = next(number for number, cell in enumerate(cells) if "MemoryPanel" in cell.source)
    notebook.cells = cells[: last + 1]
    for cell in notebook.cells:
        cell.source = cell.source.replace('"smollm2"', f'"{model}"')
        cell.outputs = []
    return notebook


async def learner(model: str, begun: float, pictures: list[float], learners: int) -> int:
    """Run the cells in a kernel of its own; return its PSS in bytes when all have their picture."""
    client = NotebookClient(up_to_a_picture(model), timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}})
    async with client.async_setup_kernel():
        for place, cell in enumerate(client.nb.cells):
            await client.async_execute_cell(cell, place)
        if not any("image/png" in output.get("data", {}) for output in cell.outputs):
            raise RuntimeError(f"no picture after {cell.source!r}")
        pictures.append(time.perf_counter() - begun)
        while len(pictures) < learners:
            await asyncio.sleep(0.1)
        return psutil.Process(client.km.provisioner.process.pid).memory_full_info().pss


async def measure(model: str, learners: int) -> tuple[list[float], list[int]]:
    """Return the seconds to each learner's first picture, and the bytes that each kernel takes."""
    begun, pictures = time.perf_counter(), []
    taken = await asyncio.gather(*(learner(model, begun, pictures, learners) for _ in range(learners)))
    return pictures, taken


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learners", type=int, default=20)
    parser.add_argument("--model", default="pocket")
    options = parser.parse_args()
    pictures, taken = asyncio.run(measure(options.model, options.learners))
    print(f"{options.learners} learners, {options.model}, on {machine().cores} cores")
    print(f"first picture after {median(pictures):.0f} s (median), {max(pictures):.0f} s (the last)")
    print(f"memory {median(taken) / MIB:.0f} MiB each (median), {sum(taken) / MIB:.0f} MiB together")


if __name__ == "__main__":
    main()
