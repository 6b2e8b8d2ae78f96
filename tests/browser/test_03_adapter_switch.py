"""A notebook without controls: it runs, twice."""

from .notebook import Light, Notebook


class TestAdapter(Light, Notebook):
    name = "03_adapter_switch.ipynb"
