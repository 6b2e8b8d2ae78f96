"""What a rank says on its way: one line of JSON an event, on standard output among all that libraries print."""

import json
import os
import sys
import time
from typing import Any

Event = dict[str, Any]
MARK = "refkl "


def tell(event: str, **facts: Any) -> None:
    """Write one event to standard output: its name, this process's rank, the time in seconds, the facts."""
    line = json.dumps({"event": event, "rank": int(os.environ["RANK"]), "at": time.time(), **facts})
    # All ranks share a pipe, and a print may have left its line open. One write of up to 4,096 bytes arrives
    # in one piece (POSIX's PIPE_BUF), and the break before it gives the event a line of its own.
    os.write(sys.stdout.fileno(), f"\n{MARK}{line}\n".encode())


def read_event(line: str) -> Event | None:
    """Return the event that a line of output is, None if it is something else."""
    if not line.startswith(MARK):
        return None
    try:
        return json.loads(line.removeprefix(MARK))
    except ValueError:
        return None


def describe(event: Event) -> str:
    """Return one line for people, "rank 1: step 2, KL 0.196, 3.4 s"; none for "memory", which comes all the time."""
    if event["event"] == "memory":
        return ""
    line = f"rank {event['rank']}: {event['event']}"
    if event["event"] == "step":
        line += f" {event['step']}, KL {event['kl']:.3f}, {event['seconds']:.1f} s"
    return line


def print_event(event: Event) -> None:
    """Print one line for people at once; for `launch_zero3(on_event=print_event)`."""
    if line := describe(event):
        print(line, flush=True)
