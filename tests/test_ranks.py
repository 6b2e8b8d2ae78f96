"""Several processes: what a job of real ranks shows, and that none is left whatever happens to it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from training import train

from refkl_lib.models import load_model
from refkl_lib.ranks import launch
from refkl_lib.ranks.events import read_event
from refkl_lib.ranks.launch import RankError, ZeRO3Run, launch_zero3
from refkl_lib.reference.adapter import add_lora
from refkl_lib.reference.clone import CloneReference
from refkl_lib.text import sample_batch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="real ranks need Linux")

SECONDS_TO_END = 5.0


@pytest.fixture(scope="module", autouse=True)
def mark() -> Iterator[str]:
    """Mark the environment that every process started from here inherits, orphans as well."""
    with pytest.MonkeyPatch.context() as patch:
        mark = uuid.uuid4().hex
        patch.setenv("REFKL_TEST", mark)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield mark


@pytest.fixture(autouse=True)
def nothing_left(mark: str) -> Iterator[None]:
    yield
    assert descendants(mark) == []


def descendants(mark: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and is_marked(process, mark)]


def is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("REFKL_TEST") == mark
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def runs(mark: str) -> dict[str, Any]:
    """Two jobs that run at the same time, one that trains all weights on two ranks, one an adapter on one."""
    heard: list[tuple[float, dict[str, Any]]] = []
    with ThreadPoolExecutor() as pool:
        full = pool.submit(launch_zero3, 2, on_event=lambda event: heard.append((time.time(), event)))
        lora = pool.submit(launch_zero3, 1, steps=2, lora_rank=4, batch=2, seq=32)
        return {"full": full.result(), "lora": lora.result(), "heard": heard}


@pytest.fixture
def full(runs: dict[str, Any]) -> ZeRO3Run:
    return runs["full"]


def kl_of_one_process(steps: int, lora_rank: int | None, batch: int, seq: int) -> list[float]:
    policy = load_model("pocket", device="cpu")
    reference = CloneReference(policy)
    if lora_rank is not None:
        torch.manual_seed(0)
        policy = add_lora(policy, lora_rank)
    return train(policy, reference, sample_batch("pocket", batch, seq), steps, learning_rate=1e-3)


# What a job shows


def test_kl_is_that_of_a_single_process_with_a_clone(runs: dict[str, Any]) -> None:
    # AdamW's first steps are lr·sign(gradient), which makes much of the rounding of small gradients.
    assert runs["full"].kl == pytest.approx(kl_of_one_process(3, None, 1, 64), rel=5e-3)
    assert runs["lora"].kl == pytest.approx(kl_of_one_process(2, 4, 2, 32), rel=5e-3)


def test_kl_is_zero_before_training_and_positive_after_a_step(runs: dict[str, Any]) -> None:
    for run in (runs["full"], runs["lora"]):
        for report in run.ranks:
            assert report.kl[0] == pytest.approx(0.0, abs=1e-6)
            assert min(report.kl[1:]) > 1e-6


def test_each_rank_holds_its_share_of_both_models(full: ZeRO3Run) -> None:
    model = load_model("pocket", device="cpu")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    shards = sum(-(-parameter.numel() // 2) * 4 for parameter in model.parameters())
    for report in full.ranks:
        assert report.policy_bytes == report.reference_bytes == shards + buffers
        assert 3 * shards <= report.optimizer_bytes < 3 * shards + 1000  # the weights to work on, two moments
        assert report.peak["reference"] >= report.reference_bytes
        assert report.peak["optimizer"] == report.optimizer_bytes
        assert report.peak["gradients"] == report.gradient_bytes
        assert report.peak["activations"] > 0


def test_a_single_rank_holds_everything_and_an_adapter_trains_little(runs: dict[str, Any]) -> None:
    (report,) = runs["lora"].ranks
    whole = CloneReference(load_model("pocket", device="cpu")).owned_bytes()
    assert report.reference_bytes == whole
    assert whole < report.policy_bytes < 1.1 * whole
    assert report.optimizer_bytes < 0.2 * whole


def test_all_ranks_hold_the_same_weights_and_the_reference_never_moves(full: ZeRO3Run) -> None:
    clone = CloneReference(load_model("pocket", device="cpu")).fingerprint()
    assert {report.reference_fingerprint_before for report in full.ranks} == {clone}
    assert {report.reference_fingerprint for report in full.ranks} == {clone}
    (trained,) = {report.policy_fingerprint for report in full.ranks}
    assert trained != clone


def test_events_come_while_the_job_runs_one_per_rank_and_step(runs: dict[str, Any]) -> None:
    events = [event for _, event in runs["heard"]]
    for rank in (0, 1):
        said = [event["event"] for event in events if event["rank"] == rank]
        assert said == ["started", "imported", "loaded", "initialised", "step", "step", "step", "done"]
        assert [e["step"] for e in events if e["event"] == "step" and e["rank"] == rank] == [0, 1, 2]
    heard_first, end = runs["heard"][0][0], events[-1]["at"]
    assert heard_first < end - sum(runs["full"].step_seconds)


def test_time_is_accounted_for(full: ZeRO3Run) -> None:
    assert list(full.seconds) == ["start", "load", "initialise", "steps", "finish"]
    assert min(full.seconds.values()) > 0
    assert full.seconds["steps"] >= sum(full.step_seconds) * 0.9
    assert all(0 < part < whole for part, whole in zip(full.reference_seconds, full.step_seconds, strict=True))


def test_it_shows_as_a_table(full: ZeRO3Run) -> None:
    head, *lines = repr(full).splitlines()
    assert head.split()[:6] == ["rank", "policy", "reference", "gradients", "optimizer", "peak"]
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert "2.9 MiB" in lines[0]
    assert f"{full.kl[2]:.3f}" in lines[0]


def test_nothing_is_printed_but_the_log_has_it(full: ZeRO3Run, capfd: pytest.CaptureFixture[str]) -> None:
    error = failing("print a lot")
    assert capfd.readouterr() == ("", "")
    assert "no end of line" in error.log
    assert error.rank == 1
    assert "rank 1 failed: ValueError: an error with 🦔 in it and a very long text" in str(error)
    assert "runner.py" in full.log


def test_the_command_runs_in_a_shell_without_any_compiler(full: ZeRO3Run, tmp_path: Path) -> None:
    (tmp_path / "env").symlink_to(shutil.which("env") or "")
    bare = {"PATH": str(tmp_path), "HOME": str(tmp_path), "REFKL_TEST": os.environ["REFKL_TEST"]}
    bare |= {name: os.environ[name] for name in ("REFKL_CACHE",) if name in os.environ}
    run = subprocess.run(full.command, shell=True, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    events = [event for line in run.stdout.splitlines() if (event := read_event(line))]
    for rank in (0, 1):
        assert [e["kl"] for e in events if e["event"] == "step" and e["rank"] == rank] == list(full.kl)


# What goes wrong


def failing(fault: str, timeout: float = 100.0, **options: Any) -> RankError:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULT", fault)
        with pytest.raises(RankError) as caught:
            launch_zero3(2, worker="faulty_worker", timeout=timeout, **options)
    return caught.value


def ended_quickly(since: float) -> bool:
    return time.monotonic() - since < SECONDS_TO_END


def test_a_rank_that_raises_is_named_with_its_traceback() -> None:
    steps: list[int] = []
    error = failing("raise at step 1", on_event=lambda event: steps.append(event.get("step", -1)))
    assert error.rank == 1
    assert "rank 1 failed: ZeroDivisionError: step 1 has failed" in str(error)
    assert 'raise ZeroDivisionError("step 1 has failed")' in str(error)
    assert max(steps) == 0


def test_a_rank_that_is_killed_is_named_not_the_one_that_misses_it() -> None:
    pids: dict[int, int] = {}
    killed: list[float] = []

    def kill_rank_1(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            pids[event["rank"]] = event["pid"]
        if event["event"] == "step" and not killed:
            os.kill(pids[1], signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(RankError, match="rank 1 failed: it was killed by SIGKILL") as caught:
        launch_zero3(2, steps=1000, on_event=kill_rank_1)
    assert caught.value.rank == 1
    assert ended_quickly(killed[0])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("exit 3", "rank 1 failed: it exited with code 3 before it was done"),
        ("segfault", "rank 1 failed: it was killed by SIGSEGV"),
    ],
)
def test_a_rank_that_dies_in_another_way_is_named(fault: str, says: str) -> None:
    error = failing(fault)
    assert error.rank == 1
    assert says in str(error)


def test_a_rank_that_hangs_is_ended_and_says_where_it_was() -> None:
    error = failing("hang", timeout=8.0)
    assert "not done after 8 seconds" in str(error)
    for rank in (0, 1):
        assert f"rank {rank}, last heard of: 'started', is at" in str(error)
    assert str(error).count("in _hang") == 2


def test_an_interrupt_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "hang")
    with pytest.raises(KeyboardInterrupt):
        launch_zero3(2, worker="faulty_worker", on_event=lambda event: signal.raise_signal(signal.SIGINT))


def test_an_exception_in_on_event_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def complain(event: dict[str, Any]) -> None:
        raise LookupError("no widget to write to")

    monkeypatch.setenv("FAULT", "hang")
    with pytest.raises(LookupError, match="no widget"):
        launch_zero3(2, worker="faulty_worker", on_event=complain)


def test_ranks_end_when_the_program_that_launched_them_is_killed(mark: str) -> None:
    program = (
        "from refkl_lib.ranks.launch import launch_zero3\n"
        "launch_zero3(2, worker='faulty_worker', on_event=lambda event: print(event['pid'], flush=True))"
    )
    environment = os.environ | {"FAULT": "hang", "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    ranks = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs(ranks, timeout=SECONDS_TO_END)[1] == []
    wait_until(lambda: descendants(mark) == [])  # the launcher looks once a second


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_END
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_port_that_is_taken_in_the_last_moment_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as rival:
        rival.bind(("", 0))
        rival.listen()
        ports = iter([rival.getsockname()[1], launch._free_port()])
        monkeypatch.setattr(launch, "_free_port", lambda: next(ports))
        run = launch_zero3(1, steps=1)
    assert run.kl == (0.0,)
    assert next(ports, None) is None


# What cannot work is refused before anything starts


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ranks": 0}, "ranks is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"timeout": -1.0}, "timeout is -1.0"),
        ({"batch": 0}, "batch is 0"),
        ({"seq": 10**6}, "seq 1000000"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        launch_zero3(**options)


def test_other_systems_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="real ranks need Linux"):
        launch_zero3()


def test_without_deepspeed_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="need deepspeed"):
        launch_zero3()


def test_ranks_run_on_gpus_when_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    command, environment = launch.command_for(2, "a.worker", [])
    assert "--include=localhost:4,6" in command
    assert "DS_ACCELERATOR" not in environment
    command, environment = launch.command_for(3, "a.worker", [])
    assert "--num_gpus=3" in command
    assert environment["DS_ACCELERATOR"] == "cpu"
