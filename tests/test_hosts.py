"""Several hosts: the commands of docs/several_hosts.md, word for word, on two network namespaces with a cable."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from textwrap import dedent

import psutil
import pytest
from checkout import ROOT
from training import kl_of_one_process

from refkl_lib import create_reference, load_model
from refkl_lib.ranks.events import Event, read_event
from refkl_lib.ranks.worker import first_of

# The guide's blocks of code by name, which is the word after the language.
GUIDE = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", (ROOT / "docs/several_hosts.md").read_text(), re.M | re.S))
ADDRESSES = ("10.0.0.1", "10.0.0.2")
PROGRAMS = ("ip", "pdsh", "ssh", "ssh-keygen", "sshd")
SECONDS_TO_END = 40.0  # after a fault; to leave Python takes a rank some seconds where others compute, too
SECONDS_TO_COME = 200.0
FAULT_AT = 2  # the step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces need Linux")


class Host:
    """A network namespace with an address of its own, and what runs in it."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.address = ADDRESSES[rank]
        self.namespace = f"refkl-{uuid.uuid4().hex[:8]}"
        self.folder = folder
        self.output = folder / f"output.{rank}"

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """Type a command into this host's terminal, in the folder with the hostfile."""
        with self.output.open("w") as output:
            return subprocess.Popen(
                # Under nohup, tests would hand on that a terminal's end is to be ignored.
                ["env", "--default-signal=HUP", "ip", "netns", "exec", self.namespace, "bash", "-c", command],
                cwd=self.folder,
                env=os.environ | {"NODE_RANK": str(self.rank)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # An interrupt of the test must not reach DeepSpeed, which answers by ending all launchers of
                # this Python, those of others as well.
                start_new_session=True,
            )

    @property
    def events(self) -> list[Event]:
        lines = self.output.read_text().splitlines()
        # pdsh puts the host's address before each line.
        return [event for line in lines if (event := read_event(re.sub(r"^[\d.]+: ", "", line)))]

    @property
    def at_work(self) -> list[psutil.Process]:
        """Return what runs here, apart from ssh servers, which are the system's."""
        return [process for process in self._running() if not is_ssh_server(process)]

    def _running(self) -> list[psutil.Process]:
        found = []
        for pid in ip("netns", "pids", self.namespace).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def kill(self) -> None:
        """End everything on this host without a word to it."""
        while running := self._running():
            for process in running:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(running, timeout=1)

    def unplug(self) -> None:
        """Cut the cable: nobody is told, packets just do not arrive any more."""
        ip("-n", self.namespace, "link", "set", "eth0", "down")


def is_ssh_server(process: psutil.Process) -> bool:
    try:
        return process.name() == "sshd"
    except psutil.NoSuchProcess:
        return True  # nothing at all by now


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def why_not() -> str | None:
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"{', '.join(missing)} missing: apt install iproute2 pdsh openssh-client openssh-server"
    name = f"refkl-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no right to make a network namespace: {made.stderr.strip()}"
    ip("netns", "del", name)
    return None


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is active, and a rank computes in one thread."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def hosts(environment: None, tmp_path: Path) -> Iterator[list[Host]]:
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "hostfile").write_text(GUIDE["hostfile"])
    with ExitStack() as stack:
        hosts = [stack.enter_context(namespace(rank, tmp_path)) for rank in (0, 1)]
        ends = [["eth0", "netns", host.namespace] for host in hosts]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", host.namespace, "link", "set", link, "up")
        yield hosts


@contextmanager
def namespace(rank: int, folder: Path) -> Iterator[Host]:
    host = Host(rank, folder)
    ip("netns", "add", host.namespace)
    try:
        yield host
    finally:
        host.kill()
        if host.output.exists():
            print(f"{host.address} said:\n{host.output.read_text()[-4000:]}")  # shown if the test fails
        ip("netns", "del", host.namespace)


