"""Who holds what: how ZeRO-3 cuts every parameter into one shard for each rank.

    for shard in shards(load_model("pocket"), ranks=2):
        print(shard.name, shard.numel, shard.per_rank, shard.padding)

A parameter is taken as one row of numel elements and cut into `ranks` equal pieces of ⌈numel / ranks⌉: the first
to rank 0, the next to rank 1, and so on. What the last pieces lack is padding. It is never read, but it is held.
Buffers are not cut: every rank has them whole. (The rule is that of DeepSpeed 0.19, `_partition_param`.)
"""

from dataclasses import dataclass

import torch
from torch import nn

from refkl_lib.counts import check_counts


@dataclass(frozen=True)
class Shard:
    """How one parameter is cut: each of `ranks` ranks holds `per_rank` elements, `padding` of all held is filling."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ranks: int

    @property
    def numel(self) -> int:
        """Return the number of elements of the whole parameter."""
        return torch.Size(self.shape).numel()

    @property
    def per_rank(self) -> int:
        """Return the number of elements that each rank holds, with padding: ⌈numel / ranks⌉."""
        return -(-self.numel // self.ranks)

    @property
    def padding(self) -> int:
        """Return the number of elements that all ranks hold together beyond the parameter's own."""
        return self.per_rank * self.ranks - self.numel

    @property
    def bytes_per_rank(self) -> int:
        """Return the bytes of one rank's piece, the same on every rank."""
        return self.per_rank * self.dtype.itemsize

    def elements(self, rank: int) -> range:
        """Return which elements of the flattened parameter a rank holds; none if its piece is padding alone.

        Raises ValueError for a rank that there is not.
        """
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank is {rank}, but the {self.ranks} ranks are 0 to {self.ranks - 1}")
        first = rank * self.per_rank
        return range(min(first, self.numel), min(first + self.per_rank, self.numel))

    def owner(self, element: int) -> int:
        """Return the rank that holds an element of the flattened parameter.

        Raises ValueError for an element that there is not.
        """
        if not 0 <= element < self.numel:
            raise ValueError(f"element is {element}, but {self.name!r} has the elements 0 to {self.numel - 1}")
        return element // self.per_rank


def shards(model: nn.Module, ranks: int) -> tuple[Shard, ...]:
    """Return how ZeRO-3 cuts each parameter of `model` over `ranks` ranks, in the model's order.

    The model may be on the meta device, where it takes no memory, or be partitioned already. Tied weights are
    one parameter. Raises ValueError for fewer ranks than one.
    """
    check_counts(ranks=ranks)
    # Of a parameter that is partitioned already, the shape is (0,); DeepSpeed keeps the one of the whole.
    return tuple(
        Shard(name, tuple(getattr(parameter, "ds_shape", parameter.shape)), parameter.dtype, ranks)
        for name, parameter in model.named_parameters()
    )
