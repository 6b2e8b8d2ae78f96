"""StrategyPanel: choose how the reference is kept, price it or run it on the real model, and compare the bills."""

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from refkl_lib.comparison import StrategyRun, price_strategy, run_strategy
from refkl_lib.ranks.events import describe
from refkl_lib.reference import STRATEGIES
from refkl_lib.units import show_bytes
from refkl_lib.view.choice import Menu, Radios, named
from refkl_lib.view.figures import runs_figure
from refkl_lib.view.panel import Panel, button, image_html, message

RANKS = [("4", 4), ("8", 8), ("16", 16), ("32", 32), ("none: train all weights", None)]
CHOICES = ("model", "lora_rank", "batch", "seq", "ranks")
HEADER = ("run", "batch × seq", "reference holds", "peak", "KL at each step", "step", "reference's pass")


class StrategyPanel(Panel):
    """Controls for `price_strategy` and `run_strategy`; each press of a button adds a row and a bar.

    `runs` are shown from the start. `panel.price()` and `panel.run()` do what the buttons do, and `panel.runs` keeps
    the results.
    """

    alt = "Bytes at the peak of a training step, by owner, one bar for each run; KL and seconds beside it."

    def __init__(self, model: str = "smollm2", runs: Sequence[StrategyRun] = ()) -> None:
        self.runs = list(runs)
        self.strategy = Radios("strategy", named(*STRATEGIES), STRATEGIES[0])
        self.lora_rank = Menu("LoRA rank", RANKS, 8)
        self.model = Menu("model", named(*sorted({"pocket", "smollm2", model})), model)
        self.ranks = Menu("ranks", [("1 (zero3)", 1), ("2 (zero3)", 2), ("4 (zero3)", 4)], 2)
        self.batch = Menu("batch", named(1, 2, 4), 1)
        self.seq = Menu("sequence", named(32, 64, 128, 256), 64)
        self.status = widgets.HTML()
        self.table = widgets.HTML()
        self.picture = widgets.HTML()
        self.buttons = [
            button("Price", self.price, "Add the row and the bar of a bill; nothing runs"),
            button("Run", self.run, "Train three steps on the real model and add a row and a bar"),
        ]
        self._show("Choose, then press Price or Run. To run, zero3 starts real processes and takes the longest.")
        self._refresh()
        self.widget = self._layout()

    def price(self) -> StrategyRun:
        """Price what is chosen, add it to the picture and return it; an error is shown and raised."""
        return self._add("Pricing", price_strategy)

    def run(self) -> StrategyRun:
        """Run what is chosen, add it to the picture and return it; an error is shown and raised."""
        return self._add("Running", partial(run_strategy, on_event=self._tell))

    def _add(self, doing: str, measure: Callable[..., StrategyRun]) -> StrategyRun:
        chosen = {name: getattr(self, name).value for name in CHOICES}
        self._show(f"{doing} {self.strategy.value} …")
        try:
            run = measure(self.strategy.value, **chosen)
        except BaseException as error:
            self._show(f"{type(error).__name__}: {error}", "alert")
            raise
        self.runs.append(run)
        self._refresh()
        self._show(f"Done: {run.name}.")
        return run

    def figure(self) -> Figure:
        """Return the bars of all runs."""
        return runs_figure(self.runs)

    def _tell(self, event: dict[str, Any]) -> None:
        if line := describe(event):
            self._show(line)

    def _show(self, text: str, kind: str = "status") -> None:
        self.status.value = message(text, kind)

    def _refresh(self) -> None:
        self.table.value = runs_html(self.runs)
        self.picture.value = image_html(self.figure(), self.alt)

    def _layout(self) -> widgets.VBox:
        choices = [getattr(self, name) for name in CHOICES]
        return widgets.VBox(
            [
                self.strategy,
                widgets.HBox(choices, layout=widgets.Layout(flex_flow="row wrap", grid_gap="0 24px")),
                widgets.HBox(
                    [*self.buttons, self.status], layout=widgets.Layout(align_items="center", grid_gap="12px")
                ),
                self.picture,
                self.table,
            ],
            layout=widgets.Layout(max_width="960px"),
        )


def runs_html(runs: Sequence[StrategyRun]) -> str:
    """Return the runs as an HTML table."""
    head = "".join(f'<th scope="col" style="text-align:left;padding:2px 10px 2px 0">{h}</th>' for h in HEADER)
    return f'<table style="border-collapse:collapse;line-height:1.6"><tr>{head}</tr>{_rows(runs)}</table>'


def _rows(runs: Sequence[StrategyRun]) -> str:
    cell = '<td style="padding:2px 10px 2px 0;border-top:1px solid #8884">{}</td>'
    lines = ("".join(cell.format(escape(text)) for text in _row(run)) for run in runs)
    return "".join(f"<tr>{line}</tr>" for line in lines)


def _row(run: StrategyRun) -> tuple[str, ...]:
    return (
        run.name,
        f"{run.batch} × {run.seq}",
        show_bytes(run.reference_bytes),
        show_bytes(run.peak),
        ", ".join(f"{kl:.3f}" for kl in run.kl),
        *("" if seconds is None else f"{seconds:.2f} s" for seconds in (run.step_seconds, run.reference_seconds)),
    )
