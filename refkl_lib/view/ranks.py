"""RanksPanel: what every rank of a job holds, by owner, while the job runs.

with RanksPanel(ranks=2) as panel:
    run = launch_zero3(ranks=2, model="smollm2", on_event=panel.hear)
"""

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Self

import ipywidgets as widgets
from IPython.display import display
from matplotlib.figure import Figure

from refkl_lib.counts import check_counts
from refkl_lib.ranks.events import Event, describe
from refkl_lib.units import MIB, show_bytes
from refkl_lib.view.figures import OTHER, Timeline
from refkl_lib.view.panel import OWNER_STYLES, Live, MimeBundle, hide, plain, static_face

PAUSE = 0.25  # seconds between two writes: four a second are as many as an eye follows


class RanksPanel:
    """A bar for each rank that is live inside its `with` block, and leaves a picture behind.

    `hear` takes the events of `launch_zero3`. It is called by whoever waits for the job, so there is no thread.
    Raises ValueError for fewer ranks than one.
    """

    alt = "Bytes that lived on each rank while the job ran, by owner, over time; each rank's peak is written beside it."

    def __init__(self, ranks: int = 2) -> None:
        check_counts(ranks=ranks)
        self.timelines: dict[int, list[tuple[float, dict[str, int]]]] = {rank: [] for rank in range(ranks)}
        self.peaks: dict[int, dict[str, int]] = {rank: {} for rank in range(ranks)}
        self._said = dict.fromkeys(range(ranks), "not started yet")
        self._first: float | None = None
        self._written = 0.0
        self.widget = widgets.HTML(layout=widgets.Layout(min_height=f"{60 + 48 * ranks}px", width="100%"))

    def __enter__(self) -> Self:
        display(Live(self.widget))
        return self

    def __exit__(self, *exception: object) -> None:
        hide(self.widget)
        display(self)

    def hear(self, event: Event) -> None:
        """Take in one event, and show it: at once, or with the next one if the last was shown just now.

        Raises ValueError for an event of a rank that has no bar.
        """
        rank = event["rank"]
        if rank not in self.timelines:
            raise ValueError(f"rank {rank} has no bar here: make the panel for all of the job's, RanksPanel(ranks=…)")
        self._first = event["at"] if self._first is None else self._first
        if event["event"] == "memory":
            self._measured(rank, event["at"] - self._first, event["owners"])
        else:
            self._said[rank] = describe(event).partition(": ")[2]
        if "peak" in event:
            self.peaks[rank] = event["peak"]
        if time.monotonic() - self._written > PAUSE or event["event"] == "done":
            self._written = time.monotonic()
            self.widget.value = ranks_html(self._now(), self.peaks, self._said)

    def figure(self) -> Figure:
        """Return each rank's timeline by owner up to now."""
        return ranks_figure(self.timelines, self.peaks)

    def _repr_mimebundle_(self, **_: object) -> MimeBundle:
        return static_face(self.figure(), self.alt)

    def _measured(self, rank: int, seconds: float, owners: dict[str, int]) -> None:
        self.timelines[rank].append((seconds, owners))
        if sum(owners.values()) > sum(self.peaks[rank].values()):
            self.peaks[rank] = owners

    def _now(self) -> dict[int, Mapping[str, int]]:
        return {rank: points[-1][1] if points else {} for rank, points in self.timelines.items()}


def ranks_figure(timelines: Mapping[int, Timeline], peaks: Mapping[int, Mapping[str, int]]) -> Figure:
    """Return one strip for each rank: what lived over time, stacked by owner in MiB, its peak written above."""
    figure = Figure(figsize=(8.2, 0.7 + 1.5 * len(timelines)), layout="constrained")
    strips = figure.subplots(len(timelines), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    owners = _owners(peaks)
    for axes, (rank, timeline) in zip(strips, timelines.items(), strict=True):
        _draw(axes, timeline, owners)
        axes.set_title(f"rank {rank}: peak {show_bytes(sum(peaks[rank].values()))}", loc="left", fontsize=9)
        axes.set_ylabel("MiB", fontsize=8.5)
        plain(axes)
    strips[-1].set_xlabel("seconds since the first rank started")
    if areas := strips[0].get_legend_handles_labels()[0]:
        figure.legend(areas, owners, loc="outside right center", frameon=False, fontsize=8.5, reverse=True)
    return figure


def ranks_html(
    now: Mapping[int, Mapping[str, int]], peaks: Mapping[int, Mapping[str, int]], said: Mapping[int, str]
) -> str:
    """Return a bar for each rank, by owner on one scale, with its bytes now and at its peak, and its last word."""
    scale = max([sum(peak.values()) for peak in peaks.values()] + [1])
    rows = "".join(_row(rank, now[rank], sum(peaks[rank].values()), scale, said[rank]) for rank in now)
    key = " ".join(
        f'<span style="white-space:nowrap">{_patch(owner)} {escape(owner)}</span>' for owner in _owners(peaks)
    )
    return (
        '<table style="width:100%;max-width:820px;border-collapse:collapse;line-height:1.5">'
        '<tr><th style="text-align:left;width:60px">rank</th><th style="text-align:left">lives now</th>'
        '<th style="text-align:right;width:90px">now</th><th style="text-align:right;width:90px">at peak</th></tr>'
        f"{rows}</table><div>{key}</div>"
    )


def _draw(axes: Any, timeline: Timeline, owners: Sequence[str]) -> None:
    seconds = [at for at, _ in timeline]
    rows = [[point.get(owner, 0) / MIB for _, point in timeline] for owner in owners]
    colors = [OWNER_STYLES.get(owner, OTHER)[0] for owner in owners]
    areas = axes.stackplot(seconds, rows, colors=colors, labels=owners, step="post", linewidth=0) if owners else []
    for area, owner in zip(areas, owners, strict=True):
        area.set_hatch(OWNER_STYLES.get(owner, OTHER)[1])
        area.set_edgecolor("white")


def _owners(peaks: Mapping[int, Mapping[str, int]]) -> list[str]:
    """Return the owners that any rank's peak has bytes of, in the ledger's order."""
    return list(dict.fromkeys(owner for peak in peaks.values() for owner, count in peak.items() if count))


def _row(rank: int, now: Mapping[str, int], peak: int, scale: int, said: str) -> str:
    bars = "".join(_bar(owner, 100 * count / scale) for owner, count in now.items() if count)
    right = 'style="text-align:right"'
    return (
        f'<tr><td>{rank}</td><td><div style="display:flex;height:14px">{bars}</div>'
        f"<small>{escape(said)}</small></td>"
        f"<td {right}>{show_bytes(sum(now.values()))}</td><td {right}>{show_bytes(peak)}</td></tr>"
    )


def _bar(owner: str, percent: float) -> str:
    return f'<div style="width:{percent:.1f}%;background:{OWNER_STYLES.get(owner, OTHER)[0]}"></div>'


def _patch(owner: str) -> str:
    color = OWNER_STYLES.get(owner, OTHER)[0]
    return f'<span style="display:inline-block;width:12px;height:12px;background:{color}"></span>'
