"""A notebook is saved with the static faces of its panels, without what only the kernel of that day could show.

JupyterLab would store that as well: opened on another day, a panel has no kernel behind it, or JupyterLab says "model
not found" in its place. With the face alone it looks as when it came, and is live again as soon as its cell runs.

    python -m refkl_lib.view.saved      make the Jupyter of this environment do so
"""

from collections.abc import Mapping
from typing import Any

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
STATIC_FACES = {"image/png", "image/svg+xml", "text/html", "text/markdown"}


def keep_faces(notebook: Mapping[str, Any]) -> None:
    """Take the live view out of each output of a notebook that has a static face as well."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if not is_bare_widget(data):
                data.pop(WIDGET_VIEW, None)


def is_bare_widget(data: Mapping[str, Any]) -> bool:
    """Tell whether an output would show nothing without its widget."""
    return WIDGET_VIEW in data and not STATIC_FACES & data.keys()


def _before_save(model: Mapping[str, Any], **_: Any) -> None:
    if model["type"] == "notebook":
        keep_faces(model["content"])


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(server: Any) -> None:
    server.contents_manager.register_pre_save_hook(_before_save)


if __name__ == "__main__":
    from jupyter_server.extension.serverextension import toggle_server_extension_python

    toggle_server_extension_python("refkl_lib.view.saved", enabled=True)
