"""Slider: a choice along a line, on the browser's own range input.

The handle of an ipywidgets slider has no name, so a screen reader says a bare number there. A range input belongs to
its label; it takes the arrow keys, Home, End, and the mouse.
"""

from collections.abc import Sequence
from typing import Any

import anywidget
import traitlets

_ESM = """
export default {
  render({ model, el }) {
    const label = document.createElement("label");
    const name = document.createElement("span");
    const input = document.createElement("input");
    const text = document.createElement("output");
    const texts = model.get("texts");
    const say = () => input.setAttribute("aria-valuetext", text.value = texts[Number(input.value)]);
    const show = () => { input.value = model.get("index"); say(); };
    const tell = () => { model.set("index", Number(input.value)); model.save_changes(); };
    Object.assign(input, { type: "range", min: 0, max: texts.length - 1 });
    input.dataset.lmSuppressShortcuts = "true";  // arrow keys are the handle's, not JupyterLab's
    input.addEventListener("input", say);
    input.addEventListener(model.get("continuous") ? "input" : "change", tell);
    name.textContent = model.get("label");
    model.on("change:index", show);
    label.append(name, input, text);
    el.classList.add("refkl-slider");
    el.append(label);
    show();
  },
};
"""
_CSS = """
.refkl-slider label { display: flex; align-items: center; gap: 8px; height: 28px; margin: 2px; }
.refkl-slider span { min-width: 72px; text-align: right; }
.refkl-slider input { width: min(280px, 50vw); accent-color: #0072B2; }
.refkl-slider output { min-width: 72px; font-variant-numeric: tabular-nums; }
"""


class Slider(anywidget.AnyWidget):
    """A slider with a label over (text, value) pairs; `value` is the one chosen, and can be set and observed.

    It changes while the handle moves, or, if not `continuous`, when the handle is let go.
    Raises ValueError if it is set to what is not among them.
    """

    _esm = _ESM
    _css = _CSS
    label = traitlets.Unicode().tag(sync=True)
    texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    continuous = traitlets.Bool(True).tag(sync=True)
    index = traitlets.Int().tag(sync=True)
    value = traitlets.Any()

    def __init__(self, label: str, options: Sequence[tuple[str, Any]], value: Any, continuous: bool = True) -> None:
        self.values = [option for _, option in options]
        super().__init__(label=label, texts=[text for text, _ in options], continuous=continuous, value=value)

    @traitlets.validate("value")
    def _known(self, proposal: Any) -> Any:
        if proposal["value"] not in self.values:
            first, last = self.values[0], self.values[-1]
            raise ValueError(f"{self.label} is {proposal['value']!r}, but must be a step between {first} and {last}")
        return proposal["value"]

    @traitlets.observe("value")
    def _chosen(self, change: Any) -> None:
        self.index = self.values.index(self.value)

    @traitlets.observe("index")
    def _moved(self, change: Any) -> None:
        self.value = self.values[self.index]
