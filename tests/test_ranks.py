"""Several processes: what a job of real ranks shows, and that none is left whatever happens to it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faults import SECONDS_TO_END, descendants, failing, wait_until
from training import kl_of_one_process

from refkl_lib import price
from refkl_lib.comparison import StrategyRun
from refkl_lib.memory.ledger import OWNERS
from refkl_lib.models import load_model
from refkl_lib.models.cache import write_whole
from refkl_lib.ranks import launch
from refkl_lib.ranks.config import job_config
from refkl_lib.ranks.events import print_event, read_event
from refkl_lib.ranks.launch import RankError, RankReport, ZeRO3Run, launch_zero3
from refkl_lib.ranks.shards import Shard, shards
from refkl_lib.reference.clone import CloneReference
from refkl_lib.tensors import storage_bytes
from refkl_lib.text import sample_batch

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="real ranks need Linux"),
    pytest.mark.usefixtures("nothing_left"),
]

BUCKET = 4 * 300_000  # bytes in which gradients are reduced: the "reduce_bucket_size" of the job
FULL = {"alone": 1, "full": 2, "four": 4, "eight": 8}  # the jobs that train all weights, by the fixture that runs them
LORA: dict[str, Any] = {"steps": 2, "lora_rank": 4, "batch": 2, "seq": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the trained policy of `full` is in."""
    return tmp_path_factory.mktemp("saved") / "new" / "policy"


@pytest.fixture(scope="module")
def runs(mark: str, saved: Path) -> dict[str, Any]:
    """Two jobs that run at the same time, one that trains all weights on two ranks, one an adapter on one."""
    heard: list[tuple[float, dict[str, Any]]] = []
    with ThreadPoolExecutor() as pool:
        full = pool.submit(launch_zero3, 2, save_to=saved, on_event=lambda event: heard.append((time.time(), event)))
        lora = pool.submit(launch_zero3, 1, **LORA)
        return {"full": full.result(), "lora": lora.result(), "heard": heard}


@pytest.fixture
def full(runs: dict[str, Any]) -> ZeRO3Run:
    return runs["full"]


@pytest.fixture(scope="module")
def kinds(mark: str) -> dict[str, ZeRO3Run]:
    """The same adapter trained on two ranks beside a reference that is kept in each way; the jobs run at once."""
    options: dict[str, dict[str, Any]] = {
        "zero3": {"offload": "cpu"},
        "plain": {"reference": "plain"},
        "adapter": {"reference": "adapter"},
    }
    with ThreadPoolExecutor() as pool:
        jobs = {kind: pool.submit(launch_zero3, 2, **LORA, **option) for kind, option in options.items()}
        return {kind: job.result() for kind, job in jobs.items()}


@pytest.fixture(scope="module")
def rival() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as rival:
        rival.bind(("", 0))
        rival.listen()
        yield rival.getsockname()[1]


