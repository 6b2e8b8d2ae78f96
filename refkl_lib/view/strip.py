"""A text and its KL, token by token."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from refkl_lib.view.kl import POLICY
from refkl_lib.view.panel import Picture

COLUMNS = 72  # characters in a line
ALT = "A text, token by token: the darker the box, the higher the KL; its nats are written below the token."
SAYS_ALT = "Under the box stands what policy and reference would most likely have said there, where they differ."
# The rows of a line: a token and its nats in the box, and under it what the models would have said.
ROWS: dict[str, dict[str, Any]] = {
    "text": {"fontsize": 10},
    "nats": {"fontsize": 7.5},
    "policy": {"fontsize": 9, "color": POLICY, "weight": "bold"},
    "reference": {"fontsize": 9, "color": "#7A5200", "style": "italic"},
}
_BOX_ROWS, _LABEL_COLUMNS = 2, 9
_FONT: dict[str, Any] = {"va": "center", "family": "monospace", "parse_math": False}


class _Cell(NamedTuple):
    texts: tuple[str, ...]  # one for each row
    shade: float  # 0 to 1

    @property
    def width(self) -> int:
        return max(5, *(len(text) + 1 for text in self.texts))


def kl_strip_figure(
    tokens: Sequence[str],
    kl: Sequence[float] | Tensor,
    policy_says: Sequence[str] | None = None,
    reference_says: Sequence[str] | None = None,
) -> Figure:
    """Return a text with each token in a box, coloured by its KL, with the nats written below.

    With `policy_says` and `reference_says`, each model's most likely token in place of each token, these stand under
    the box wherever they differ. Raises ValueError if there is not one finite KL for each of one or more tokens, or
    if only one model says something, or not something for each token.
    """
    values = torch.as_tensor(kl, dtype=torch.float64)
    if not tokens or len(tokens) != len(values) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"{len(tokens)} tokens and {len(values)} KLs: a strip needs one finite KL for each token")
    says = _differing(len(tokens), policy_says, reference_says)
    most = max(values.max().item(), 1e-6)
    cells = [
        _Cell(tuple(map(visible, (token, f"{value:.2f}", *said))), max(value, 0) / most)
        for token, value, said in zip(tokens, values.tolist(), says, strict=True)
    ]
    lines = list(_lines(cells))
    figure = Figure(figsize=(8.2, 0.4 + 0.21 * sum(map(_height, lines))), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("KL at each token, in nats: the darker the box, the higher", loc="left", fontsize=10)
    axes.set(xlim=(-_LABEL_COLUMNS if policy_says else 0, COLUMNS), ylim=(sum(map(_height, lines)), -0.05))
    axes.set_axis_off()
    top = 0.0
    for line in lines:
        _draw_line(axes, line, top, labelled=policy_says is not None)
        top += _height(line)
    return figure


def kl_strip(
    tokens: Sequence[str],
    kl: Sequence[float] | Tensor,
    policy_says: Sequence[str] | None = None,
    reference_says: Sequence[str] | None = None,
) -> Picture:
    """Return `kl_strip_figure` as notebook output."""
    alt = ALT if policy_says is None else f"{ALT} {SAYS_ALT}"
    return Picture(kl_strip_figure(tokens, kl, policy_says, reference_says), alt)


def _differing(
    count: int, policy_says: Sequence[str] | None, reference_says: Sequence[str] | None
) -> list[tuple[str, ...]]:
    """Return for each token what the two models say, two empty texts where they agree; nothing if nothing is given."""
    if policy_says is None and reference_says is None:
        return [()] * count
    if policy_says is None or reference_says is None or not len(policy_says) == len(reference_says) == count:
        said = [None if words is None else len(words) for words in (policy_says, reference_says)]
        raise ValueError(f"policy_says has {said[0]} words and reference_says {said[1]}: both need {count}, or neither")
    pairs = zip(policy_says, reference_says, strict=True)
    return [("", "") if policy == reference else (policy, reference) for policy, reference in pairs]


def visible(text: str) -> str:
    """Return a token with a sign for each character that has no shape, and not wider than a line."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) < COLUMNS else f"{text[: COLUMNS - 2]}…"


def _lines(cells: Sequence[_Cell]) -> Iterator[list[_Cell]]:
    line: list[_Cell] = []
    for cell in cells:
        if sum(before.width for before in line) + cell.width > COLUMNS:
            yield line
            line = []
        line.append(cell)
    yield line


def _rows(line: Sequence[_Cell]) -> int:
    """Return how many rows a line needs: where the models agree, there is nothing to write under the boxes."""
    return len(ROWS) if any(any(cell.texts[_BOX_ROWS:]) for cell in line) else _BOX_ROWS


def _height(line: Sequence[_Cell]) -> float:
    return _rows(line) + (0.4 if _rows(line) > _BOX_ROWS else 0.1)


def _draw_line(axes: Axes, line: Sequence[_Cell], top: float, labelled: bool) -> None:
    if labelled:
        for row, (label, style) in list(enumerate(ROWS.items()))[: _rows(line)]:
            axes.text(-0.6, top + row + 0.5, label, **_FONT | {"ha": "right", "color": "#555555"} | style)
    left = 0.0
    for cell in line:
        _draw_cell(axes, cell, left, top)
        left += cell.width


def _draw_cell(axes: Axes, cell: _Cell, left: float, top: float) -> None:
    color, ink = colormaps["Blues"](0.85 * cell.shade), "white" if cell.shade > 0.78 else "black"
    width = cell.width - 0.2
    axes.add_patch(Rectangle((left, top), width, _BOX_ROWS, facecolor=color, edgecolor="#CCCCCC", linewidth=0.5))
    for row, (text, style) in enumerate(zip(cell.texts, ROWS.values(), strict=False)):
        if text:
            axes.text(left + width / 2, top + row + 0.5, text, **_FONT | {"ha": "center", "color": ink} | style)
