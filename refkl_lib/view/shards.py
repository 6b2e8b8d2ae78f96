"""Who holds which element: small weights as squares, cut over the ranks."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from refkl_lib.ranks.shards import Shard
from refkl_lib.view.panel import Picture

# Okabe and Ito's colours in a light shade, so that the number of the rank can be read on them.
COLORS = ("#9ECAE8", "#F6D08A", "#8FD3BC", "#E8C4DA", "#F3EDA1", "#F0B99A", "#B9DCF4", "#CCCCCC")
WIDEST = 40  # squares in a row
GAP = 0.25  # between two ranks' pieces, in squares
ALT = "Each weight as a row of squares, one an element, with the number of the rank that holds it; padding is empty."


def shards_figure(cut: Sequence[Shard]) -> Figure:
    """Return each weight as a row of squares, one an element, numbered by its rank; padding is dashed and empty.

    Raises ValueError if there is no weight, if one takes more than 40 squares with its padding, or if there are
    more than 8 ranks: `shards` says the same in numbers.
    """
    widest = max((shard.numel + shard.padding for shard in cut), default=0)
    if not 0 < widest <= WIDEST or cut[0].ranks > len(COLORS):
        raise ValueError(
            f"{len(cut)} weights, the largest of {widest} elements with padding: a picture shows 1 to {WIDEST} "
            f"elements of a weight over up to {len(COLORS)} ranks"
        )
    figure = Figure(figsize=(8.2, 0.5 + 0.62 * len(cut)), layout="constrained")
    axes = figure.add_subplot()
    for row, shard in enumerate(cut):
        _draw(axes, row, shard)
    axes.set(xlim=(-0.2, widest + GAP * cut[0].ranks), ylim=(len(cut) - 0.1, -0.1), aspect="equal", xticks=[])
    axes.set_yticks([row + 0.4 for row in range(len(cut))], [f"{s.name} {s.shape}" for s in cut], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("The rank that holds each element; dashed squares are padding", loc="left", fontsize=10)
    return figure


def shards_picture(cut: Sequence[Shard]) -> Picture:
    """Return `shards_figure` as notebook output."""
    return Picture(shards_figure(cut), ALT)


def _draw(axes: Axes, row: int, shard: Shard) -> None:
    for place in range(shard.numel + shard.padding):
        rank = place // shard.per_rank
        left, real = place + GAP * rank, place < shard.numel
        face, line = (COLORS[rank], "-") if real else ("white", "--")
        square = Rectangle((left, row), 0.84, 0.8, facecolor=face, edgecolor="#444444", linewidth=0.8, linestyle=line)
        axes.add_patch(square)
        if real:
            axes.text(left + 0.42, row + 0.4, str(rank), ha="center", va="center", fontsize=9)
