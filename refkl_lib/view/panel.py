"""The pattern of every panel: a figure made by a pure function, and thin controls around it.

Where a kernel is running, a panel is a live widget. Everywhere else (GitHub, nbviewer, an exported page, a
notebook that was just opened) it is a picture with a text: its static face.
"""

import base64
from collections.abc import Callable
from functools import partial
from html import escape
from io import BytesIO
from typing import Any

import ipywidgets as widgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours of Okabe and Ito, told apart by colour-blind eyes; the hatches tell them apart in print.
OWNER_STYLES = {
    "policy": ("#0072B2", ""),
    "reference": ("#E69F00", "//"),
    "gradients": ("#009E73", ".."),
    "optimizer": ("#CC79A7", "xx"),
    "activations": ("#BBBBBB", ""),
}

MimeBundle = tuple[dict[str, Any], dict[str, Any]]


class Panel:
    """A live widget with a static face.

    A panel gives `widget`, the controls; `figure()`, the picture of its present state; and `alt`, one
    constant sentence that says what there is to see.
    """

    alt: str
    widget: widgets.DOMWidget

    def figure(self) -> Figure:
        """Return the picture of what the panel shows now."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **_: Any) -> MimeBundle:
        live = self.widget._repr_mimebundle_()
        data, metadata = static_face(self.figure(), self.alt)
        return live | data, metadata


def static_face(figure: Figure, alt: str) -> MimeBundle:
    """Return a figure as notebook output, with `alt` as its text.

    It is there twice: JupyterLab and exported pages take the HTML, which has the text for screen readers; GitHub
    takes the PNG. The plain text never changes with the numbers, so an output can be compared with a stored one.
    """
    picture = base64.b64encode(png(figure)).decode()
    data = {"text/html": _img(picture, alt), "image/png": picture, "text/plain": alt}
    return data, {"image/png": {"alt": alt}}


class Picture:
    """A figure as notebook output, with a text for those who do not see it."""

    def __init__(self, figure: Figure, alt: str) -> None:
        self.figure = figure
        self.alt = alt

    def _repr_mimebundle_(self, **_: Any) -> MimeBundle:
        return static_face(self.figure, self.alt)


class Live:
    """A readout of a running cell, as an output whose text stays true after the widget has gone."""

    def __init__(self, widget: widgets.DOMWidget) -> None:
        self._widget = widget

    def _repr_mimebundle_(self, **_: object) -> dict[str, object]:
        text = "(a live readout, while the cell runs)"
        return self._widget._repr_mimebundle_() | {"text/plain": text, "text/html": f"<em>{text}</em>"}


def hide(readout: widgets.DOMWidget) -> None:
    """Let a readout vanish when its cell is done.

    It is not closed: a notebook that is opened again would say in its place that a widget was not found.
    """
    readout.layout.display = "none"


def plain(axes: Axes) -> None:
    """Leave out what a picture's axes do not need: the lines above and at the right, and large numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG on white, which both the light and the dark theme can show."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white", bbox_inches="tight")
    return file.getvalue()


def image_html(figure: Figure, alt: str) -> str:
    """Return a figure as an HTML image; unlike `widgets.Image` it has a text for screen readers."""
    return _img(base64.b64encode(png(figure)).decode(), alt)


def _img(picture: str, alt: str) -> str:
    return f'<img src="data:image/png;base64,{picture}" alt="{escape(alt)}" style="max-width:100%">'


def message(text: str, kind: str = "status") -> str:
    """Return a line for a panel's status as HTML; `kind` is its ARIA role, "status" or "alert"."""
    style = "border-left:3px solid #D55E00;padding-left:8px" if kind == "alert" else ""
    return f'<div role="{kind}" style="line-height:1.4;{style}">{escape(text)}</div>'


def button(label: str, action: Callable[[], object], tooltip: str) -> widgets.Button:
    """Return a button that does one thing, and is disabled while it does it."""
    made = widgets.Button(description=label, tooltip=tooltip, button_style="primary")
    made.on_click(partial(_press, action))
    return made


def _press(action: Callable[[], object], pressed: widgets.Button) -> None:
    pressed.disabled = True
    try:
        action()
    finally:
        pressed.disabled = False