@pytest.fixture(scope="module")
def alone(mark: str, rival: int) -> ZeRO3Run:
    """A job of one rank, which is first given the rival's port."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_free_port", iter([rival, launch._free_port()]).__next__)
        return launch_zero3(1, steps=2)  # at the second step, the optimizer has its moments


@pytest.fixture(scope="module")
def four(mark: str) -> ZeRO3Run:
    return launch_zero3(4, steps=2)


@pytest.fixture(scope="module")
def eight(mark: str) -> ZeRO3Run:
    return launch_zero3(8, steps=2)


# What a job shows


def test_kl_is_that_of_a_single_process_with_a_clone(runs: dict[str, Any]) -> None:
    # AdamW's first steps are lr·sign(gradient), which makes much of the rounding of small gradients.
    assert runs["full"].kl == pytest.approx(kl_of_one_process(steps=3, lora_rank=None, batch=1, seq=64), rel=5e-3)
    assert runs["lora"].kl == pytest.approx(kl_of_one_process(**LORA), rel=5e-3)


def test_kl_is_zero_before_training_and_positive_after_a_step(runs: dict[str, Any]) -> None:
    for run in (runs["full"], runs["lora"]):
        for report in run.ranks:
            assert report.kl[0] == pytest.approx(0.0, abs=1e-6)
            assert min(report.kl[1:]) > 1e-6


@pytest.mark.parametrize(("job", "ranks"), FULL.items())
def test_each_rank_holds_its_share_of_both_models(job: str, ranks: int, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(job)
    model = load_model("pocket", device="cpu")
    cut = shards(model, ranks)
    share = sum(shard.bytes_per_rank for shard in cut)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert len(run.ranks) == ranks
    for report in run.ranks:
        assert report.policy_bytes == report.reference_bytes == share + buffers
        assert report.gradient_bytes == share + BUCKET
        assert 3 * share <= report.optimizer_bytes < 3 * share + 1000  # the weights to work on, two moments
        assert report.peak["policy"] == report.policy_bytes
        assert report.peak["reference"] == report.reference_bytes
        assert report.peak["optimizer"] == report.optimizer_bytes
        assert report.peak["gradients"] == report.gradient_bytes
        assert report.peak["activations"] > 0
        assert is_gathered_layer_by_layer(report, cut)


def is_gathered_layer_by_layer(report: RankReport, cut: Sequence[Shard]) -> bool:
    """Tell whether the largest weight was whole at some moment, and the model at none; one rank gathers nothing."""
    held = [shard.bytes_per_rank * shard.ranks for shard in cut]
    return report.gather_peak == 0 if cut[0].ranks == 1 else max(held) <= report.gather_peak < sum(held) / 4


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


def test_memory_is_told_as_it_grows_and_no_peak_is_missed(runs: dict[str, Any]) -> None:
    (report,) = runs["lora"].ranks
    seconds = [at for at, _ in report.timeline]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert {tuple(owners) for _, owners in report.timeline} == {(*OWNERS, "gathered")}
    policy_alone, both = (owners for _, owners in report.timeline[:2])
    assert policy_alone["policy"] == both["policy"] > 0
    assert sum(policy_alone.values()) == policy_alone["policy"]
    assert sum(both.values()) == both["policy"] + report.reference_bytes
    assert max(sum(owners.values()) for _, owners in report.timeline) == sum(report.peak.values())


def test_memory_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_event({"event": "memory", "rank": 0, "at": 0.0, "owners": {}})
    print_event({"event": "loaded", "rank": 0, "at": 0.0})
    assert capsys.readouterr().out == "rank 0: loaded\n"


def test_a_reference_kept_in_any_way_is_the_same_model_with_the_same_kl(
    kinds: dict[str, ZeRO3Run], runs: dict[str, Any]
) -> None:
    clone = CloneReference(load_model("pocket", device="cpu")).fingerprint()
    for run in kinds.values():
        assert run.kl == pytest.approx(runs["lora"].kl, rel=5e-3, abs=1e-6)
        assert {report.reference_fingerprint_before for report in run.ranks} == {clone}
        assert {report.reference_fingerprint for report in run.ranks} == {clone}


def test_launches_at_once_keep_out_of_each_others_way(kinds: dict[str, ZeRO3Run], runs: dict[str, Any]) -> None:
    assert len({port_of(run) for run in kinds.values()}) == 3
    assert port_of(runs["full"]) != port_of(runs["lora"])
    for run in kinds.values():
        assert {report.kl for report in run.ranks} == {run.kl}
        assert run.kl[1] > 0


def test_a_reference_costs_what_its_kind_says(kinds: dict[str, ZeRO3Run]) -> None:
    model = load_model("pocket", device="cpu")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    share = sum(shard.bytes_per_rank for shard in shards(model, 2)) + buffers
    costs = {"zero3": share, "plain": storage_bytes(model), "adapter": 0}
    for kind, run in kinds.items():
        for report in run.ranks:
            assert report.reference_bytes == report.peak["reference"] == costs[kind]


def test_a_pass_with_the_adapter_off_leaves_no_layer_gathered(kinds: dict[str, ZeRO3Run]) -> None:
    cut = shards(load_model("pocket", device="cpu"), 2)
    assert all(is_gathered_layer_by_layer(report, cut) for report in kinds["adapter"].ranks)


@pytest.mark.parametrize("job", FULL)
def test_training_all_weights_is_billed_to_the_byte(job: str, request: pytest.FixtureRequest) -> None:
    is_billed(request.getfixturevalue(job), "zero3", batch=1, seq=64)


@pytest.mark.parametrize("kind", ["zero3", "plain", "adapter"])
def test_training_an_adapter_is_billed_to_the_byte(kind: str, kinds: dict[str, ZeRO3Run]) -> None:
    is_billed(kinds[kind], kind, **{name: value for name, value in LORA.items() if name != "steps"})


def is_billed(run: ZeRO3Run, reference: str, **settings: Any) -> None:
    ranks, job = len(run.ranks), job_config(learning_rate=1e-3)
    bill = price("pocket", reference, ranks=ranks, ds_config=job, dtype="fp32", device="cpu", **settings)
    largest_weight = 4 * max(shard.numel for shard in shards(load_model("pocket"), ranks))
    for report in run.ranks:
        assert bill.at_rest["policy"] == report.policy_bytes
        assert bill.reference_bytes == report.reference_bytes
        assert bill.at_rest["optimizer"] == report.optimizer_bytes
        assert bill.at_rest["gradients"] == report.gradient_bytes
        for owner in ("policy", "reference", "gradients", "optimizer"):
            assert bill.owners[owner] == report.peak[owner]
        # What is in motion is not told apart: which moment is the peak differs from run to run, for a gathered weight
        # may still be held beside the next one. Small weights let go late, and scalars, are not in the bill.
        in_motion = ("activations", "gathered")
        late = sum(report.peak[owner] - bill.owners[owner] for owner in in_motion)
        assert 0 <= late <= largest_weight


def test_ranks_are_a_strategy_run_with_all_bytes_of_the_peak(kinds: dict[str, ZeRO3Run]) -> None:
    for kind, run in kinds.items():
        of_ranks = StrategyRun.from_ranks(run)
        assert of_ranks.name == f"{kind}, LoRA 4, each of 2"
        assert of_ranks.peak == max(sum(report.peak.values()) for report in run.ranks)
        assert tuple(of_ranks.owners) == OWNERS


def test_a_saved_policy_is_the_model_and_the_reference_of_the_next_run(full: ZeRO3Run, saved: Path) -> None:
    trained = full.ranks[0].policy_fingerprint
    policy = CloneReference(load_model(saved, device="cpu"))
    assert policy.fingerprint() == trained
    assert [path.name for path in saved.parent.iterdir()] == ["policy"]
    batch = sample_batch("pocket", 1, 64)
    assert sample_batch(saved, 1, 64)["input_ids"].equal(batch["input_ids"])
    run = launch_zero3(2, str(saved), steps=1)
    for report in run.ranks:
        assert report.reference_fingerprint == trained
        assert report.kl[0] == pytest.approx(0.0, abs=1e-6)
        # At step 0 the loss is the cross-entropy alone, of the policy that was loaded.
        assert report.loss[0] == pytest.approx(-policy.log_probs(**batch).mean().item(), rel=1e-5)


def test_events_come_while_the_job_runs_one_per_rank_and_step(runs: dict[str, Any]) -> None:
    events = [event for _, event in runs["heard"]]
    for rank in (0, 1):
        said = [event["event"] for event in events if event["rank"] == rank and event["event"] != "memory"]
        assert said == ["started", "imported", "loaded", "initialised", "step", "step", "step", "saved", "done"]
        assert [e["step"] for e in events if e["event"] == "step" and e["rank"] == rank] == [0, 1, 2]
    heard_first, end = runs["heard"][0][0], events[-1]["at"]
    assert heard_first < end - sum(runs["full"].step_seconds)


def test_time_is_accounted_for(full: ZeRO3Run) -> None:
    assert list(full.seconds) == ["start", "load", "initialise", "steps", "save", "finish"]
    assert min(full.seconds.values()) > 0
    assert full.seconds["steps"] >= sum(full.step_seconds) * 0.9
    assert all(0 < part < whole for part, whole in zip(full.reference_seconds, full.step_seconds, strict=True))


def test_it_shows_as_a_table(full: ZeRO3Run) -> None:
    head, *lines = repr(full).splitlines()
    assert head.split()[:7] == ["rank", "policy", "reference", "gradients", "optimizer", "gathered", "peak"]
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


@pytest.fixture(scope="module")
def pasted(kinds: dict[str, ZeRO3Run], tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """What a shell without any compiler says to the command of a job, whose ranks abort when Python is taken down.

    That stands for an abort in a thread of gloo, which comes once in many runs.
    """
    folder = tmp_path_factory.mktemp("shell")
    (folder / "env").symlink_to(shutil.which("env") or "")
    abort_at_exit = "import atexit, os\nif 'RANK' in os.environ: print('will abort'), atexit.register(os.abort)\n"
    (folder / "sitecustomize.py").write_text(abort_at_exit)
    bare = {"PATH": str(folder), "HOME": str(folder), "PYTHONPATH": str(folder)}
    bare |= {name: os.environ[name] for name in ("REFKL_TEST", "REFKL_CACHE") if name in os.environ}
    command = kinds["adapter"].command
    return subprocess.run(command, shell=True, cwd=folder, env=bare, capture_output=True, text=True, timeout=200)


def test_the_command_runs_in_a_shell_without_any_compiler(
    pasted: subprocess.CompletedProcess[str], kinds: dict[str, ZeRO3Run]
) -> None:
    events = [event for line in pasted.stdout.splitlines() if (event := read_event(line))]
    for rank in (0, 1):
        kl = [event["kl"] for event in events if event["event"] == "step" and event["rank"] == rank]
        assert kl == list(kinds["adapter"].kl), pasted.stderr[-4000:]


def test_ranks_leave_before_anything_can_go_wrong_while_python_is_taken_down(
    pasted: subprocess.CompletedProcess[str],
) -> None:
    assert pasted.stdout.count("will abort") == 2
    assert pasted.returncode == 0, pasted.stdout[-4000:] + pasted.stderr[-4000:]


# What goes wrong


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


def test_shards_on_a_disk_need_an_operator_that_is_built_or_named(tmp_path: Path) -> None:
    try:
        run = launch_zero3(1, steps=1, offload="nvme", nvme_path=tmp_path)
    except RankError as error:
        assert 'offload="nvme" needs DeepSpeed\'s async_io operator' in str(error)  # noqa: PT017
    else:
        clone = CloneReference(load_model("pocket", device="cpu"))
        assert run.ranks[0].reference_fingerprint == clone.fingerprint()


def test_a_disk_that_is_full_leaves_no_model(tmp_path: Path) -> None:
    error = failing("disk full while saving", steps=1, save_to=tmp_path / "policy")
    assert error.rank == 0
    assert f"no model could be written to {tmp_path}: the disk (or your quota on it) is full" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_is_killed_while_it_saves_leaves_no_model_that_loads(tmp_path: Path) -> None:
    error = failing("killed while saving", steps=1, save_to=tmp_path / "policy")
    assert error.rank == 0
    assert "rank 0 failed: it was killed by SIGXFSZ" in str(error)
    assert not (tmp_path / "policy").exists()
    (partial,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="holds no model to load"):
        load_model(partial)
    write_whole(tmp_path / "policy", lambda folder: (folder / "model").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


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


def test_a_port_that_is_taken_in_the_last_moment_is_replaced(alone: ZeRO3Run, rival: int) -> None:
    assert port_of(alone) != rival
    assert alone.kl[0] == 0.0


def port_of(run: ZeRO3Run) -> int:
    return int(re.search(r"--master_port=(\d+)", run.command).group(1))


# What cannot work is refused before anything starts


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ranks": 0}, "ranks is 0"),
        ({"ranks": "pocket"}, "ranks is 'pocket', but must be a whole number, at least 1"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1.5}, "steps is 1.5, but must be a whole number"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"timeout": -1.0}, "timeout is -1.0"),
        ({"timeout": "5"}, "timeout is '5', but must be more than 0"),
        ({"batch": 1.5}, "batch is 1.5, but must be a whole number"),
        ({"batch": 0}, "batch is 0"),
        ({"seq": 10**6}, "seq 1000000"),
        ({"seq": 1}, "seq is 1, but must be a whole number, at least 2"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"reference": "clone"}, "reference is 'clone', but must be one of"),
        ({"reference": "adapter"}, "no adapter to switch off"),
        ({"reference": "plain", "offload": "cpu"}, "offload='cpu' is for the shards of reference=\"zero3\""),
        ({"offload": "disk"}, "offload is 'disk'"),
        ({"offload": "nvme"}, "needs nvme_path="),
        ({"save_to": "x", "lora_rank": 4}, "lora_rank=4 trains an adapter"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        launch_zero3(**options)


def test_a_place_that_cannot_be_saved_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, says in [
        (tmp_path, "where something is already"),
        (tmp_path / "file", "where something is already"),
        (tmp_path / "file" / "policy", "its parent folder cannot be made"),
    ]:
        with pytest.raises(ValueError, match=says):
            launch_zero3(save_to=place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
