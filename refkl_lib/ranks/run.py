"""What a job of several ranks has shown, put together from its events."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refkl_lib.ranks.events import Event
from refkl_lib.units import show_bytes


@dataclass(frozen=True)
class RankReport:
    """What one rank held, in bytes, and computed.

    `policy_bytes` and `reference_bytes` are its shards before the first step; `optimizer_bytes` and
    `gradient_bytes` what DeepSpeed kept beside them after the last; `gather_peak` the most that was gathered at
    once in the steps: layers that are whole while they compute, and small weights that stay so. `peak` is by
    owner, at the highest moment of a step; its "gathered" is what was gathered at that moment. `timeline` has
    (seconds since the job started, bytes by owner) points, some five a second, each the highest since the one
    before it. `kl` and `loss` are of each step, before it is taken: nats per token. `policy_fingerprint` is the
    policy's after the last step.
    """

    rank: int
    policy_bytes: int
    reference_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    gather_peak: int
    peak: dict[str, int]
    timeline: tuple[tuple[float, dict[str, int]], ...]
    kl: tuple[float, ...]
    loss: tuple[float, ...]
    policy_fingerprint: str
    reference_fingerprint_before: str
    reference_fingerprint: str


@dataclass(frozen=True, repr=False)
class ZeRO3Run:
    """A finished job: a report for each rank, the time it took, and the command that runs it again.

    `settings` are the arguments of `launch_zero3` that say what is trained.
    `step_seconds` and `reference_seconds` (the reference's part of them) are of each step, on the slowest rank.
    `seconds` tells where the time went: "start" (processes, imports), "load" (both models), "initialise" (the
    engine, a fingerprint), "steps", "save" (if the policy was saved), "finish" (fingerprints). `log` is all that was
    printed.
    """

    settings: dict[str, Any]
    ranks: tuple[RankReport, ...]
    step_seconds: tuple[float, ...]
    reference_seconds: tuple[float, ...]
    seconds: dict[str, float]
    command: str
    log: str

    @property
    def kl(self) -> tuple[float, ...]:
        """Return KL(policy‖reference) in nats per token before each step: rank 0's, as all saw the same batch."""
        return self.ranks[0].kl

    def __repr__(self) -> str:
        """Return a table, a line for each rank."""
        columns = ("policy", "reference", "gradients", "optimizer", "gathered", "peak")
        head = f"{'rank':<6}{''.join(f'{column:>12}' for column in columns)}   KL per step"
        return "\n".join([head, *map(_line, self.ranks)])


def _line(report: RankReport) -> str:
    held = (report.policy_bytes, report.reference_bytes, report.gradient_bytes, report.optimizer_bytes)
    most = (report.gather_peak, sum(report.peak.values()))
    columns = [f"{show_bytes(count):>12}" for count in (*held, *most)]
    return f"{report.rank:<6}{''.join(columns)}   {', '.join(f'{kl:.3f}' for kl in report.kl)}"


def put_together(settings: dict[str, Any], events: Sequence[Event], started: float, command: str, log: str) -> ZeRO3Run:
    """Return the run that these events tell of; `started` is when the launcher was (`time.time()`)."""
    ranks = sorted({event["rank"] for event in events})
    return ZeRO3Run(
        settings=settings,
        ranks=tuple(_report(rank, [e for e in events if e["rank"] == rank], started) for rank in ranks),
        step_seconds=_slowest(events, "seconds"),
        reference_seconds=_slowest(events, "reference_seconds"),
        seconds=_phases(events, started),
        command=command,
        log=log,
    )


def _report(rank: int, events: Sequence[Event], started: float) -> RankReport:
    told: dict[str, Any] = {event["event"]: event for event in events}
    steps = [event for event in events if event["event"] == "step"]
    start, end = told["initialised"], told["done"]
    return RankReport(
        rank=rank,
        policy_bytes=start["policy_bytes"],
        reference_bytes=start["reference_bytes"],
        optimizer_bytes=end["optimizer_bytes"],
        gradient_bytes=end["gradient_bytes"],
        gather_peak=end["gather_peak"],
        peak=end["peak"],
        timeline=tuple((event["at"] - started, event["owners"]) for event in events if event["event"] == "memory"),
        kl=tuple(step["kl"] for step in steps),
        loss=tuple(step["loss"] for step in steps),
        policy_fingerprint=end["policy_fingerprint"],
        reference_fingerprint_before=start["reference_fingerprint"],
        reference_fingerprint=end["reference_fingerprint"],
    )


def _slowest(events: Sequence[Event], what: str) -> tuple[float, ...]:
    by_step: dict[int, float] = {}
    for event in events:
        if event["event"] == "step":
            by_step[event["step"]] = max(event[what], by_step.get(event["step"], 0.0))
    return tuple(by_step[step] for step in sorted(by_step))


def _phases(events: Sequence[Event], started: float) -> dict[str, float]:
    """Return the seconds of each phase; one ends when the last rank has told of it."""
    names = {"imported": "start", "loaded": "load", "initialised": "initialise", "step": "steps"}
    names |= {"saved": "save", "done": "finish"}
    ends = {event["event"]: event["at"] for event in sorted(events, key=lambda event: event["at"])}
    phases, before = {}, started
    for told, name in names.items():
        if told in ends:
            phases[name] = ends[told] - before
            before = ends[told]
    return phases
