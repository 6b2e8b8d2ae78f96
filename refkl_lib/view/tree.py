"""The decision tree, drawn: which path a run takes through it, and why."""

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from refkl_lib.advisor.advise import Advice, advise
from refkl_lib.advisor.tree import FIRST, LADDERS, NOTHING, Answer
from refkl_lib.memory.shapes import known_models
from refkl_lib.units import GIB
from refkl_lib.view.choice import Slider
from refkl_lib.view.panel import Panel, Picture, button, image_html, message

Point = tuple[float, float]
Style = Mapping[str, Any]

# A box on the path has a thick line and its numbers, the one at its end is black; no colour is needed.
ON: Style = {"facecolor": "#FFF4D6", "edgecolor": "#111111", "linewidth": 2.4}
OFF: Style = {"facecolor": "white", "edgecolor": "#BBBBBB", "linewidth": 1.0, "linestyle": "--"}
END: Style = {"facecolor": "#111111", "edgecolor": "#111111", "linewidth": 2.4}
INK, DIM = "#111111", "#6B6B6B"

QUESTION, LEAF, GAP, HEIGHT = 3.2, 1.35, 0.45, 0.95  # widths of boxes and of what is between them; their height
STRIDE = 1.35  # from a question down to the next
TOP = 4 * STRIDE + 1.1  # of the first question's box, its lower edge
FIRST_LEFT = 3.7
LEFT = {True: 0.05, False: 5.55}  # of each ladder, by the answer to the first question

ALT = (
    "The decision tree. First: does an adapter train? If so: does the policy fit each GPU whole, or does a share fit "
    "on several ranks? If all weights train: do policy and clone fit, do shares of both, is there host memory to swap "
    "with, is the data known? Each yes leads to a way to keep the reference. The path of this run has thick lines and "
    "the numbers that decided it; what it ends at is black."
)


def tree_figure(advice: Advice) -> Figure:
    """Return the decision tree with the path of an advice: thick lines, and in its boxes what decided them."""
    figure = Figure(figsize=(10.0, 6.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 10.6), ylim=(0.12, TOP + HEIGHT + 0.05))
    axes.set_axis_off()
    axes.set_title(_title(advice), loc="left", fontsize=10.5)
    answers = {answer.question: answer for answer in advice.path}
    _question(axes, (FIRST_LEFT, TOP), FIRST, answers)
    for adapter, left in LEFT.items():
        side = FIRST_LEFT if adapter else FIRST_LEFT + QUESTION
        bend = left + QUESTION / 2
        corners = [(side, TOP + HEIGHT / 2), (bend, TOP + HEIGHT / 2), (bend, TOP - STRIDE + HEIGHT)]
        _arrow(axes, corners, "yes" if adapter else "no", adapter == advice.run.trains_adapter)
        _ladder(axes, adapter, answers)
    return figure


def decision_tree(advice: Advice) -> Picture:
    """Return `tree_figure` as notebook output."""
    return Picture(tree_figure(advice), ALT)


def _title(advice: Advice) -> str:
    run = advice.run
    gpus = f"{run.ranks:,} GPU{'s' if run.ranks > 1 else ''} of {run.device_memory / GIB:g} GiB"
    model = f"{run.model}, " if isinstance(run.model, str) else ""
    return f"{model}{run.trains}, {gpus}: {advice.recommended or NOTHING}"


def _ladder(axes: Axes, adapter: bool, answers: Mapping[str, Answer]) -> None:
    """Draw the questions below one answer to the first, each with its way beside it, and nothing at the foot."""
    left, floor = LEFT[adapter], TOP
    for question in LADDERS[adapter]:
        floor -= STRIDE
        answer = answers.get(question.text)
        right = (left + QUESTION, floor + HEIGHT / 2)
        _question(axes, (left, floor), question.text, answers)
        _arrow(axes, [right, (right[0] + GAP, right[1])], "yes", answer is not None and answer.yes)
        _leaf(axes, (right[0] + GAP, floor), question.way.name, answer is not None and answer.yes)
        below = [(left + QUESTION / 2, floor), (left + QUESTION / 2, floor - STRIDE + HEIGHT)]
        _arrow(axes, below, "no", answer is not None and not answer.yes)
    ends = answers.get(LADDERS[adapter][-1].text)
    _leaf(
        axes, (left + (QUESTION - LEAF) / 2, floor - STRIDE + HEIGHT - 0.5), NOTHING, ends is not None and not ends.yes
    )


