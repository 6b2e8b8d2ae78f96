"""Run the benchmarks and keep what they print: `make bench`.

    python -m tools.bench benchmarks/RESULTS.md benchmarks/*.py

Every benchmark prints its own table. The file has each with the command that made it, and says on what machine; it is
written at the end, whole or not at all. A benchmark that fails ends the run, and leaves the file as it was.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from refkl_lib import machine

ROOT = Path(__file__).parents[1]
HEAD = """# What was measured

By `make bench`, which runs each command below and writes this file. Compare within a table: its rows took turns in one
run. Seconds from another day or another machine differ by more than the rows do.
"""


def results(commands: Sequence[str]) -> Iterator[str]:
    """Yield the file's paragraphs, each benchmark's when it is done; what it prints is shown as it comes.

    Raises CalledProcessError if a benchmark fails.
    """
    yield HEAD
    yield f"```\n{machine()}\n```\n"
    for command in commands:
        print(f"== {command}", flush=True)
        yield f"## `python {command}`\n\n```\n{output_of(command)}```\n"


def output_of(command: str) -> str:
    """Return what a script prints, and print it meanwhile."""
    running = subprocess.Popen(
        [sys.executable, *shlex.split(command)], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert running.stdout is not None
    with running:
        lines = []
        for line in running.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)
    return "".join(lines)


def write(file: Path, text: str) -> None:
    """Put the text in the file, whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as unfinished:
        unfinished.write(text)
    os.chmod(unfinished.name, 0o644)
    os.replace(unfinished.name, file)


def main(arguments: Sequence[str]) -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("commands", nargs="+", help="a script, with its arguments in the same word")
    options = parser.parse_args(arguments)
    write(options.file, "\n".join(results(options.commands)))


if __name__ == "__main__":
    main(sys.argv[1:])