@pytest.fixture
def reachable(hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Host]:
    """The hosts with an ssh server on each, and a key to get in."""
    keys, programs = tmp_path / "keys", tmp_path / "programs"
    for folder in (keys, programs):
        folder.mkdir()
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
    for key in ("host", "user"):
        subprocess.run([*keygen, str(keys / key)], check=True)
    (keys / "server").write_text(
        dedent(f"""\
        HostKey {keys}/host
        AuthorizedKeysFile {keys}/user.pub
        PidFile none
        StrictModes no
        UsePAM no
        """)
    )
    (keys / "client").write_text(
        dedent(f"""\
        IdentityFile {keys}/user
        StrictHostKeyChecking no
        UserKnownHostsFile /dev/null
        LogLevel ERROR
        """)
    )
    # ssh reads the settings in the home that the system knows, whatever $HOME says; here they are in another place.
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {keys}/client "$@"\n')
    (programs / "ssh").chmod(0o755)
    (tmp_path / ".deepspeed_env").write_text(GUIDE[".deepspeed_env"])
    Path("/run/sshd").mkdir(exist_ok=True)  # where Debian's sshd wants to be locked in
    server = f"{shutil.which('sshd')} -D -e -f {keys}/server"
    servers = [host.start(server) for host in hosts]
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    wait_until(lambda: all("Server listening" in host.output.read_text() for host in hosts), SECONDS_TO_COME)
    assert [server.poll() for server in servers] == [None, None]
    return hosts


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds"
        time.sleep(0.1)


def wait_for_step(hosts: list[Host], ranks: int = 1) -> None:
    """Wait until `ranks` ranks have taken the step on each of these hosts' terminals."""

    def taken(host: Host) -> bool:
        return sum(event.get("step") == FAULT_AT for event in host.events) == ranks

    wait_until(lambda: all(map(taken, hosts)), SECONDS_TO_COME)


def long(command: str, *options: str) -> str:
    """Return one of the guide's commands for a training that does not end by itself."""
    assert command.endswith("--steps 3\n")
    return " ".join([command.removesuffix("3\n"), "100000", *options])


def ended(launchers: list[subprocess.Popen[bytes]], within: float) -> list[int]:
    """Return the codes with which launchers end; if one does not, its ranks are asked to print where they are."""
    deadline = time.monotonic() + within
    try:
        return [launcher.wait(timeout=max(0.0, deadline - time.monotonic())) for launcher in launchers]
    except subprocess.TimeoutExpired:
        for launcher in launchers:
            for process in psutil.Process(launcher.pid).children(recursive=True):
                if process.cmdline()[2:4] == ["-m", "refkl_lib.ranks.worker"]:
                    process.send_signal(signal.SIGUSR1)
        time.sleep(2)
        raise


def errors(host: Host) -> list[str]:
    return [event["message"] for event in host.events if event["event"] == "error"]


def is_as_in_one_process(events: list[Event]) -> bool:
    """Tell whether a rank's events are what one process sees that trains the same model beside a clone."""
    kl = [event["kl"] for event in events if event["event"] == "step"]
    (done,) = (event for event in events if event["event"] == "done")
    assert done["reference_fingerprint"] == create_reference(load_model("pocket", device="cpu"), "clone").fingerprint()
    # Of the rounding of small gradients, AdamW's first steps make much.
    return kl == pytest.approx(kl_of_one_process(steps=3, lora_rank=None, batch=1, seq=64), rel=5e-3, abs=1e-6)


def nobody_at_work(hosts: list[Host]) -> bool:
    return all(host.at_work == [] for host in hosts)


def agree(events: list[Event]) -> bool:
    return len({e["policy_fingerprint"] for e in events if e["event"] == "done"}) == 1


# What works


def test_a_launcher_on_each_host_trains_as_one_process_does(hosts: list[Host]) -> None:
    launchers = [host.start(GUIDE["on-each-host"]) for host in hosts]
    assert ended(launchers, SECONDS_TO_COME) == [0, 0], [host.output.read_text()[-4000:] for host in hosts]
    for host in hosts:
        assert {event["rank"] for event in host.events} == {host.rank}
        assert is_as_in_one_process(host.events)
    assert agree([event for host in hosts for event in host.events])
    assert nobody_at_work(hosts)


def test_one_command_starts_all_ranks_over_ssh(reachable: list[Host]) -> None:
    here = reachable[0]
    assert ended([here.start(GUIDE["over-ssh"])], SECONDS_TO_COME) == [0], here.output.read_text()[-4000:]
    for rank, address in enumerate(ADDRESSES):
        assert f'{address}: refkl {{"event": "done", "rank": {rank}' in here.output.read_text()
        assert is_as_in_one_process([event for event in here.events if event["rank"] == rank])
    assert agree(here.events)
    assert nobody_at_work(reachable)


