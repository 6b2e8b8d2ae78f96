"""A notebook without controls: it runs."""

from .notebook import Notebook


class TestAdapter(Notebook):
    name = "03_adapter_switch.ipynb"
