"""A running job: a launcher and its ranks, listened to while they run, and all gone afterwards."""

import os
import queue
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from refkl_lib.ranks.events import Event, read_event

LOOK_EVERY = 0.05  # seconds; well within the launcher's one second, after which it ends the other ranks
DYING = 0.2  # seconds between the end of a killed process's connections and its own
KILLED = "it was killed by"


class RankError(RuntimeError):
    """A job that went wrong: `rank` is where it began (None if unknown), `log` all that was printed."""

    def __init__(self, message: str, rank: int | None, log: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.log = log


class Job:
    """A launcher in a session of its own; leaving the `with` block ends every process of the session.

    A thread starts, hears and ends the launcher. An interrupt reaches the main thread alone, so that not even one
    in the wrong moment, or a second one, leaves a process behind.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._command = list(command)
        self._env = os.environ | dict(env)
        self._lines: list[str] = []
        self._pids: dict[int, int] = {}
        self._finished: set[int] = set()
        self._heard: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._last_word = ""
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        try:
            self._keeper.start()
        except BaseException:  # an interrupt, and there will be no __exit__
            self._over.set()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._keeper.join()

    @property
    def log(self) -> str:
        """Return all that the launcher and the ranks have printed so far."""
        return "\n".join(self._lines)

    def events(self, ranks: int, timeout: float) -> Iterator[Event]:
        """Yield the events of all ranks as they come, until every rank is done.

        Raises RankError for the first thing that goes wrong, or after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        last: dict[int, str] = {}
        while list(last.values()).count("done") < ranks:
            try:
                event = self._heard.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise self._timed_out(timeout, last) from None
            if event is None:
                raise self._ended_early()
            if event["event"] == "error":
                where = f"rank {event['rank']} failed: {event['message']}"
                raise RankError(f"{where}\n\n{event['traceback']}".rstrip(), event["rank"], self.log)
            if event["event"] != "memory":  # a thread of its own tells of it, wherever the rank is
                last[event["rank"]] = event["event"]
            yield event

    def _ended_early(self) -> RankError:
        tail = "\n".join([line for line in self._lines if read_event(line) is None][-20:])
        return RankError(f"{self._last_word}\n\n{tail}".rstrip(), None, self.log)

    def _timed_out(self, timeout: float, last: Mapping[int, str]) -> RankError:
        stand = {rank: self._stack_of(pid) for rank, pid in self._pids.items() if last.get(rank) != "done"}
        report = [f"rank {r}, last heard of: {last.get(r)!r}, is at\n{stack}" for r, stack in sorted(stand.items())]
        text = "\n\n".join([f"not done after {timeout:g} seconds", *report])
        return RankError(text, min(stand, default=None), self.log)

    def _stack_of(self, pid: int) -> str:
        """Return where a rank's main thread is; the worker prints it when it gets SIGUSR1."""
        before = len(self._lines)
        _send(pid, signal.SIGUSR1)
        time.sleep(10 * LOOK_EVERY)
        return "\n".join(line for line in self._lines[before:] if line.startswith("  File"))

    def _keep(self) -> None:
        try:
            launcher = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._last_word = f"the launcher cannot be started: {error}"
        else:
            with launcher:
                self._listen(launcher)
                while launcher.poll() is None and not self._over.wait(LOOK_EVERY):
                    pass  # nobody can print any more, so it is about to end
                _end_session(launcher.pid)
            self._last_word = f"the launcher ended with code {launcher.returncode} before its ranks were done:"
        self._heard.put(None)

    def _listen(self, launcher: subprocess.Popen[bytes]) -> None:
        """Pass on what the launcher and the ranks print, until nobody is left who could."""
        assert launcher.stdout is not None
        pipe = launcher.stdout.fileno()
        os.set_blocking(pipe, False)
        text, ended = "", False
        while not ended:
            if self._over.is_set():
                _end_session(launcher.pid)
            select.select([pipe], [], [], LOOK_EVERY)
            # The dead are counted before reading, for their own last words may still be in the pipe. And they
            # are reported before what is read, for a rank that lost its partner complains within milliseconds.
            dead = self._dead()
            chunk, ended = _read_all(pipe)
            *lines, text = (text + chunk).split("\n")
            self._lines += filter(None, lines)
            events = [event for line in lines if (event := read_event(line))]
            if any(event["event"] == "error" for event in events):
                # A rank that is killed loses its connections first, and is dead a moment later.
                time.sleep(DYING)
                dead |= {rank: how for rank, how in self._dead().items() if how.startswith(KILLED)}
            self._remember(events)
            for event in [*self._deaths(dead), *events]:
                self._heard.put(event)

    def _remember(self, events: Sequence[Event]) -> None:
        for event in events:
            if event["event"] == "started":
                self._pids[event["rank"]] = event["pid"]
            if event["event"] in ("done", "error"):
                self._finished.add(event["rank"])

    def _dead(self) -> dict[int, str]:
        endings = {rank: _ending(pid) for rank, pid in self._pids.items() if rank not in self._finished}
        return {rank: how for rank, how in endings.items() if how}

    def _deaths(self, dead: Mapping[int, str]) -> list[Event]:
        """Return an error event for each rank that died without a last word."""
        silent = [rank for rank in dead if rank not in self._finished]
        self._finished.update(silent)
        return [{"event": "error", "rank": rank, "message": dead[rank], "traceback": ""} for rank in silent]


def _read_all(pipe: int) -> tuple[str, bool]:
    """Return what a pipe holds now, and whether nobody can write to it any more."""
    chunks: list[bytes] = []
    while True:
        try:
            chunk = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return b"".join(chunks).decode(errors="replace"), False
        if not chunk:
            return b"".join(chunks).decode(errors="replace"), True
        chunks.append(chunk)


def _ending(pid: int) -> str | None:
    """Return how a process ended, None while it runs.

    A dead rank is a zombie until the launcher looks; the last field of /proc/PID/stat (man proc) is then its
    exit status.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "it is gone, and left no word"
    state, *_, status = stat.rpartition(")")[2].split()
    if state not in "ZX":
        return None
    code = os.waitstatus_to_exitcode(int(status))
    if code >= 0:
        return f"it exited with code {code} before it was done"
    hint = " (if nobody did that: the system kills what takes too much memory)" if -code == signal.SIGKILL else ""
    return f"{KILLED} {signal.Signals(-code).name}{hint}"


def _end_session(leader: int) -> None:
    """Kill every process of a session until none is left; what a rank was doing is not worth saving."""
    while members := [process for process in psutil.process_iter() if _lives_in(process, leader)]:
        for process in members:
            _send(process.pid, signal.SIGKILL)
        psutil.wait_procs(members, timeout=0.1)


def _lives_in(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _send(pid: int, what: signal.Signals) -> None:
    try:
        os.kill(pid, what)
    except ProcessLookupError:
        return  # it ended by itself just now
