"""The picture that the course opens with: three ways to keep a reference, one KL."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from refkl_lib.view.panel import OWNER_STYLES, Picture

ALT = (
    "Three ways to keep a reference. Clone: a second, frozen model beside the policy; it costs the weights "
    "twice. Adapter: one base model with an adapter; adapter on is the policy, adapter off the reference; "
    "nothing is copied. ZeRO-3: two ranks, each holding half of the policy and half of a reference that was "
    "loaded again. All three lead to the same KL of policy and reference."
)


def three_ways() -> Picture:
    """Return a drawing of clone, adapter switch and ZeRO-3, side by side, above the KL they share."""
    figure = Figure(figsize=(9.0, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 9), ylim=(-0.05, 3.35))
    axes.set_axis_off()
    _clone(axes, 0.1)
    _adapter(axes, 3.2)
    _zero3(axes, 6.3)
    _kl(axes)
    return Picture(figure, ALT)


def _clone(axes: Axes, x: float) -> None:
    _head(axes, x, "clone", "a frozen copy: weights twice")
    _box(axes, x, 1.2, 1.2, 1.1, "policy\ntrains", "policy")
    _box(axes, x + 1.4, 1.2, 1.2, 1.1, "reference\nfrozen", "reference")


def _adapter(axes: Axes, x: float) -> None:
    _head(axes, x, "adapter", "one model, switched: nothing twice")
    _box(axes, x, 1.2, 1.7, 1.1, "base model\nfrozen", "reference")
    _box(axes, x + 1.75, 1.2, 0.85, 1.1, "adapter\ntrains", "policy")
    axes.text(x + 1.3, 1.03, "on: policy    off: reference", ha="center", fontsize=8.5)


def _zero3(axes: Axes, x: float) -> None:
    _head(axes, x, "zero3", "loaded again, a shard on each rank")
    for rank in (0, 1):
        left = x + 1.4 * rank
        _box(axes, left, 1.2, 0.58, 1.1, f"policy\n{rank + 1}/2", "policy")
        _box(axes, left + 0.62, 1.2, 0.58, 1.1, f"ref.\n{rank + 1}/2", "reference")
        axes.text(left + 0.6, 1.03, f"rank {rank}", ha="center", fontsize=8.5)


def _kl(axes: Axes) -> None:
    _box(axes, 2.6, 0.0, 3.8, 0.5, "the same KL(policy ‖ reference)", None)
    for x in (1.4, 4.5, 7.6):
        arrow = {"arrowstyle": "->", "color": "#555555"}
        axes.annotate("", xy=(4.5 + (x - 4.5) * 0.5, 0.54), xytext=(x, 0.9), arrowprops=arrow)


def _head(axes: Axes, x: float, title: str, line: str) -> None:
    axes.text(x + 1.3, 3.0, title, ha="center", fontsize=13, fontweight="bold")
    axes.text(x + 1.3, 2.62, line, ha="center", fontsize=9, color="#333333")


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, owner: str | None) -> None:
    color = OWNER_STYLES[owner][0] if owner else "#555555"
    style = "round,pad=0,rounding_size=0.06"
    box = FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color + "22", edgecolor=color, linewidth=1.5)
    axes.add_patch(box)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5)
