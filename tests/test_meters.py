"""The meters against memory that is really taken, and machines that this one is not."""

import mmap
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from refkl_lib import machine, read_meter
from refkl_lib.memory import meters
from refkl_lib.memory.meters import Gpu, Machine, Meter
from refkl_lib.units import GIB, MIB

HOLD = "held = b'x' * (64 * 2**20); print('holding', flush=True); input()"


@pytest.fixture
def child():
    """A process that holds 64 MiB until it is let go."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def test_memory_that_is_taken_is_read():
    before = read_meter(pss=False)
    # Not a tensor's: the allocator may have kept memory that an earlier test gave back.
    with mmap.mmap(-1, 64 * MIB) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        after = read_meter(pss=False)
    assert after.rss - before.rss == pytest.approx(64 * MIB, rel=0.1)


def test_a_child_counts_and_stops_counting_when_it_is_gone(child):
    with_child = read_meter(pss=False)
    child.kill()
    child.wait()
    assert with_child.rss - read_meter(pss=False).rss > 64 * MIB


@pytest.mark.skipif(not psutil.LINUX, reason="only Linux knows the PSS")
def test_shared_pages_make_the_pss_smaller_than_the_rss(child):
    meter = read_meter()
    assert 64 * MIB < meter.pss < meter.rss


def test_the_pss_is_only_read_when_asked_for():
    assert read_meter(pss=False).pss is None


def test_a_child_that_dies_while_it_is_read_counts_nothing(child, monkeypatch):
    gone = psutil.Process(child.pid)
    child.kill()
    child.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [gone])
    meter = read_meter()
    assert meter.rss == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_a_process_that_may_not_be_looked_at_counts_nothing(monkeypatch):
    def refuse(process):
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "memory_info", refuse)
    assert read_meter(pss=False).rss == 0


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: [3, 4][gpu])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: [30, 40][gpu])
    properties = [SimpleNamespace(name=f"GPU {letter}", total_memory=80 * GIB) for letter in "AB"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)


def test_all_gpus_are_summed(two_gpus):
    meter = read_meter(pss=False)
    assert (meter.cuda_allocated, meter.cuda_reserved) == (7, 70)
    assert machine().gpus == (Gpu("GPU A", 80 * GIB), Gpu("GPU B", 80 * GIB))


def test_without_a_gpu_there_is_no_such_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    meter = read_meter(pss=False)
    assert meter.cuda_allocated is meter.cuda_reserved is None
    assert machine().gpus == ()


def test_a_reading_names_what_was_read():
    assert str(Meter(512 * MIB, None, None, None)) == "RSS 512.0 MiB"
    everything = Meter(512 * MIB, 256 * MIB, 2 * GIB, 3 * GIB)
    assert str(everything) == "RSS 512.0 MiB, PSS 256.0 MiB, CUDA allocated 2.00 GiB, CUDA reserved 3.00 GiB"


@pytest.mark.parametrize(
    ("limits", "cores", "memory", "available"),
    [
        ({}, 8, 16 * GIB, 12 * GIB),
        ({"cpu.max": "max 100000", "memory.max": "max", "memory.current": "5"}, 8, 16 * GIB, 12 * GIB),
        ({"cpu.max": "200000 100000"}, 2, 16 * GIB, 12 * GIB),
        ({"cpu.max": "50000 100000"}, 1, 16 * GIB, 12 * GIB),
        ({"memory.max": f"{2 * GIB}", "memory.current": f"{GIB}"}, 8, 2 * GIB, GIB),
        ({"memory.max": f"{2 * GIB}", "memory.current": f"{3 * GIB}"}, 8, 2 * GIB, 0),
        ({"memory.max": f"{64 * GIB}", "memory.current": f"{GIB}"}, 8, 16 * GIB, 12 * GIB),
    ],
)
def test_cores_and_memory_are_those_of_the_container(tmp_path, monkeypatch, limits, cores, memory, available):
    for name, text in limits.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(meters, "CGROUP", tmp_path)
    monkeypatch.setattr(meters.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    system = SimpleNamespace(total=16 * GIB, available=12 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: system)
    found = machine()
    assert (found.cores, found.memory, found.available) == (cores, memory, available)


def test_packages_and_compiler_that_are_missing_are_said_to_be(monkeypatch):
    monkeypatch.setattr(meters, "PACKAGES", ("torch", "a-package-nobody-made"))
    monkeypatch.setenv("CXX", "a-compiler-nobody-made")
    found = machine()
    assert found.versions == {"torch": torch.__version__, "a-package-nobody-made": None}
    assert not found.has_compiler
    monkeypatch.setenv("CXX", sys.executable)
    assert machine().has_compiler


def test_versions_are_read_without_importing_the_packages():
    code = (
        "import sys; from refkl_lib import machine; print(machine());"
        "assert not {'transformers', 'peft', 'deepspeed'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_machine_is_a_table_of_fixed_layout():
    versions = {"torch": "2.13.0", "deepspeed": None}
    shown = Machine("Darwin", 8, 16 * GIB, 4 * GIB, (Gpu("A", GIB), Gpu("B", GIB)), "3.12.1", versions, False)
    assert str(shown).splitlines() == [
        "system            Darwin",
        "processor cores   8",
        "memory            16.00 GiB, 4.00 GiB available",
        "GPU               A (1.00 GiB), B (1.00 GiB)",
        "Python            3.12.1",
        "torch             2.13.0",
        "deepspeed         not installed",
        "C++ compiler      none",
    ]
