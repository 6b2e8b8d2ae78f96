"""Pictures of memory: pure functions from numbers to matplotlib figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refkl_lib.comparison import StrategyRun
from refkl_lib.memory.ledger import OWNERS
from refkl_lib.units import MIB, show_bytes
from refkl_lib.view.panel import OWNER_STYLES, plain

OTHER = ("#56B4E9", "\\\\")
Timeline = Sequence[tuple[float, Mapping[str, int]]]


def timeline_figure(timeline: Timeline, peak: Mapping[str, int]) -> Figure:
    """Return what lived over time, stacked by owner in MiB, with the peak marked and broken down."""
    figure = Figure(figsize=(8.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    owners = [owner for owner in peak if any(point.get(owner) for _, point in timeline)]
    seconds = [at for at, _ in timeline]
    rows = [[point.get(owner, 0) / MIB for _, point in timeline] for owner in owners]
    colors = [OWNER_STYLES.get(owner, OTHER)[0] for owner in owners]
    areas = axes.stackplot(seconds, rows, colors=colors, step="post", linewidth=0) if owners else []
    for area, owner in zip(areas, owners, strict=True):
        area.set_hatch(OWNER_STYLES.get(owner, OTHER)[1])
        area.set_edgecolor("white")
        area.set_label(f"{owner} {show_bytes(peak[owner])}")
    total = sum(peak.values())
    axes.axhline(total / MIB, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="seconds", ylabel="MiB that live", ylim=(0, max(total / MIB * 1.12, 1)))
    axes.set_xlim(left=0)
    axes.set_title(f"peak {show_bytes(total)}", loc="left", fontsize=10)
    if owners:
        _legend(axes, title="at the peak", reverse=True)
    plain(axes)
    return figure


def runs_figure(runs: Sequence[StrategyRun]) -> Figure:
    """Return one bar for each run: bytes by owner at the peak, with its KL and its time written beside.

    Bars of runs that were only priced are pale.
    """
    figure = Figure(figsize=(8.2, 1.5 + 0.46 * max(len(runs), 1)), layout="constrained")
    axes = figure.add_subplot()
    owners = [owner for owner in OWNERS if any(run.owners[owner] for run in runs)]
    for row, run in enumerate(runs):
        _bar(axes, row, run, owners)
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.set_xlabel("MiB at the peak of a training step, by owner")
    widest = max((run.peak for run in runs), default=MIB) / MIB
    axes.set_xlim(0, widest * 1.5)
    if runs:
        _legend(axes)
    else:
        axes.text(0.5, 0.5, "no run yet", transform=axes.transAxes, ha="center", color="#555555")
    plain(axes)
    return figure


def _bar(axes: Axes, row: int, run: StrategyRun, owners: Sequence[str]) -> None:
    left = 0.0
    for owner in owners:
        count = run.owners[owner]
        color, hatch = OWNER_STYLES[owner]
        label = owner if row == 0 else None
        looks: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "white"}
        axes.barh(row, count / MIB, left=left, height=0.62, label=label, alpha=0.5 if run.is_priced else 1, **looks)
        left += count / MIB
    seen = "" if run.is_priced else f"   KL {run.kl[-1]:.3f}   {run.step_seconds:.1f} s a step"
    text = show_bytes(run.peak) + seen
    axes.annotate(text, (left, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)


def _legend(axes: Axes, title: str | None = None, reverse: bool = False) -> None:
    axes.legend(
        title=title,
        reverse=reverse,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8.5,
        title_fontsize=8.5,
        handlelength=1.6,
    )
