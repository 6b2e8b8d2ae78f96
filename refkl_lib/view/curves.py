"""Numbers over steps, as lines."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from refkl_lib.view.panel import Picture, plain

# Okabe and Ito's colours, each with a line and a marker of its own: colour is never the only carrier.
STYLES = (("#0072B2", "-", "o"), ("#E69F00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D"))


def curves_figure(lines: Mapping[str, Sequence[float]], ylabel: str, title: str, xlabel: str = "step") -> Figure:
    """Return each line's values at 0, 1, 2, …, with a legend; `title` says what to see.

    Raises ValueError if there is no line, more than four, or one without a value.
    """
    if not 1 <= len(lines) <= len(STYLES) or not all(len(values) for values in lines.values()):
        raise ValueError(f"{len(lines)} lines: a picture shows 1 to {len(STYLES)}, each with one value or more")
    figure = Figure(figsize=(8.2, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for (name, values), (color, line, marker) in zip(lines.items(), STYLES, strict=False):
        axes.plot(range(len(values)), list(values), line, marker=marker, markersize=4, color=color, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    plain(axes)
    return figure


def curves(lines: Mapping[str, Sequence[float]], ylabel: str, title: str, xlabel: str = "step") -> Picture:
    """Return `curves_figure` as notebook output."""
    return Picture(curves_figure(lines, ylabel, title, xlabel), f"{title}: {ylabel}, for {', '.join(lines)}.")
