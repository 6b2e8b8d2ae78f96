"""TrainPanel: a training while it runs, with its leash in your hand; and the pictures of finished ones.

with TrainPanel(make_run, iterations=12, beta=0.0) as panel:
    run = await panel.train()
"""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Self

import ipywidgets as widgets
from IPython.display import display
from matplotlib.figure import Figure

from refkl_lib.memory.ledger import MemoryLedger
from refkl_lib.train.records import Record
from refkl_lib.train.run import TrainRun
from refkl_lib.view.choice import Menu, Slider, named
from refkl_lib.view.panel import Live, Panel, Picture, button, hide, message
from refkl_lib.view.train_figures import Peak, readout_html, train_figure

TURN = 0.02  # seconds between two iterations, in which buttons and other cells are heard
PAUSE = 0.25  # seconds between two drawings, at least
WEIGH_EVERY = 5  # iterations; a ledger makes learning longer by a tenth
BETAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SYNCS = [("never", None), ("every 5 iterations", 5), ("every iteration", 1)]


class TrainPanel(Panel):
    """Controls for a training: choose how the reference is kept, start, pause, stop, and move beta while it runs.

    `make(strategy=…, beta=…, sync_every=…)` returns the `TrainRun` that is then trained for `iterations`. The training
    takes turns with everything else in the kernel: after each iteration, buttons are heard and other cells may run. For
    that, a cell that waits for it says `await panel.train()`. `panel.start()`, `pause()` and `stop()` do what the
    buttons do. Inside a `with` block its readout is live, and leaves a picture behind; at its end nothing runs any
    more. `panel.run` is the last run, with its history, and `panel.peaks` has the bytes by owner at the peak of the
    learning in every fifth iteration, from the second on, when the optimizer has its state. Writing takes less.
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
        self.peaks: dict[int, Peak] = {}
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
        self.widget = _rows([self.strategy, self.sync_every, self.beta], self.buttons, self.status, self.readout)
        self._watched = _rows([self.beta, *self.buttons[1:]], self.status, self.readout)
        self._loop = _running_loop()
        self._training: Future[None] | None = None
        self._paused = self._stopping = False
        self._error: BaseException | None = None
        self._drawn = 0.0
        self._show("Choose, then press Start.")

    def start(self) -> TrainRun:
        """Make a run as chosen, let it train from now on, and return it at once; an error is shown and raised.

        Raises RuntimeError if a training runs already, or where no event loop runs: notebooks have one.
        """
        if self._runs():
            raise RuntimeError("this panel's training is running already: stop it first")
        loop = self._loop or _running_loop()
        if loop is None:
            raise RuntimeError(
                "no event loop runs here, and a panel's training needs one: use a notebook, "
                "asyncio.run(panel.train()), or a TrainRun of its own, whose train() needs none"
            )
        self._show(f"Making a policy and its reference ({self.strategy.value}) …")
        try:
            run = self.make(strategy=self.strategy.value, beta=self.beta.value, sync_every=self.sync_every.value)
        except BaseException as error:
            self._show(f"{type(error).__name__}: {error}", "alert")
            raise
        self.run, self.peaks, self._error = run, {}, None
        self._paused = self._stopping = False
        # JupyterLab may have a button's click heard in a thread of its own; Ctrl-C only reaches the kernel's.
        self._training = asyncio.run_coroutine_threadsafe(self._train(run), loop)
        return run

    def pause(self) -> None:
        """Hold the training after its present iteration; asked again, let it go on."""
        self._paused = not self._paused
        if self._paused and self._runs():
            self._show("Pausing after this iteration …")

    def stop(self) -> None:
        """End the training after its present iteration."""
        self._stopping = True
        if self._runs():
            self._show("Stopping after this iteration …")

    async def wait(self) -> TrainRun:
        """Return the run when its training has ended, and raise what ended it, a Ctrl-C too.

        Raises RuntimeError if nothing was started.
        """
        if self.run is None or self._training is None:
            raise RuntimeError("nothing was started: call panel.start(), or await panel.train() for both")
        await asyncio.wrap_future(self._training)
        if self._error is not None:
            raise self._error
        return self.run

    async def train(self) -> TrainRun:
        """Start, and wait; return the run."""
        self.start()
        return await self.wait()

    def figure(self) -> Figure:
        """Return the curves up to now, and three of the texts."""
        return train_figure(self._history(), self.peaks)

    def __enter__(self) -> Self:
        display(Live(self._watched))
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        hide(self._watched)
        display(Picture(self.figure(), self.alt))

    def _runs(self) -> bool:
        return self._training is not None and not self._training.done()

    def _history(self) -> list[Record]:
        return [] if self.run is None else self.run.history

    async def _train(self, run: TrainRun) -> None:
        try:
            while len(run.history) < self.iterations and not self._stopping:
                with _interruptible():
                    self._iterate(run)
                await asyncio.sleep(TURN)
                await self._hold()
        except KeyboardInterrupt as error:  # told by `wait`: raised here it would end the kernel's loop
            self._error = error
            self._draw(f"Interrupted: {len(run.history)} iterations.")
        except Exception as error:
            self._error = error
            self._show(f"{type(error).__name__}: {error}", "alert")
        else:
            self._draw(f"Done: {len(run.history)} iterations.")

    def _iterate(self, run: TrainRun) -> None:
        iteration = len(run.history)
        if iteration % WEIGH_EVERY == 1:
            self.peaks[iteration] = weighed_step(run)
        else:
            run.step()
        if time.monotonic() - self._drawn > PAUSE:
            self._draw(f"Done: {self._last()}.")

    async def _hold(self) -> None:
        if self._paused and not self._stopping:
            self._draw(f"Paused: {self._last()}. Press Pause again to go on.")
        while self._paused and not self._stopping:
            await asyncio.sleep(TURN)

    def _last(self) -> str:
        record = self._history()[-1]
        return f"iteration {record.iteration + 1} of {self.iterations}, beta {record.beta:g}"

    def _draw(self, text: str) -> None:
        self._drawn = time.monotonic()
        self.readout.value = readout_html(self._history(), self.peaks)
        self._show(text)

    def _move_beta(self, change: object) -> None:
        if self.run is not None:
            self.run.beta = self.beta.value

    def _show(self, text: str, kind: str = "status") -> None:
        self.status.value = message(text, kind)


def weighed_step(run: TrainRun) -> Peak:
    """Let a run make one step, and return the bytes at the peak of its learning, by owner."""
    ledger = MemoryLedger()
    for name in ("policy", "reference", "optimizer"):
        ledger.own(name, getattr(run, name))
    run.step(watch=ledger)
    return ledger.peak()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C or the toolbar's stop button raise KeyboardInterrupt in a block: an idle kernel ignores them."""
    if threading.current_thread() is not threading.main_thread():  # no other thread is interrupted
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _rows(*rows: widgets.Widget | list[widgets.Widget]) -> widgets.VBox:
    line = widgets.Layout(flex_flow="row wrap", grid_gap="0 24px", align_items="center")
    boxes = [widgets.HBox(row, layout=line) if isinstance(row, list) else row for row in rows]
    return widgets.VBox(boxes, layout=widgets.Layout(max_width="960px"))
