"""The wrong way to load a reference again: whole, on every rank.

A partitioned policy cannot be cloned. Loaded once more without ZeRO-3, the reference costs each rank N where a
partitioned one costs N/G: the more ranks there are, the worse it compares. It is here to be measured.
"""

from torch import nn

from refkl_lib.models import load_model
from refkl_lib.models.load import Source
from refkl_lib.reference.clone import CloneReference


class PlainReference(CloneReference):
    """A checkpoint loaded a second time, whole; raises what `load_model` does."""

    strategy = "plain"

    def __init__(self, source: Source) -> None:
        # Not by way of a clone, which would hold two whole models for a moment.
        self.policy = nn.Module()
        self.model = load_model(source).requires_grad_(False)