def _question(axes: Axes, corner: Point, text: str, answers: Mapping[str, Answer]) -> None:
    answer = answers.get(text)
    _box(axes, corner, (QUESTION, HEIGHT), OFF if answer is None else ON)
    x, y = corner[0] + QUESTION / 2, corner[1] + HEIGHT / 2
    if answer is None:
        axes.text(x, y, textwrap.fill(text, 34), ha="center", va="center", fontsize=8.5, color=DIM)
        return
    axes.text(x, y + 0.2, textwrap.fill(text, 34), ha="center", va="center", fontsize=8.5, color=INK, weight="bold")
    because = textwrap.fill(f"{'yes' if answer.yes else 'no'}: {answer.because}", 44)
    axes.text(x, y - 0.24, because, ha="center", va="center", fontsize=8, color=INK)


def _leaf(axes: Axes, corner: Point, text: str, on: bool) -> None:
    height = HEIGHT if text != NOTHING else 0.5
    _box(axes, corner, (LEAF, height), END if on else OFF)
    ink: Style = {"color": "white", "weight": "bold"} if on else {"color": DIM}
    place = corner[0] + LEAF / 2, corner[1] + height / 2
    axes.text(*place, text.replace(", ", ",\n"), ha="center", va="center", fontsize=9.5, **ink)


def _box(axes: Axes, corner: Point, size: Point, style: Style) -> None:
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.08", **style))


def _arrow(axes: Axes, corners: Sequence[Point], text: str, on: bool) -> None:
    line: dict[str, Any] = {"color": INK if on else "#BBBBBB", "linewidth": 2.4 if on else 1.0, "zorder": 0}
    axes.plot(*zip(*corners, strict=True), **line)
    axes.annotate("", xy=corners[-1], xytext=corners[-2], arrowprops={"arrowstyle": "->"} | line)
    (x, y), (to_x, to_y) = corners[:2]
    ink: Style = {"color": INK if on else DIM, "weight": "bold" if on else "normal", "fontsize": 8.5}
    if x == to_x:
        axes.text(x + 0.08, (y + to_y) / 2, text, ha="left", va="center", **ink)
    else:
        axes.text((x + to_x) / 2, y + 0.06, text, ha="center", va="bottom", **ink)


# The panel

RANKS = [1 << power for power in range(11)]
MEMORY = [8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192]  # GiB of GPUs that are sold
SEQUENCES = [128 << power for power in range(9)]
BATCHES = [1 << power for power in range(7)]
HOST = [0, 16, 32, 64, 128, 256, 512, 1024]
TRAINS = [("all weights", None), ("LoRA of rank 8", 8), ("LoRA of rank 16", 16), ("LoRA of rank 64", 64)]


