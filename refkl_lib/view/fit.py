"""Which way fits where: model size against the memory of a GPU, with the article's thresholds on it."""

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from refkl_lib.advisor.advise import Advice, advise
from refkl_lib.advisor.article import AMPLE, LARGE
from refkl_lib.memory.shapes import Model
from refkl_lib.units import GIB
from refkl_lib.view.panel import Picture

# Light shades of Okabe and Ito's colours; the names are written on them.
SHADES = {
    "clone": "#F6D08A",
    "adapter": "#9ECAE8",
    "zero3": "#8FD3BC",
    "adapter, zero3": "#C4E3D6",
    "swap": "#E8C4DA",
    "precomputed": "#F3EDA1",
    None: "#F2F2F2",
}
RED = "#B03A00"
ALT = (
    "A map: a row for each model, from small to large, a column for each size of GPU. In each cell stands the way that "
    "the bills recommend, or a dash where nothing fits; solid lines run where that changes. Dashed lines are the "
    "article's thresholds, 20 billion parameters and 80 GB; a cross marks where what it recommends does not fit."
)


def fit_figure(advices: Sequence[Advice]) -> Figure:
    """Return a map of advices: model size against the memory of a GPU, with the article's thresholds on it.

    Raises ValueError unless there is one for each pair of their models and memories.
    """
    sizes = sorted({advice.parameters for advice in advices})
    memories = sorted({advice.run.device_memory for advice in advices})
    cells = {(sizes.index(a.parameters), memories.index(a.run.device_memory)): a for a in advices}
    if not advices or not len(cells) == len(advices) == len(sizes) * len(memories):
        raise ValueError(
            f"{len(advices)} advices for {len(sizes)} sizes of models and {len(memories)} of GPUs: a map needs one each"
        )
    figure = Figure(figsize=(9.4, 1.3 + 0.46 * len(sizes)), layout="constrained")
    axes = figure.add_subplot()
    for place, advice in cells.items():
        _cell(axes, place, advice)
    for start, end in _borders({place: advice.recommended for place, advice in cells.items()}):
        axes.plot(*zip(start, end, strict=True), color="#333333", linewidth=1.6, solid_capstyle="projecting")
    _thresholds(axes, sizes, memories)
    axes.set(xlim=(0, len(memories)), ylim=(0, len(sizes)), xlabel="GiB of each GPU")
    axes.set_xticks([place + 0.5 for place in range(len(memories))], [f"{m / GIB:g}" for m in memories])
    axes.set_yticks([place + 0.5 for place in range(len(sizes))], [_name(cells[row, 0]) for row in range(len(sizes))])
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)
    axes.set_title(_title(advices[0]), loc="left", fontsize=10)
    return figure


def fit_map(models: Sequence[Model], memories: Sequence[int], **run: Any) -> Picture:
    """Return `fit_figure` for each of `models` on GPUs of `memories` GiB as notebook output; `run` is for `advise`."""
    advices = [advise(model, device_memory=memory * GIB, **run) for model in models for memory in memories]
    return Picture(fit_figure(advices), ALT)


def _cell(axes: Axes, place: tuple[int, int], advice: Advice) -> None:
    row, column = place
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=SHADES[advice.recommended], edgecolor="white"))
    name = (advice.recommended or "–").replace(", ", ",\n")
    axes.text(column + 0.5, row + 0.5, name, ha="center", va="center", fontsize=8 if "\n" in name else 8.5)
    if not advice.rule.option.usable:
        axes.text(column + 0.97, row + 0.93, "✗", ha="right", va="top", fontsize=9, color=RED)


def _borders(names: dict[tuple[int, int], str | None]) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Yield the lines between neighbouring cells with different names."""
    for (row, column), name in names.items():
        if names.get((row, column + 1), name) != name:
            yield (column + 1, row), (column + 1, row + 1)
        if names.get((row + 1, column), name) != name:
            yield (column, row + 1), (column + 1, row + 1)


def _thresholds(axes: Axes, sizes: Sequence[int], memories: Sequence[int]) -> None:
    """Draw where the article's rule changes."""
    small = sum(size <= LARGE for size in sizes)
    scarce = sum(memory < AMPLE for memory in memories)
    line: dict[str, Any] = {"color": RED, "linewidth": 2.2, "linestyle": (0, (4, 2))}
    axes.plot([0, len(memories)], [small, small], **line)
    axes.plot([scarce, scarce], [0, small], **line)
    axes.text(1.01, 0.2, "✗ its choice\n   does not fit", fontsize=8.5, color=RED, transform=axes.get_yaxis_transform())
    note: dict[str, Any] = {"fontsize": 8.5, "color": RED, "va": "center", "transform": axes.get_yaxis_transform()}
    if small < len(sizes):
        axes.text(1.01, (small + len(sizes)) / 2, "article:\nZeRO-3", **note)
    if small:
        axes.text(1.01, small / 2, "article:\nPEFT left,\nclone right\nof the line", **note)


def _name(advice: Advice) -> str:
    model = str(advice.run.model).split("/")[-1] if isinstance(advice.run.model, str) else "a model"
    return f"{model}  {advice.parameters / 1e9:.1f}B"


def _title(advice: Advice) -> str:
    run = advice.run
    each = "one GPU" if run.ranks == 1 else f"each of {run.ranks:,} GPUs"
    tokens = f"{run.settings['batch']} × {run.settings['seq']:,} tokens"
    return f"What the bill recommends on {each}: {run.trains}, {tokens}"
