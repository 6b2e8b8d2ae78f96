"""Pictures of the adapter switch: the layer it sits in, and how far "off" can be from the start."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from refkl_lib.view.panel import OWNER_STYLES, Picture, plain

FROZEN, TRAINS, OFF, INK = OWNER_STYLES["reference"][0], OWNER_STYLES["policy"][0], "#AAAAAA", "#333333"
SWITCH_ALT = (
    "A LoRA layer, twice. The input x goes through the frozen weight W and, beside it, through the small matrices A "
    "and B; a switch adds the second way to the first. Left, the switch is closed: this is the policy. Right, it is "
    "open: what is left is W x, the reference."
)


def lora_switch_figure(inputs: int, outputs: int, rank: int) -> Figure:
    """Return a LoRA layer with its switch closed and open, with the parameters of each part.

    Raises ValueError for a size below 1.
    """
    if min(inputs, outputs, rank) < 1:
        raise ValueError(f"{inputs} inputs, {outputs} outputs and rank {rank}: each must be at least 1")
    figure = Figure(figsize=(8.2, 2.9), layout="constrained")
    for axes, on in zip(figure.subplots(1, 2), (True, False), strict=True):
        axes.set(xlim=(0, 4.3), ylim=(0.05, 3.0))
        axes.set_axis_off()
        title = "on: the policy, W x + scale · B A x" if on else "off: the reference, W x"
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        _draw_layer(axes, (inputs, outputs, rank), on)
    return figure


def lora_switch(inputs: int, outputs: int, rank: int) -> Picture:
    """Return `lora_switch_figure` as notebook output."""
    return Picture(lora_switch_figure(inputs, outputs, rank), SWITCH_ALT)


def kl_dots_figure(kls: Mapping[str, float], title: str) -> Figure:
    """Return a dot for each KL in nats per token, on a logarithmic axis; one of 0 has no dot, and says "0".

    Raises ValueError unless all are finite and at least 0, and one is above.
    """
    values = list(kls.values())
    if not all(0 <= value < float("inf") for value in values) or not any(values):
        raise ValueError(f"the KLs are {values}: each must be finite and not negative, and one above 0")
    figure = Figure(figsize=(8.2, 0.9 + 0.3 * len(kls)), layout="constrained")
    axes = figure.add_subplot()
    left = min(value for value in values if value) / 10
    axes.set_xscale("log")
    axes.set_xlim(left, max(values) * 6)
    axes.set_ylim(len(kls) - 0.5, -0.5)
    for row, value in enumerate(values):
        if value:
            axes.plot([left, value], [row, row], ":", color=FROZEN, linewidth=1.5)
            axes.plot([value], [row], "o", color=FROZEN)
        end, text = (value, f"{value:.2g}") if value else (left, "0")
        axes.annotate(text, (end, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(range(len(kls)), list(kls))
    axes.set_xlabel("nats per token, on a logarithmic scale")
    axes.set_title(title, loc="left", fontsize=10)
    plain(axes)
    return figure


def kl_dots(kls: Mapping[str, float], title: str) -> Picture:
    """Return `kl_dots_figure` as notebook output."""
    return Picture(kl_dots_figure(kls, title), f"{title}. One dot each, in nats per token: {'; '.join(kls)}.")


def _draw_layer(axes: Axes, sizes: tuple[int, int, int], on: bool) -> None:
    inputs, outputs, rank = sizes
    adapter = TRAINS if on else OFF
    _wire(axes, (0.25, 1.5), (0.45, 1.5), (0.45, 2.3), (0.75, 2.3))
    _wire(axes, (2.85, 2.3), (3.65, 2.3), (3.65, 1.72))
    _wire(axes, (0.45, 1.5), (0.45, 0.7), (0.75, 0.7), color=adapter)
    _wire(axes, (1.7, 0.7), (1.9, 0.7), color=adapter)
    _wire(axes, (2.85, 0.7), (3.05, 0.7), color=adapter)
    _wire(axes, (3.45, 0.7), (3.65, 0.7), (3.65, 1.28), color=adapter)
    _wire(axes, (3.87, 1.5), (4.05, 1.5))
    _box(axes, 0.75, 1.9, 2.1, f"W  {outputs} × {inputs}\n{outputs * inputs:,} weights, frozen", FROZEN)
    _box(axes, 0.75, 0.3, 0.95, f"A  {rank} × {inputs}\n{rank * inputs:,}", adapter)
    _box(axes, 1.9, 0.3, 0.95, f"B  {outputs} × {rank}\n{outputs * rank:,}", adapter)
    axes.plot([3.05, 3.45 if on else 3.38], [0.7, 0.7 if on else 1.0], color=adapter, linewidth=2.4)
    axes.plot([3.05, 3.45], [0.7, 0.7], "o", color=adapter, markersize=4)
    axes.add_patch(Circle((3.65, 1.5), 0.22, facecolor="white", edgecolor=INK, linewidth=1.3))
    for x, text in ((0.12, "x"), (3.65, "+"), (4.17, "y")):
        axes.text(x, 1.5, text, ha="center", va="center", fontsize=11)
    axes.text(3.6, 0.5, f"_disable_adapters\n= {not on}", ha="center", va="top", fontsize=7.5, color=INK)


def _wire(axes: Axes, *points: tuple[float, float], color: str = INK) -> None:
    axes.plot(*zip(*points, strict=True), color=color, linewidth=1.3, zorder=0)


def _box(axes: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    style = "round,pad=0,rounding_size=0.06"
    line = "--" if color == OFF else "-"
    axes.add_patch(
        FancyBboxPatch((x, y), width, 0.8, boxstyle=style, facecolor=f"{color}22", edgecolor=color, linestyle=line)
    )
    ink = "#777777" if color == OFF else "black"
    axes.text(x + width / 2, y + 0.4, text, ha="center", va="center", fontsize=8.5, color=ink)
