"""What the extension of Jupyter's server takes out of a notebook before it is saved."""

import asyncio

import nbformat
import pytest
from jupyter_server.extension.utils import validate_extension
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from refkl_lib.view.saved import WIDGET_VIEW, _load_jupyter_server_extension

VIEW = {WIDGET_VIEW: {"model_id": "of-a-kernel-that-is-gone"}}


class Server:
    def __init__(self, folder):
        self.contents_manager = AsyncLargeFileManager(root_dir=str(folder))


def saved(folder, *outputs):
    """The outputs of a notebook's cell as Jupyter's server, with the extension, writes them."""
    server = Server(folder)
    _load_jupyter_server_extension(server)
    notebook = new_notebook(cells=[new_markdown_cell("# A cell without outputs"), new_code_cell(outputs=list(outputs))])
    model = {"type": "notebook", "format": "json", "content": notebook}
    asyncio.run(server.contents_manager.save(model, "a.ipynb"))
    return nbformat.read(folder / "a.ipynb", as_version=4).cells[1].outputs


@pytest.mark.parametrize("face", ["text/html", "image/png", "text/markdown"])
def test_a_panel_is_saved_as_its_face(tmp_path, face):
    [panel] = saved(tmp_path, new_output("display_data", VIEW | {face: "a face", "text/plain": "a panel"}))
    assert panel.data == {face: "a face", "text/plain": "a panel"}


def test_what_is_no_panel_is_saved_as_it_is(tmp_path):
    bare = new_output("display_data", VIEW | {"text/plain": "IntSlider(value=0)"})
    printed = new_output("stream", text="1\n")
    assert saved(tmp_path, bare, printed) == [bare, printed]


def test_a_text_file_is_saved_as_it_is(tmp_path):
    server = Server(tmp_path)
    _load_jupyter_server_extension(server)
    asyncio.run(server.contents_manager.save({"type": "file", "format": "text", "content": "cells"}, "a.txt"))
    assert (tmp_path / "a.txt").read_text() == "cells"


def test_jupyter_knows_it_as_an_extension():
    assert validate_extension("refkl_lib.view.saved")
