"""Faults that come from outside of a job of ranks: each is named, and soon after it no process is left.

What was injected, what was seen and the seconds until all was clean are printed: pytest -rP tests/test_ranks_faults.py
Faults of the worker itself are in test_ranks.py.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from faults import SECONDS_TO_END, descendants, failing, wait_until
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file

from refkl_lib.models import model_folder
from refkl_lib.ranks.events import read_event
from refkl_lib.ranks.job import Job
from refkl_lib.ranks.launch import RankError, launch_zero3, run_ranks

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="real ranks need Linux"),
    pytest.mark.usefixtures("nothing_left"),
]


def is_clean_soon(fault: str, since: float, mark: str) -> bool:
    """Wait until no process is left; `since` is when the fault happened, `time.time()`."""
    wait_until(lambda: descendants(mark) == [])
    seconds = time.time() - since
    print(f"{fault}: clean after {seconds:.1f} s")
    return seconds < SECONDS_TO_END


def told_at(error: RankError) -> float:
    """When a rank told of its error."""
    events = [event for line in error.log.splitlines() if (event := read_event(line))]
    return next(event["at"] for event in events if event["event"] == "error")


# A rank


def test_a_rank_killed_in_an_all_gather_is_named_not_the_one_that_waits_in_it(mark: str) -> None:
    events: list[dict[str, Any]] = []
    error = failing("killed in an all-gather", on_event=events.append)
    assert error.rank == 1
    assert "rank 1 failed: it was killed by SIGKILL" in str(error)
    gathers = [event for event in events if event["event"] == "gathering"]
    # Both have begun the same one, and the job ended in it.
    assert len(set(Counter(event["rank"] for event in gathers).values())) == 1
    assert is_clean_soon(f"killed in all-gather {len(gathers) // 2}", gathers[-1]["at"] + 0.5, mark)


def test_a_rank_without_memory_is_named_with_what_it_asked_for(mark: str) -> None:
    error = failing("out of memory", batch=2, seq=1024)
    assert error.rank == 1
    assert "rank 1 failed: RuntimeError" in str(error)
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate" in str(error)
    assert is_clean_soon("out of memory in rank 1", told_at(error), mark)


# The launcher


def test_without_the_launchers_script_its_module_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tmp_path / "python"
    alone.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    alone.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(alone))
    monkeypatch.setenv("FAULT", "none")
    heard = run_ranks(1, "faulty_worker", {}, None, 60)
    assert "-m deepspeed.launcher.runner" in heard.command
    assert [event["event"] for event in heard.events] == ["started", "done"]


def test_a_launcher_that_cannot_be_started_is_named() -> None:
    with pytest.raises(RankError, match=r"the launcher cannot be started: .* '/no/deepspeed'"):
        run(["/no/deepspeed", "--num_gpus=2"])


def test_a_launcher_that_ends_at_once_has_the_last_word() -> None:
    with pytest.raises(RankError, match=r"the launcher ended with code 1 before .*\n\nno hostfile, no ranks"):
        run([sys.executable, "-c", "raise SystemExit('no hostfile, no ranks')"])


def run(command: list[str]) -> None:
    with Job(command, {}) as job:
        list(job.events(ranks=2, timeout=60))


# The checkpoint, where every machine has a disk of its own


def test_a_checkpoint_that_one_rank_lacks_is_named(tmp_path: Path, mark: str) -> None:
    model = shutil.copytree(model_folder("pocket"), tmp_path / "model")
    error = failing("a disk of its own", model=str(model))
    assert error.rank == 1
    assert f"rank 1 failed: ValueError: '{model}-of-rank-1' is not" in str(error)
    assert is_clean_soon("checkpoint missing on rank 1", told_at(error), mark)


def test_a_checkpoint_that_differs_on_one_rank_is_named(tmp_path: Path, mark: str) -> None:
    model = shutil.copytree(model_folder("pocket"), tmp_path / "model")
    others = shutil.copytree(model, tmp_path / "model-of-rank-1")
    weights = load_file(others / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, others / "model.safetensors", metadata={"format": "pt"})
    config = (others / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in config
    (others / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    error = failing("a disk of its own", model=str(model))
    assert error.rank == 1
    assert f"{others} is not the same model here as for rank 0: config.json, model.safetensors differ" in str(error)
    assert is_clean_soon("checkpoint different on rank 1", told_at(error), mark)


# Who started it: a notebook, and someone who cannot wait

LAUNCH = """
import os
os.environ |= {{"REFKL_TEST": {mark!r}, "FAULT": {fault!r}}}
from refkl_lib.ranks.events import print_event
from refkl_lib.ranks.launch import run_ranks
run_ranks(2, "faulty_worker", {{}}, print_event, 120)
"""


def test_a_kernel_interrupted_and_restarted_leaves_no_rank_and_can_launch_again() -> None:
    asyncio.run(interrupt_and_restart(mark=uuid.uuid4().hex))


async def interrupt_and_restart(mark: str) -> None:
    """Do that to a kernel; the mark is that of the ranks it launches, as it is marked itself."""
    client = NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3")
    async with client.async_setup_kernel(env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}):
        assert client.km is not None
        launch = await start_hanging_ranks(client, mark)
        since = time.time()
        await client.km.interrupt_kernel()
        assert (await answer(client, launch))["ename"] == "KeyboardInterrupt"
        assert is_clean_soon("kernel interrupted", since, mark)
        await start_hanging_ranks(client, mark)
        since = time.time()
        await client.km.restart_kernel(now=True)
        assert is_clean_soon("kernel restarted", since, mark)
        await client.kc.wait_for_ready(timeout=60)
        launch = client.kc.execute(LAUNCH.format(mark=mark, fault="none"))
        assert (await answer(client, launch))["status"] == "ok"
        assert descendants(mark) == []


async def start_hanging_ranks(client: NotebookClient, mark: str) -> str:
    """Return the message that launches them, once both have said in the notebook that they have started."""
    launch = client.kc.execute(LAUNCH.format(mark=mark, fault="hang"))
    printed = ""
    while printed.count("started") < 2:
        message = await client.kc.get_iopub_msg(timeout=60)
        if message["msg_type"] == "stream":
            printed += message["content"]["text"]
    assert descendants(mark)
    return launch


async def answer(client: NotebookClient, request: str) -> dict[str, Any]:
    while True:
        message = await client.kc.get_shell_msg(timeout=60)
        if message["parent_header"]["msg_id"] == request:
            return message["content"]


IMPATIENT = """
import os, random, signal, sys, threading, time
from refkl_lib.ranks.job import Job

