"""Start real ranks: the DeepSpeed launcher, from a notebook or a program.

    run = launch_zero3(ranks=2, model="smollm2", lora_rank=8, on_event=print_event)
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
from typing import Any, NamedTuple

import torch

from refkl_lib.counts import check_counts
from refkl_lib.ranks.events import Event
from refkl_lib.ranks.job import Job, RankError
from refkl_lib.ranks.run import RankReport, ZeRO3Run, put_together
from refkl_lib.ranks.save import check_folder
from refkl_lib.reference.zero3 import Offload, reference_config
from refkl_lib.step import checked_beta
from refkl_lib.text import sample_batch
from refkl_lib.units import MIB

__all__ = ["RankError", "RankReport", "ZeRO3Run", "launch_zero3"]

WORKER = "refkl_lib.ranks.worker"
REFERENCES = ("zero3", "adapter", "plain")


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
    reference: str = "zero3",
    offload: Offload | None = None,
    nvme_path: str | os.PathLike[str] | None = None,
    save_to: str | os.PathLike[str] | None = None,
    on_event: Callable[[Event], None] | None = None,
    timeout: float = 600.0,
    worker: str = WORKER,
) -> ZeRO3Run:
    """Train `model` for `steps` steps with a KL penalty, the policy partitioned over `ranks` processes.

    Every rank works on the same `batch` sequences of `seq` tokens, where a real job would give each its own, so
    that the KL is that of a single process. `lora_rank=None` trains all weights. The ranks run on GPUs if there
    are enough, else on the CPU.

    `reference` says how the reference is kept: "zero3" loads the model again, partitioned, and its shards may
    wait in host memory (`offload="cpu"`) or on a disk (`offload="nvme"`, in the folder `nvme_path`); "adapter"
    switches the policy's adapter off, so there is no second model; "plain" loads the model again whole, on every
    rank, for contrast. `save_to` is a folder that gets the trained policy, a model that `load_model` reads; it
    appears when it is complete, or not at all.

    `on_event` is called with each event as it comes: a dict with "event" (started, imported, loaded,
    initialised, step, saved, done), "rank", "at" (`time.time()`) and facts. Between these come "memory" events,
    some five a second, whose "owners" are bytes by owner. `worker` is the module that each rank runs; another
    one has to tell the same events.

    Raises ValueError for arguments that cannot work, before anything starts; RankError if a rank fails, dies or
    is not done after `timeout` seconds; ImportError without deepspeed, RuntimeError where there is no Linux, and
    what `on_event` raises.
    """
    check_system()
    check_counts(ranks=ranks, steps=steps)
    if lora_rank is not None:
        check_counts(lora_rank=lora_rank)
    if not (isinstance(timeout, int | float) and timeout > 0):
        raise ValueError(
            f"timeout is {timeout!r}, but must be more than 0: seconds until a job that is not done is ended"
        )
    _check_reference(reference, lora_rank, offload, nvme_path)
    _check_training(seq, beta)
    sample_batch(model, batch, seq)  # what cannot work had better fail here than in every rank
    settings = {"model": model, "steps": steps, "batch": batch, "seq": seq, "beta": beta}
    settings |= {"learning_rate": learning_rate, "seed": seed, "lora_rank": lora_rank}
    settings |= {"reference": reference, "offload": offload, "nvme_path": nvme_path}
    settings |= {"save_to": None if save_to is None else _checked_folder(save_to, lora_rank)}
    heard = run_ranks(ranks, worker, settings, on_event, timeout)
    return put_together(settings, *heard)


class Heard(NamedTuple):
    """What a job said: its events, when it was started (`time.time()`), the command, all that was printed."""

    events: list[Event]
    started: float
    command: str
    log: str


def run_ranks(
    ranks: int,
    worker: str,
    settings: Mapping[str, Any],
    on_event: Callable[[Event], None] | None,
    timeout: float,
) -> Heard:
    """Run the module `worker` on every rank until all are done; `settings` are its command line, None left out.

    Raises RankError if a rank fails, dies or is not done after `timeout` seconds, and what `on_event` raises.
    """
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    try:
        return _run(ranks, worker, arguments, on_event, timeout)
    except RankError as error:
        # Between choosing a free port and listening on it, somebody else may take it; but hardly twice.
        if "EADDRINUSE" not in error.log:
            raise
        return _run(ranks, worker, arguments, on_event, timeout)


def _run(
    ranks: int,
    worker: str,
    arguments: Sequence[str],
    on_event: Callable[[Event], None] | None,
    timeout: float,
) -> Heard:
    command, env = command_for(ranks, worker, arguments)
    events: list[Event] = []
    started = time.time()
    with Job(command, env) as job:
        for event in job.events(ranks, timeout):
            events.append(event)
            if on_event is not None:
                on_event(event)
    return Heard(events, started, _shown(command, env), job.log)


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
        # A layer is gathered into new memory each time. malloc should keep that memory, not hand it back: most of
        # a step would be page faults. Larger blocks it had better hand back, for in the holes that they leave
        # smaller ones settle, the next large one needs new memory, and a rank takes twice as much as it holds.
        "MALLOC_MMAP_THRESHOLD_": str(2 * MIB),
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


def check_system() -> None:
    """Raise RuntimeError or ImportError where no ranks can run."""
    if sys.platform != "linux":
        raise RuntimeError(
            "real ranks need Linux, where DeepSpeed's launcher runs: on Windows use WSL, on macOS a Linux container"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("real ranks need deepspeed, which is not installed: pip install deepspeed")


def _check_reference(
    reference: str, lora_rank: int | None, offload: Offload | None, nvme_path: str | os.PathLike[str] | None
) -> None:
    if reference not in REFERENCES:
        raise ValueError(f"reference is {reference!r}, but must be one of {REFERENCES}")
    if reference == "adapter" and lora_rank is None:
        raise ValueError('reference="adapter" has no adapter to switch off: train one with lora_rank=8, say')
    if offload is None:
        return
    if reference != "zero3":
        raise ValueError(f'offload={offload!r} is for the shards of reference="zero3", but reference is {reference!r}')
    reference_config({}, offload=offload, nvme_path=nvme_path)


def _checked_folder(save_to: str | os.PathLike[str], lora_rank: int | None) -> Path:
    if lora_rank is not None:
        raise ValueError(
            f"save_to writes a whole model, but lora_rank={lora_rank} trains an adapter: train all weights "
            "(lora_rank=None), or leave save_to out"
        )
    return check_folder(save_to)


def _check_training(seq: int, beta: float) -> None:
    check_counts(2, "a token, and the one that follows it", seq=seq)
    checked_beta(beta)
