"""Start real ranks: the DeepSpeed launcher, from a notebook or a program.

    run = launch_zero3(ranks=2, model="smollm2", lora_rank=8, on_event=print)
    run              # a line for each rank: bytes by owner, KL of each step
    run.command      # what was run; paste it into a terminal

Whatever happens (a rank fails, is killed or hangs, an interrupt), no process is left when the call is over.
"""

import importlib.metadata
import importlib.util
import os
import shlex
import site
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from refkl_lib.ranks.events import Event
from refkl_lib.ranks.job import Job, RankError
from refkl_lib.ranks.run import RankReport, ZeRO3Run, put_together
from refkl_lib.text import sample_batch

__all__ = ["RankError", "RankReport", "ZeRO3Run", "launch_zero3"]

WORKER = "refkl_lib.ranks.worker"


def launch_zero3(
    ranks: int = 2,
    model: str = "pocket",
    steps: int = 3,
    *,
    lora_rank: int | None = None,
    batch: int = 1,
    seq: int = 64,
    beta: float = 0.1,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_event: Callable[[Event], None] | None = None,
    timeout: float = 600.0,
    worker: str = WORKER,
) -> ZeRO3Run:
    """Train `model` for `steps` steps with a KL penalty, policy and reference partitioned over `ranks` processes.

    Every rank works on the same `batch` sequences of `seq` tokens, where a real job would give each its own, so
    that the KL is that of a single process. `lora_rank=None` trains all weights. The ranks run on GPUs if there
    are enough, else on the CPU. `on_event` is called with each event as it comes: a dict with "event" (started,
    imported, loaded, initialised, step, done), "rank", "at" (`time.time()`) and facts. `worker` is the module
    that each rank runs; another one has to tell the same events.

    Raises ValueError for a count that is too small or a text that is too short, RankError if a rank fails, dies
    or is not done after `timeout` seconds, ImportError without deepspeed, RuntimeError where there is no Linux,
    and what `on_event` raises.
    """
    _check_system()
    _check_counts(ranks=ranks, steps=steps, lora_rank=lora_rank, timeout=timeout)
    sample_batch(model, batch, seq)  # what cannot work had better fail here than in every rank
    settings = {"model": model, "steps": steps, "batch": batch, "seq": seq, "beta": beta}
    settings |= {"learning_rate": learning_rate, "seed": seed, "lora_rank": lora_rank}
    try:
        return _run(ranks, worker, settings, on_event, timeout)
    except RankError as error:
        # Between choosing a free port and listening on it, somebody else may take it; but hardly twice.
        if "EADDRINUSE" not in error.log:
            raise
        return _run(ranks, worker, settings, on_event, timeout)


def _run(
    ranks: int,
    worker: str,
    settings: dict[str, Any],
    on_event: Callable[[Event], None] | None,
    timeout: float,
) -> ZeRO3Run:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    command, env = command_for(ranks, worker, arguments)
    events: list[Event] = []
    started = time.time()
    with Job(command, env) as job:
        for event in job.events(ranks, timeout):
            events.append(event)
            if on_event is not None:
                on_event(event)
    return put_together(settings, events, started, _shown(command, env), job.log)


def command_for(ranks: int, worker: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts the ranks, and the variables it needs beyond this process's own."""
    command = [*_launcher(), *_places(ranks), f"--master_port={_free_port()}", "--no_local_rank"]
    return [*command, "--module", worker, *arguments], _environment(ranks)


def _launcher() -> list[str]:
    """Return the `deepspeed` command that belongs to this Python."""
    script = Path(sys.executable).with_name("deepspeed")
    return [str(script)] if script.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]


def _on_gpus(ranks: int) -> bool:
    return torch.cuda.device_count() >= ranks


def _places(ranks: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and _on_gpus(ranks):
        # With --num_gpus the launcher would take the first GPUs of the machine, visible or not.
        return [f"--include=localhost:{','.join(visible.split(',')[:ranks])}"]
    return [f"--num_gpus={ranks}"]


def _environment(ranks: int) -> dict[str, str]:
    env = _path_to_library() | {
        "TOKENIZERS_PARALLELISM": "false",
        # DeepSpeed decorates a few functions with torch.compile, which takes a second to import; none is used.
        "TORCHDYNAMO_DISABLE": "1",
    }
    if _on_gpus(ranks):
        return env
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return env | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        # A layer is gathered into new memory each time. malloc should keep that memory, not hand it back:
        # most of a step would be page faults.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
    }


def _path_to_library() -> dict[str, str]:
    """Return what lets a rank import this library: nothing, if it is installed."""
    # Looked for where any Python of this environment looks: a checkout holds metadata, too.
    places = [*site.getsitepackages(), site.getusersitepackages()]
    if any(importlib.metadata.distributions(name="refkl-lib", path=places)):
        return {}
    paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths)))}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _shown(command: Sequence[str], env: Mapping[str, str]) -> str:
    """Return the command as one would type it into a shell."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in env.items()), *command])


def _check_system() -> None:
    if sys.platform != "linux":
        raise RuntimeError(
            "real ranks need Linux, where DeepSpeed's launcher runs: on Windows use WSL, on macOS a Linux container"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("real ranks need deepspeed, which is not installed: pip install deepspeed")


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if count is not None and not count > 0:
            raise ValueError(f"{name} is {count}, but must be more than 0")