class TreePanel(Panel):
    """Controls for `advise` and `decision_tree`: each change prices what the path needs, and lights it.

    `memory` and `host_memory` are GiB for each GPU. `panel.advice` is what is shown.
    Raises ValueError for a value that its slider has no step for; `advise` takes any.
    """

    alt = ALT

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-7B",
        *,
        ranks: int = 1,
        memory: int = 80,
        seq: int = 1024,
        batch: int = 1,
        lora_rank: int | None = None,
        host_memory: int = 0,
        checkpointing: bool = False,
        fixed_data: bool = False,
    ) -> None:
        self.model = _slider("model", _models(), model)
        self.ranks = _slider("GPUs", [(f"{count:,}", count) for count in RANKS], ranks)
        self.memory = _slider("memory", [(f"{gib} GiB", gib) for gib in MEMORY], memory)
        self.seq = _slider("sequence", [(f"{tokens:,} tokens", tokens) for tokens in SEQUENCES], seq)
        self.batch = _slider("batch", [(f"{count}", count) for count in BATCHES], batch)
        self.host_memory = _slider("host memory", [(f"{gib:,} GiB", gib) for gib in HOST], host_memory)
        self.lora_rank = _slider("trains", TRAINS, lora_rank)
        self.checkpointing = _box_to_tick("gradient checkpointing", checkpointing)
        self.fixed_data = _box_to_tick("data known before training", fixed_data)
        self.path = widgets.HTML()
        # About what the picture needs in a window of any width, so that nothing below it jumps.
        self.picture = widgets.HTML(layout=widgets.Layout(min_height="min(560px, 43vw)"))
        self.details = widgets.HTML()
        self.button = button("All bills", self.show_bills, "Price all ways, and what would change the advice")
        for control in self._controls().values():
            control.observe(self._refresh, "value")
        self.advice = self._refresh()
        self.widget = self._layout()

    def figure(self) -> Figure:
        """Return the tree for what the panel shows."""
        return tree_figure(self.advice)

    def show_bills(self) -> None:
        """Show all bills, and what would change the advice, as the button does; an error is shown and raised."""
        self._show("Pricing all ways, and what would change the advice …")
        try:
            text = repr(self.advice)
        except BaseException as error:
            self._show(f"{type(error).__name__}: {error}", "alert")
            raise
        self.details.value = f'<pre style="background:none;color:inherit;overflow-x:auto">{escape(text)}</pre>'
        self._show_path()

    def _refresh(self, change: object = None) -> Advice:
        chosen = {name: control.value for name, control in self._controls().items()}
        self._show(f"Pricing {chosen['model']} …")
        try:
            self.advice = advise(
                chosen.pop("model"),
                device_memory=chosen.pop("memory") * GIB,
                host_memory=chosen.pop("host_memory") * GIB,
                **chosen,
            )
        except BaseException as error:
            self._show(f"{type(error).__name__}: {error}", "alert")
            raise
        self.details.value = ""
        self.picture.value = image_html(self.figure(), self.alt)
        self._show_path()
        return self.advice

    def _show(self, text: str, kind: str = "status") -> None:
        self.path.value = message(text, kind)

    def _show_path(self) -> None:
        self._show(" ".join([*map(str, self.advice.path), self.advice.reason]))

    def _controls(self) -> dict[str, Any]:
        names = ("model", "ranks", "memory", "seq", "batch", "lora_rank", "host_memory", "checkpointing", "fixed_data")
        return {name: getattr(self, name) for name in names}

    def _layout(self) -> widgets.VBox:
        rows = [
            [self.model],
            [self.ranks, self.memory],
            [self.seq, self.batch],
            [self.lora_rank, self.host_memory],
            [self.checkpointing, self.fixed_data, self.button],
        ]
        row = widgets.Layout(flex_flow="row wrap", grid_gap="0 18px", align_items="center")
        boxes = [widgets.HBox(controls, layout=row) for controls in rows]
        return widgets.VBox([*boxes, self.path, self.picture, self.details], layout=widgets.Layout(max_width="960px"))


def _models() -> list[tuple[str, str]]:
    sizes = sorted(known_models().items(), key=lambda known: known[1])
    return [(f"{count / 1e9:.1f}B {name.split('/')[-1]}", name) for name, count in sizes]


def _slider(label: str, options: Sequence[tuple[str, Any]], value: Any) -> Slider:
    # Only where the handle is let go, for a bill takes part of a second.
    return Slider(label, options, value, continuous=False)


def _box_to_tick(label: str, value: bool) -> widgets.Checkbox:
    return widgets.Checkbox(value=value, description=label, indent=False, layout=widgets.Layout(width="240px"))
