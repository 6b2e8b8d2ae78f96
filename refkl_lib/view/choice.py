"""Choices of a panel: a slider, a menu, and a row of radio buttons, made of the browser's own elements.

Those of ipywidgets leave out who does not use a mouse. A slider's handle has no name, a pressed toggle does not say
that it is pressed, and JupyterLab takes the keys meant for a menu: an arrow leaves the cell, a letter may change it.
"""

from collections.abc import Sequence
from typing import Any

import anywidget
import traitlets

# Each element tells what was chosen with `tell`, and shows what is chosen when `show` is called. What is told goes as a
# message that the kernel answers, the latest choice after each answer: `save_changes` waits until the kernel is said to
# be idle, and of what it hears while a cell awaits, ipykernel 7.4 does not say so; the second choice would never come.
# A kernel that is busy with a cell answers when it is done, one that was restarted never does: who waits is told why.
_ESM = """
export default {
  render({ model, el }) {
    const texts = model.get("texts");
    let wanted, sent, waiting = false, soon;
    const made = (tag, properties) => Object.assign(document.createElement(tag), properties);
    const why = made("span", { role: "status" });
    const say = (text) => { clearTimeout(soon); why.textContent = text; };
    const ended = () => { waiting = false; say("its kernel has ended: run the cell again"); };
    const send = () => {
      sent = wanted;
      try { model.send({ index: sent }); waiting = true; } catch { ended(); }
    };
    const tell = (index) => {
      model.set("index", wanted = index);
      if (waiting) return;
      soon = setTimeout(say, 1000, "waits for the kernel, which is busy");
      send();
    };
    model.on("msg:custom", () => {
      if (waiting) { waiting = false; if (wanted !== sent) send(); }
      if (!waiting) say("");
    });
    model.on("comm_live_update", () => { if (waiting) ended(); });
    const control = (tag, properties) => {
      const element = made(tag, properties);
      element.dataset.lmSuppressShortcuts = "true";  // keys are this element's, not JupyterLab's
      return element;
    };
    const name = made("span", { textContent: model.get("label") });
    const { element, show } = create({ model, texts, tell, made, control, name });
    model.on("change:index", () => show(model.get("index")));
    el.classList.add("refkl-choice");
    el.append(element, why);
    show(model.get("index"));
  },
};
"""
_SLIDER = """
function create({ model, texts, tell, made, control, name }) {
  const element = made("label");
  const input = control("input", { type: "range", min: 0, max: texts.length - 1 });
  const text = made("output");
  const say = () => input.setAttribute("aria-valuetext", text.value = texts[Number(input.value)]);
  input.addEventListener("input", say);
  input.addEventListener(model.get("continuous") ? "input" : "change", () => tell(Number(input.value)));
  element.append(name, input, text);
  return { element, show: (index) => { input.value = index; say(); } };
}
"""
_MENU = """
function create({ texts, tell, made, control, name }) {
  const element = made("label");
  const select = control("select");
  select.append(...texts.map((text) => new Option(text)));
  select.addEventListener("change", () => tell(select.selectedIndex));
  element.append(name, select);
  return { element, show: (index) => { select.selectedIndex = index; } };
}
"""
_RADIOS = """
function create({ texts, tell, made, control, name }) {
  const element = made("div", { role: "radiogroup", ariaLabel: name.textContent });
  const group = String(Math.random());
  const inputs = texts.map(() => control("input", { type: "radio", name: group }));
  element.append(name, ...inputs.map((input, index) => {
    const label = made("label");
    input.addEventListener("change", () => tell(index));
    label.append(input, texts[index]);
    return label;
  }));
  return { element, show: (index) => { inputs[index].checked = true; } };
}
"""
_CSS = """
.refkl-choice { display: flex; flex-wrap: wrap; align-items: center; }
.refkl-choice > * { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 8px; min-height: 28px; margin: 2px; }
.refkl-choice > * > span { min-width: 72px; text-align: right; }
.refkl-choice input { accent-color: #0072B2; margin: 0; }
.refkl-choice input[type=range] { width: min(280px, 50vw); }
.refkl-choice output { min-width: 72px; font-variant-numeric: tabular-nums; }
.refkl-choice div label { display: flex; align-items: center; gap: 4px; margin-right: 12px; }
.refkl-choice select {
  height: 28px; padding: 0 4px; font: inherit; color: var(--jp-ui-font-color1);
  background: var(--jp-layout-color1); border: 1px solid var(--jp-border-color1);
}
"""


class Choice(anywidget.AnyWidget):
    """A choice with a label among (text, value) pairs; `value` is the one chosen, and can be set and observed.

    Raises ValueError if it is set to what is not among them.
    """

    _css = _CSS
    label = traitlets.Unicode().tag(sync=True)
    texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    index = traitlets.Int().tag(sync=True, echo_update=False)  # an echo could be older than where the handle is by now
    value = traitlets.Any()

    def __init__(self, label: str, options: Sequence[tuple[str, Any]], value: Any, **traits: Any) -> None:
        self.values = [option for _, option in options]
        super().__init__(label=label, texts=[text for text, _ in options], value=value, **traits)
        self.on_msg(self._told)

    def _told(self, _widget: Any, content: dict[str, Any], _buffers: Any) -> None:
        try:
            self.set_state({"index": content["index"]})
        finally:
            self.send("heard")

    @traitlets.validate("value")
    def _known(self, proposal: Any) -> Any:
        if proposal["value"] not in self.values:
            raise ValueError(f"{self.label} is {proposal['value']!r}, but must be {self._known_values()}")
        return proposal["value"]

    def _known_values(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"

    @traitlets.observe("value")
    def _chosen(self, change: Any) -> None:
        self.index = self.values.index(self.value)

    @traitlets.observe("index")
    def _moved(self, change: Any) -> None:
        self.value = self.values[self.index]


class Slider(Choice):
    """A choice along a line, with a handle for the mouse and the arrow keys.

    It changes while the handle moves, or, if not `continuous`, when the handle is let go.
    """

    _esm = _SLIDER + _ESM
    continuous = traitlets.Bool(True).tag(sync=True)

    def _known_values(self) -> str:
        return f"a step between {self.values[0]} and {self.values[-1]}"


class Menu(Choice):
    """A choice from a list that opens."""

    _esm = _MENU + _ESM


class Radios(Choice):
    """A choice of which all is seen at once."""

    _esm = _RADIOS + _ESM


def named(*values: Any) -> list[tuple[str, Any]]:
    """Return values as a choice's options, each with itself as the text."""
    return [(str(value), value) for value in values]
