"""A notebook without controls: it runs, twice."""

from .notebook import Light, Notebook


class TestClone(Light, Notebook):
    name = "02_full_clone.ipynb"