def test_a_batch_job_starts_a_launcher_on_each_node(
    hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's two programs have stand-ins that do what the guide counts on."""
    tasks = "\n".join(f'SLURM_NODEID={host.rank} ip netns exec {host.namespace} "$@" &' for host in hosts)
    stand_ins = {
        "scontrol": f'[ "$*" = "show hostnames nodes[1-2]" ] && printf "%s\\n" {" ".join(ADDRESSES)}',
        "srun": f'[ "$1" = --kill-on-bad-exit=1 ] && shift || exit 1\n{tasks}\nwait -n && wait -n',
    }
    for program, script in stand_ins.items():
        (tmp_path / program).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / program).chmod(0o755)
    for name, value in {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "nodes[1-2]")
    job, here = tmp_path / "job.sbatch", hosts[0]
    job.write_text(GUIDE["job.sbatch"])
    assert ended([here.start(str(f"bash {job}"))], SECONDS_TO_COME) == [0]
    for rank in (0, 1):
        assert is_as_in_one_process([event for event in here.events if event["rank"] == rank])
    assert agree(here.events)
    assert nobody_at_work(hosts)


def test_every_block_of_the_guide_is_used() -> None:
    assert set(GUIDE) == {"hostfile", "on-each-host", "over-ssh", ".deepspeed_env", "job.sbatch", "errors"}
    assert len(GUIDE) == (ROOT / "docs/several_hosts.md").read_text().count("\n```") / 2


# What goes wrong


def test_what_failed_first_is_told_not_what_came_of_it() -> None:
    lost, then, meaning = ConnectionError("closed by peer"), RuntimeError("in flight"), ValueError("no host")
    then.__context__ = lost
    meaning.__cause__ = meaning.__context__ = then  # as `raise meaning from then` does
    assert first_of(then) is first_of(lost) is lost
    assert first_of(meaning) is meaning


@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_dies_ends_the_run_on_the_other(hosts: list[Host], lost: int, tmp_path: Path) -> None:
    launchers = [host.start(long(GUIDE["on-each-host"])) for host in hosts]
    wait_for_step(hosts)
    hosts[lost].kill()
    (code,) = ended([launchers[1 - lost]], SECONDS_TO_END)
    found = subprocess.run(GUIDE["errors"], shell=True, cwd=tmp_path, capture_output=True, text=True).stdout
    (message,) = errors(hosts[1 - lost])
    assert code != 0
    assert ADDRESSES[lost] in message
    assert "closed by peer" in message or "reset by peer" in message
    assert [event["message"] for line in found.splitlines() if (event := read_event(line))] == [message]
    assert nobody_at_work(hosts)


def test_a_cable_that_is_cut_ends_the_run_on_both(hosts: list[Host]) -> None:
    launchers = [host.start(long(GUIDE["on-each-host"], "--comm-timeout 20")) for host in hosts]
    wait_for_step(hosts)
    hosts[1].unplug()
    codes = ended(launchers, 20 + SECONDS_TO_END)
    assert 0 not in codes
    for host in hosts:
        (message,) = errors(host)
        assert "Timed out waiting 20000ms" in message
    assert nobody_at_work(hosts)


def test_a_cable_that_is_cut_ends_ranks_started_over_ssh(reachable: list[Host]) -> None:
    here, there = reachable
    launcher = here.start(long(GUIDE["over-ssh"], "--comm-timeout 20"))
    wait_for_step([here], ranks=2)
    there.unplug()
    (code,) = ended([launcher], 20 + 30 + SECONDS_TO_END)
    assert code != 0
    assert "Timed out waiting 20000ms" in errors(here)[0]
    assert nobody_at_work(reachable)


def test_a_terminal_that_is_closed_ends_ranks_started_over_ssh(reachable: list[Host]) -> None:
    here = reachable[0]
    launcher = here.start(long(GUIDE["over-ssh"]))
    wait_for_step([here], ranks=2)
    os.killpg(launcher.pid, signal.SIGHUP)
    launcher.wait(timeout=SECONDS_TO_END)
    wait_until(lambda: nobody_at_work(reachable), SECONDS_TO_END)


@pytest.mark.parametrize(("came", "says"), [(0, "1/2 clients joined"), (1, "10.0.0.1")])
def test_a_host_that_does_not_come_is_not_waited_for_forever(hosts: list[Host], came: int, says: str) -> None:
    launcher = hosts[came].start(long(GUIDE["on-each-host"], "--comm-timeout 5"))
    (code,) = ended([launcher], SECONDS_TO_COME)
    (message,) = errors(hosts[came])
    assert code != 0
    assert says in message
    assert nobody_at_work(hosts)
