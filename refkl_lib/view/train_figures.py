"""Pictures of trainings: pure functions from records to figures, and to a readout that is cheap to draw often."""

from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

from refkl_lib.train.records import Record
from refkl_lib.units import MIB, show_bytes
from refkl_lib.view.curves import STYLES
from refkl_lib.view.figures import OTHER
from refkl_lib.view.panel import OWNER_STYLES, Picture, plain
from refkl_lib.view.strip import visible

CURVES = {"reward": "mean reward of a text", "kl": "KL, nats a text", "loss": "loss"}
Peak = Mapping[str, int]


def readout_html(history: Sequence[Record], peaks: Mapping[int, Peak]) -> str:
    """Return the curves up to now as small drawings, with their last values, the last peak and the last text."""
    if not history:
        return ""
    lines = {label: [getattr(record, name) for record in history] for name, label in CURVES.items()}
    drawings = [_drawing(label, values, f"{values[-1]:.2f}") for label, values in lines.items()]
    if peaks:
        totals = [sum(peak.values()) for peak in peaks.values()]
        drawings.append(_drawing("memory at the peak", totals, show_bytes(totals[-1])))
    said = f"It writes: “{escape(history[-1].sample)}”"
    return f'<div style="display:flex;flex-wrap:wrap;gap:4px 18px">{"".join(drawings)}</div><div>{said}</div>'


def train_figure(history: Sequence[Record], peaks: Mapping[int, Peak]) -> Figure:
    """Return reward, KL and loss by iteration, the bytes at the peak by owner where weighed, and three of the texts.

    `peaks` has them by iteration. Without a history there is a note that says so.
    """
    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    if not history:
        figure.text(0.5, 0.5, "no iteration yet", ha="center", color="#555555")
        return figure
    first, last = history[0], history[-1]
    figure.suptitle(
        f"beta {last.beta:g}: reward {first.reward:.1f} → {last.reward:.1f}, KL {first.kl:.1f} → {last.kl:.1f} nats",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    places = list(figure.subplots(2, 2, sharex=True).flat)
    for axes, (name, label), style in zip(places, CURVES.items(), STYLES, strict=False):
        color, line, marker = style
        axes.plot([getattr(record, name) for record in history], line, marker=marker, markersize=3.5, color=color)
        _with_label(axes, label)
    _draw_memory(places[3], peaks)
    for axes in places[2:]:
        axes.set_xlabel("iteration", fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel(_samples(history), x=0.01, ha="left", fontsize=8.5, parse_math=False)
    return figure


def frontier_figure(runs: Mapping[str, Sequence[Record]], mean_of: int = 3) -> Figure:
    """Return each run's way from its first iteration to its last: reward against KL, each point a mean of `mean_of`.

    Raises ValueError if there is no run, more than four, or one of fewer than `mean_of` iterations.
    """
    if not 1 <= len(runs) <= len(STYLES) or any(len(history) < mean_of for history in runs.values()):
        raise ValueError(f"{len(runs)} runs: a picture shows 1 to {len(STYLES)}, each of {mean_of} iterations or more")
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for (name, history), (color, line, marker) in zip(runs.items(), STYLES, strict=False):
        kl, reward = way_of(history, mean_of)
        axes.plot(kl, reward, line, color=color, linewidth=1.2)
        axes.plot(kl[-1:], reward[-1:], marker, color=color, markersize=8, label=name)
        axes.annotate(name, (kl[-1], reward[-1]), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8.5)
    _with_label(axes, CURVES["reward"])
    axes.set_xlabel("KL(policy‖reference), nats a text")
    axes.set_title("What the reward costs: each line is a training, its mark the end", loc="left", fontsize=10)
    axes.margins(x=0.15)
    return figure


def way_of(history: Sequence[Record], mean_of: int) -> tuple[list[float], list[float]]:
    """Return a training's KLs, in nats a text, and its rewards, both as running means over `mean_of` iterations."""
    kls, rewards = ([record.kl for record in history], [record.reward for record in history])
    return _running(kls, mean_of), _running(rewards, mean_of)


def frontier(runs: Mapping[str, Sequence[Record]]) -> Picture:
    """Return `frontier_figure` as notebook output."""
    alt = f"Reward against KL, a line for each training from its first iteration to its last: {', '.join(runs)}."
    return Picture(frontier_figure(runs), alt)


def _running(values: Sequence[float], of: int) -> list[float]:
    return [sum(values[at : at + of]) / of for at in range(len(values) - of + 1)]


def _draw_memory(axes: Axes, peaks: Mapping[int, Peak]) -> None:
    below = [0.0] * len(peaks)
    for owner in dict.fromkeys(name for peak in peaks.values() for name in peak):
        heights = [peak[owner] / MIB for peak in peaks.values()]
        if any(heights):
            color, hatch = OWNER_STYLES.get(owner, OTHER)
            axes.bar([*peaks], heights, bottom=below, color=color, hatch=hatch, edgecolor="white", label=owner)
            below = [low + height for low, height in zip(below, heights, strict=True)]
    _with_label(axes, "MiB at the peak")
    if peaks:
        axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5), reverse=True)


def _with_label(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, fontsize=8.5)
    plain(axes)


def _samples(history: Sequence[Record]) -> str:
    """Return the first, the middle and the last text, a line each."""
    shown = dict.fromkeys([0, len(history) // 2, len(history) - 1])
    return "\n".join(f"iteration {at}: “{_drawable(history[at].sample)}”" for at in shown)


def _drawable(text: str) -> str:
    """Return a text on one line, with a sign for each character that the pictures' font does not have."""
    font = get_font(findfont("DejaVu Sans"))
    return "".join(letter if font.get_char_index(ord(letter)) else "�" for letter in visible(text))


def _drawing(label: str, values: Sequence[float], last: str) -> str:
    """Return values as an SVG line under a label; its ink is the theme's."""
    low, high = min(values), max(values)
    across, up = 180 / max(len(values) - 1, 1), 50 / ((high - low) or 1)
    points = " ".join(f"{2 + at * across:.1f},{55 - (value - low) * up:.1f}" for at, value in enumerate(values))
    return (
        f'<div><div>{label}: <b>{last}</b></div><svg width="186" height="60" role="img" aria-label="{label}, {last}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="2"/></svg></div>'
    )
