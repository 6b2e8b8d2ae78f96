"""What each rank runs for a claim on `disk_offload`: accelerate's function, on a model that ZeRO-3 has partitioned."""

import os
import tempfile

import torch
from accelerate import disk_offload
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from refkl_lib.models import load_model
from refkl_lib.ranks.config import job_config
from refkl_lib.ranks.events import tell
from refkl_lib.ranks.training import connect
from refkl_lib.ranks.worker import telling
from refkl_lib.tensors import storage_bytes
from refkl_lib.text import sample_batch


def main() -> None:
    """Offload a partitioned pocket model to a folder, try a pass, and tell what became of its shards."""
    with telling():
        connect()
        in_force = HfDeepSpeedConfig(job_config(learning_rate=1e-3))  # what is loaded while it lives is partitioned
        model = load_model("pocket")
        del in_force
        before = storage_bytes(model)
        with tempfile.TemporaryDirectory() as folder:
            disk_offload(model, folder)
            written = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".dat"))
            tell("done", before=before, after=storage_bytes(model), written=written, forward=_forward(model))
        torch.distributed.destroy_process_group()


@torch.no_grad()
def _forward(model: nn.Module) -> str:
    try:
        model(**sample_batch("pocket", 1, 16), use_cache=False)
    except Exception as error:  # whatever it is, it is what shall be shown
        return f"{type(error).__name__}: {error}"[:300]
    return "succeeds"


if __name__ == "__main__":
    main()
