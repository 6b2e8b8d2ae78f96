"""Keep what was trained: a partitioned policy, gathered on rank 0 and written as a model that loads anywhere."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refkl_lib.models import load_tokenizer
from refkl_lib.models.cache import explained_disk_errors, write_whole
from refkl_lib.reference.zero3 import gathered_weights


def save_policy(policy: PreTrainedModel, source: str, folder: Path) -> None:
    """Write the policy and the tokenizer of `source` to `folder`; every rank calls this, and leaves it together.

    Rank 0 holds the whole model meanwhile. The folder appears when it is complete and on disk, never before.
    Raises ModelUnavailableError, on rank 0, if the disk is full or read-only.
    """
    weights = _gathered_on_rank_0(policy)
    if torch.distributed.get_rank() == 0:

        def write(partial: Path) -> None:
            policy.save_pretrained(partial, state_dict=weights)
            load_tokenizer(source).save_pretrained(partial)

        with explained_disk_errors(folder.parent, "save to another folder"):
            write_whole(folder, write)
    torch.distributed.barrier()


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that a model can be saved to; those above it are made.

    Raises ValueError if there is something in it already, or if it cannot be written.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"save_to is {path}, where something is already: give a folder that does not exist yet")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"save_to is {path}, but its parent folder cannot be made ({error.strerror})") from error
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"save_to is {path}, but you may not write to {path.parent}: give another folder")
    return path


def _gathered_on_rank_0(policy: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a checkpoint holds, whole and on the CPU; on the other ranks, nothing."""
    kept = policy.state_dict().keys()  # without the buffers that a model computes when it is made
    weights = {}
    for name, weight in gathered_weights(policy):
        if torch.distributed.get_rank() == 0 and name in kept:
            weights[name] = weight.detach().to("cpu", copy=True)
    return weights