def interrupt(moments):
    for seconds in moments:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

def launch():
    with Job(["sh", "-c", "sleep 600 & sleep 600"], {}) as job:
        list(job.events(ranks=1, timeout=600))

def trial(thread):
    try:
        thread.start()
        launch()
    except KeyboardInterrupt as error:
        kept.append(error)

def outlast(thread):
    while True:
        try:
            while thread.is_alive():
                thread.join()
            return time.sleep(0.01)
        except KeyboardInterrupt:
            pass

kept = []  # as a notebook keeps the last traceback, and all that it refers to
for _ in range(20):
    moments = [random.choice([0.002, 0.1]) * random.random(), 0.05 * random.random()]
    thread = threading.Thread(target=interrupt, args=(moments,))
    try:
        trial(thread)
    except KeyboardInterrupt as error:
        kept.append(error)
    outlast(thread)
print("over", flush=True)
sys.stdin.read()
"""


def test_two_interrupts_in_any_two_moments_leave_no_process(mark: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", IMPATIENT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as impatient:
        assert impatient.stdout is not None
        assert impatient.stdout.readline() == "over\n"
        since = time.time()
        wait_until(lambda: len(descendants(mark)) == 1)
        left = [process.name() for process in descendants(mark) if process.pid != impatient.pid]
        print(f"20 times two interrupts: clean after {time.time() - since:.1f} s")
    assert left == []


# Many launches


def test_twenty_launches_in_a_row_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "none")
    this = psutil.Process()
    held = []
    for number in range(20):
        if number % 8 == 0:
            assert launch_zero3(1, steps=1).kl == (0.0,)
        else:
            run_ranks(2, "faulty_worker", {}, None, 60)
        held.append((this.num_fds(), threading.active_count(), len(this.children())))
    assert len(set(held)) == 1
