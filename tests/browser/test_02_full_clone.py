"""A notebook without controls: it runs."""

from .notebook import Notebook


class TestClone(Notebook):
    name = "02_full_clone.ipynb"
