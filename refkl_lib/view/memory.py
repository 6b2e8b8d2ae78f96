"""MemoryPanel: the bytes that live, by owner, while a cell runs.

with MemoryPanel() as panel:
    policy = panel.own("policy", load_model("smollm2"))
    reference = create_reference(policy, "clone")
    panel.own("reference", reference)
"""

import threading
from collections.abc import Mapping, Sequence
from html import escape
from typing import Self

import ipywidgets as widgets
from IPython.display import display
from matplotlib.figure import Figure

from refkl_lib.memory.ledger import MemoryLedger, Point, Thing
from refkl_lib.memory.meters import Meter, read_meter
from refkl_lib.units import show_bytes
from refkl_lib.view.figures import OTHER, timeline_figure
from refkl_lib.view.panel import OWNER_STYLES, Live, MimeBundle, hide, static_face

COLUMNS = 120  # of the picture that is drawn while the cell runs


class MemoryPanel:
    """A readout that is live inside its `with` block and leaves a picture behind.

    It holds a `MemoryLedger` (`panel.ledger`), which it enters and leaves with the block. The readout is
    written `rate` times a second by a thread of its own, which ends with the block, whatever ends that.
    The ledger looks at every operation, which takes the longer the smaller operations are: a step of smollm2 with
    2 × 128 tokens took 4 to 20 % longer on different days, one that trains an adapter with 64 tokens 50 to 55 %
    (benchmarks/ledger_overhead.py). Beside that, what the readout takes could not be seen.
    Raises ValueError if `rate` is not positive.
    """

    alt = "Bytes that lived while the cell ran, by owner, over time; the peak is marked and broken down."

    def __init__(self, rate: float = 3.0) -> None:
        if not rate > 0:
            raise ValueError(f"rate is {rate}, but must be more than 0: how often a second the readout is written")
        self.ledger = MemoryLedger()
        self.widget = widgets.HTML(layout=widgets.Layout(height="300px", width="100%"))
        self._pause = 1 / rate
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def own(self, name: str, thing: Thing) -> Thing:
        """Put what `thing` holds under `name`, as `MemoryLedger.own` does, and return it."""
        return self.ledger.own(name, thing)

    def figure(self) -> Figure:
        """Return the timeline by owner up to now, with the peak broken down."""
        return timeline_figure(self.ledger.timeline, self.ledger.peak())

    def _repr_mimebundle_(self, **_: object) -> MimeBundle:
        return static_face(self.figure(), self.alt)

    def __enter__(self) -> Self:
        # Displayed empty and filled afterwards: the stored output then holds no number that varies.
        display(Live(self.widget))
        self.ledger.__enter__()
        self._sampler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._sampler.join()
        self.ledger.__exit__(*exception)
        hide(self.widget)
        display(self)

    def _sample(self) -> None:
        while not self._stop.wait(self._pause):
            table = readout_html(self.ledger.now(), self.ledger.peak(), read_meter(pss=False))
            self.widget.value = table + timeline_html(self.ledger.timeline)


def timeline_html(timeline: Sequence[Point]) -> str:
    """Return the bytes over time as an SVG picture, owners stacked as in the table, its highest moment marked.

    It is drawn several times a second, for which a figure would take too long.
    """
    slices = _slices(timeline)
    totals = [sum(owners.values()) for _, owners in slices]
    peak = max(totals)
    highest = totals.index(peak)
    stack = list(slices[-1][1])
    areas = [_area(slices, stack[: upto + 1], peak) for upto in reversed(range(len(stack)))]
    start, end = slices[0][0], slices[-1][0]
    said = f"{end - start:.1f} s so far; the peak, {show_bytes(peak)}, was at {slices[highest][0] - start:.1f} s"
    mark = (
        f'<path d="M{highest} 0V100" stroke="currentColor" stroke-dasharray="3 3" vector-effect="non-scaling-stroke"/>'
    )
    return (
        f'<svg viewBox="0 0 {max(len(slices) - 1, 1)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{said}" style="width:100%;max-width:820px;height:80px;display:block;margin-top:4px">'
        f"{''.join(areas)}{mark}</svg><div>{said}</div>"
    )


def _slices(timeline: Sequence[Point]) -> list[Point]:
    """Return the highest point of each of COLUMNS slices of time, the last one's in a slice without any."""
    start, end = timeline[0][0], timeline[-1][0]
    width = (end - start) / COLUMNS or 1.0
    found: list[Point | None] = [None] * COLUMNS
    for point in timeline:
        at = min(int((point[0] - start) / width), COLUMNS - 1)
        best = found[at]
        found[at] = point if best is None or sum(point[1].values()) >= sum(best[1].values()) else best
    shown = [timeline[0]]
    for highest in found:
        shown.append(highest or shown[-1])
    return shown


def _area(slices: Sequence[Point], owners: Sequence[str], peak: int) -> str:
    """Return the area below what these owners hold together, in the colour of the last."""
    scale = 100 / max(peak, 1)
    heights = (sum(held.get(owner, 0) for owner in owners) * scale for _, held in slices)
    top = " ".join(f"{at},{100 - height:.0f}" for at, height in enumerate(heights))
    color = OWNER_STYLES.get(owners[-1], OTHER)[0]
    return f'<polygon points="0,100 {top} {len(slices) - 1},100" fill="{color}"/>'


def readout_html(now: Mapping[str, int], peak: Mapping[str, int], meter: Meter) -> str:
    """Return the readout as an HTML table: a bar, the bytes now and the bytes at the peak for each owner."""
    scale = max(sum(peak.values()), 1)
    rows = "".join(_row(owner, now[owner], peak.get(owner, 0), scale) for owner in now)
    total = _cells("all", show_bytes(sum(now.values())), show_bytes(sum(peak.values())))
    return (
        '<table style="width:100%;max-width:820px;border-collapse:collapse;line-height:1.5">'
        '<tr><th style="text-align:left;width:110px">owner</th><th style="text-align:left">lives now</th>'
        '<th style="text-align:right;width:90px">now</th>'
        '<th style="text-align:right;width:90px">at peak</th></tr>'
        f"{rows}<tr style='border-top:1px solid'>{total}</tr></table>"
        f"<div>The system says: {escape(str(meter))}</div>"
    )


def _row(owner: str, now: int, peak: int, scale: int) -> str:
    color = OWNER_STYLES.get(owner, OTHER)[0]
    bar = f'<div style="height:12px;width:{100 * now / scale:.1f}%;background:{color}"></div>'
    return f"<tr>{_cells(escape(owner), show_bytes(now), show_bytes(peak), bar)}</tr>"


def _cells(owner: str, now: str, peak: str, bar: str = "") -> str:
    right = 'style="text-align:right"'
    return f"<td>{owner}</td><td>{bar}</td><td {right}>{now}</td><td {right}>{peak}</td>"
