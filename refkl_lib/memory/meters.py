"""Meters: what the system says about memory, and about the machine.

The ledger counts what tensors need; a meter reads what the operating system and the GPU's allocator have
handed out. The difference is the interpreter, libraries, caches, and freed memory that was not given back.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from refkl_lib.units import show_bytes

PACKAGES = ("torch", "transformers", "peft", "deepspeed")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Meter:
    """One reading, in bytes; None for what was not asked for or this machine does not have.

    `rss` is resident memory, summed over this process and its descendants: a page that three of them share
    counts three times. `pss` is the same with a shared page split between all that use it (Linux only).
    `cuda_allocated` is what this process's tensors occupy on all GPUs, `cuda_reserved` what the caching
    allocator holds for them.
    """

    rss: int
    pss: int | None
    cuda_allocated: int | None
    cuda_reserved: int | None

    def __str__(self) -> str:
        """Return what was read, as in "RSS 713.2 MiB, PSS 690.0 MiB"."""
        names = ("RSS", "PSS", "CUDA allocated", "CUDA reserved")
        values = (self.rss, self.pss, self.cuda_allocated, self.cuda_reserved)
        read = zip(names, values, strict=True)
        return ", ".join(f"{name} {show_bytes(value)}" for name, value in read if value is not None)


def read_meter(pss: bool = True) -> Meter:
    """Return what the system says now about this process, its descendants and its GPUs.

    A process that ends meanwhile, or that this user may not look at, counts nothing. For the PSS the kernel
    walks through all resident pages, some 10 ms a GiB: leave it out to read several times a second.
    """
    walk = pss and psutil.LINUX
    this = psutil.Process()
    readings = [_resident(process, walk) for process in (this, *this.children(recursive=True))]
    gpus = range(torch.cuda.device_count())
    return Meter(
        rss=sum(resident for resident, _ in readings),
        pss=sum(shared for _, shared in readings) if walk else None,
        cuda_allocated=sum(map(torch.cuda.memory_allocated, gpus)) if gpus else None,
        cuda_reserved=sum(map(torch.cuda.memory_reserved, gpus)) if gpus else None,
    )


def _resident(process: psutil.Process, walk: bool) -> tuple[int, int]:
    """Return (RSS, PSS) of one process; the PSS is 0 without the walk."""
    try:
        if walk:
            info = process.memory_full_info()
            return info.rss, info.pss
        return process.memory_info().rss, 0
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0, 0


@dataclass(frozen=True)
class Gpu:
    """A GPU's name and its memory in bytes."""

    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """What a lesson runs on; memory in bytes, `versions` by package, None for one that is not installed."""

    system: str
    cores: int
    memory: int
    available: int
    gpus: tuple[Gpu, ...]
    python: str
    versions: dict[str, str | None]
    has_compiler: bool

    def __str__(self) -> str:
        """Return a plain-text table: one row for each fact, always in the same order."""
        return "\n".join(f"{name:<18}{value}" for name, value in self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "system", self.system
        yield "processor cores", str(self.cores)
        yield "memory", f"{show_bytes(self.memory)}, {show_bytes(self.available)} available"
        yield "GPU", ", ".join(f"{gpu.name} ({show_bytes(gpu.memory)})" for gpu in self.gpus) or "none"
        yield "Python", self.python
        for package, number in self.versions.items():
            yield package, number or "not installed"
        yield "C++ compiler", "yes" if self.has_compiler else "none"


def machine() -> Machine:
    """Return what this machine has, as far as this process may use it.

    Cores respect the process's affinity, and cores and memory the limits of a container (cgroup v2).
    """
    memory, available = _memory()
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return Machine(
        system=platform.system(),
        cores=_cores(),
        memory=memory,
        available=available,
        gpus=tuple(Gpu(gpu.name, gpu.total_memory) for gpu in gpus),
        python=platform.python_version(),
        versions={package: _version(package) for package in PACKAGES},
        # The compiler that PyTorch, and so DeepSpeed, looks for when it builds an operator.
        has_compiler=shutil.which(os.environ.get("CXX", "c++")) is not None,
    )


def _cores() -> int:
    """Return the cores this process may use, at least one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _limit("cpu.max").partition(" ")
    return max(1, min(allowed, int(quota) // int(period))) if quota.isdigit() else allowed


def _memory() -> tuple[int, int]:
    """Return the bytes of memory in all and still available to this process."""
    system = psutil.virtual_memory()
    limit, used = _limit("memory.max"), _limit("memory.current")
    if not (limit.isdigit() and used.isdigit()):
        return system.total, system.available
    return min(system.total, int(limit)), min(system.available, max(0, int(limit) - int(used)))


def _limit(name: str) -> str:
    """Return what this container's cgroup says under `name`, "max" for no limit."""
    file = CGROUP / name
    return file.read_text().strip() if file.is_file() else "max"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
