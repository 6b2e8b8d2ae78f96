"""TrainPanel: a training while it runs, with its leash in your hand; and the pictures of finished ones.

with TrainPanel(make_run, iterations=12, beta=0.0) as panel:
    run = panel.train()
"""

import threading
import time
from collections.abc import Callable
from typing import Self

import ipywidgets as widgets
from IPython.display import display
from matplotlib.figure import Figure

from refkl_lib.memory.ledger import MemoryLedger
from refkl_lib.train.run import Record, TrainRun
from refkl_lib.view.choice import Menu, Slider, named
from refkl_lib.view.panel import Live, Panel, Picture, button, hide, message
from refkl_lib.view.train_figures import Peak, readout_html, train_figure

THREAD = "TrainPanel"
PAUSE = 0.25  # seconds between two drawings, at least
BETAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SYNCS = [("never", None), ("every 5 iterations", 5), ("every iteration", 1)]


class TrainPanel(Panel):
    """Controls for a training: choose how the reference is kept, start, pause, stop, and move beta while it runs.

    `make(strategy=…, beta=…, sync_every=…)` returns the `TrainRun` that is then trained for `iterations`, in a thread,
    so that the buttons work. `panel.start()`, `pause()` and `stop()` do what the buttons do; `panel.train()` starts and
    waits. Inside a `with` block its readout is live, and leaves a picture behind; at its end nothing runs any more.
    `panel.run` is the last run, with its history.
    """

    alt = "A training, iteration by iteration: reward, KL, loss and the bytes at the peak, by owner; and what it wrote."

    def __init__(
        self,
        make: Callable[..., TrainRun],
        iterations: int = 12,
        *,
        strategy: str = "adapter",
        beta: float = 1.0,
        sync_every: int | None = None,
    ) -> None:
        self.make = make
        self.iterations = iterations
        self.run: TrainRun | None = None
        self.peaks: list[Peak] = []
        self.strategy = Menu("reference", named("adapter", "clone"), strategy)
        self.sync_every = Menu("sync it", SYNCS, sync_every)
        self.beta = Slider("beta", [(f"{step:g}", step) for step in sorted({*BETAS, beta})], beta)
        self.beta.observe(self._move_beta, "value")
        self.buttons = [
            button("Start", self.start, "Make a run as chosen, and train it"),
            button("Pause", self.pause, "Hold the training after the present iteration, or let it go on"),
            button("Stop", self.stop, "End the training after the present iteration"),
        ]
        self.status, self.readout = widgets.HTML(), widgets.HTML(layout=widgets.Layout(min_height="250px"))
        self.widget = self._layout()
        # While a cell runs, the kernel hears no button, so a block shows none; the toolbar's stop button works.
        self._watched = widgets.VBox([self.status, self.readout])
        self._worker: threading.Thread | None = None
        self._go, self._stopping = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._drawn = 0.0
        self._show("Choose, then press Start.")

    def start(self) -> TrainRun:
        """Make a run as chosen, train it in a thread, and return it at once; an error is shown and raised.

        Raises RuntimeError if a training runs already.
        """
        if self._worker is not None and self._worker.is_alive():
            raise RuntimeError("this panel's training is running already: stop it first")
        self._show(f"Making a policy and its reference ({self.strategy.value}) …")
        try:
            run = self.make(strategy=self.strategy.value, beta=self.beta.value, sync_every=self.sync_every.value)
        except BaseException as error:
            self._show(f"{type(error).__name__}: {error}", "alert")
            raise
        self.run, self.peaks, self._error = run, [], None
        self._go.set()
        self._stopping.clear()
        self._worker = threading.Thread(target=self._train, name=THREAD, args=(run,), daemon=True)
        self._worker.start()
        return run

    def pause(self) -> None:
        """Hold the training after its present iteration; asked again, let it go on."""
        if self._go.is_set():
            self._go.clear()
            self._show("Pausing after this iteration …")
        else:
            self._go.set()

    def stop(self) -> None:
        """End the training after its present iteration."""
        self._stopping.set()
        self._go.set()

    def wait(self) -> TrainRun:
        """Return the run when its training has ended, and raise what ended it; Ctrl-C stops the training first.

        Raises RuntimeError if nothing was started.
        """
        if self.run is None or self._worker is None:
            raise RuntimeError("nothing was started: call panel.start(), or panel.train() for both")
        try:
            while self._worker.is_alive():
                self._worker.join(0.2)
        finally:
            self._end()
        if self._error is not None:
            raise self._error
        return self.run

    def train(self) -> TrainRun:
        """Start, and wait; return the run."""
        self.start()
        return self.wait()

    def figure(self) -> Figure:
        """Return the curves up to now, and three of the texts."""
        return train_figure(self._history(), self.peaks)

    def __enter__(self) -> Self:
        display(Live(self._watched))
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        hide(self._watched)
        display(Picture(self.figure(), self.alt))

    def _end(self) -> None:
        if self._worker is not None:
            self.stop()
            self._worker.join()

    def _history(self) -> list[Record]:
        return [] if self.run is None else list(self.run.history)

    def _train(self, run: TrainRun) -> None:
        try:
            with MemoryLedger() as ledger:
                for name in ("policy", "reference", "optimizer"):
                    ledger.own(name, getattr(run, name))
                run.train(self.iterations, on_record=lambda record: self._hear(record, ledger))
        except BaseException as error:  # told by `wait`, in the thread of whoever waits
            self._error = error
            self._show(f"{type(error).__name__}: {error}", "alert")
        else:
            self._draw(f"Done: {len(run.history)} iterations.")

    def _hear(self, record: Record, ledger: MemoryLedger) -> None:
        self.peaks.append(ledger.peak())
        ledger.reset_peak()
        done = f"iteration {record.iteration + 1} of {self.iterations}, beta {record.beta:g}"
        if not self._go.is_set():
            self._draw(f"Paused: {done}. Press Pause again to go on.")
        elif time.monotonic() - self._drawn > PAUSE:
            self._draw(f"Done: {done}.")
        self._go.wait()
        if self._stopping.is_set() and self.run is not None:
            self.run.stop()

    def _draw(self, text: str) -> None:
        self._drawn = time.monotonic()
        self.readout.value = readout_html(self._history(), self.peaks)
        self._show(text)

    def _move_beta(self, change: object) -> None:
        if self.run is not None:
            self.run.beta = self.beta.value

    def _show(self, text: str, kind: str = "status") -> None:
        self.status.value = message(text, kind)

    def _layout(self) -> widgets.VBox:
        row = widgets.Layout(flex_flow="row wrap", grid_gap="0 24px", align_items="center")
        return widgets.VBox(
            [
                widgets.HBox([self.strategy, self.sync_every, self.beta], layout=row),
                widgets.HBox(self.buttons, layout=row),
                self.status,
                self.readout,
            ],
            layout=widgets.Layout(max_width="960px"),
        )
