"""A rank of test_shards.py: it lets DeepSpeed cut a model whose elements are numbered, and tells what it got."""

import os

import torch
from torch import nn

from refkl_lib.ranks.events import tell
from refkl_lib.ranks.shards import shards

SHAPES = {"scalar": (1,), "row": (5,), "even": (4, 3), "odd": (3, 5), "long": (101,)}


def numbered() -> nn.ParameterDict:
    """A model whose parameters hold 0, 1, 2, …: each element says where it belongs."""
    sizes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    return nn.ParameterDict({name: torch.arange(float(size.numel())).view(size) for name, size in sizes.items()})


def main() -> None:
    # The test itself, which only wants the model, has no use for these.
    import deepspeed

    from refkl_lib.ranks.training import connect

    tell("started", pid=os.getpid())
    connect()
    model = numbered()
    ranks = int(os.environ["WORLD_SIZE"])
    whole = shards(model, ranks)
    deepspeed.zero.Init(module=model, config_dict_or_path={"train_micro_batch_size_per_gpu": 1})
    held = {name: parameter.ds_tensor.tolist() for name, parameter in model.named_parameters()}
    tell("cut", held=held, same_when_partitioned=shards(model, ranks) == whole)
    tell("done")


if __name__ == "__main__":
    main()
