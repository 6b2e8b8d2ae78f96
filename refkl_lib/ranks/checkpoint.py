"""All ranks have to read the same checkpoint.

On several machines, each rank reads the folder that it finds there. When transformers (5.24) loads partitioned,
the weights' values are rank 0's, while names, shapes and configuration are each rank's own. So a folder that differs
goes unnoticed, or lets a rank compute another KL, or kills it in the first message of a wrong size.
"""

from pathlib import Path

from torch import distributed

from refkl_lib.models import model_folder
from refkl_lib.models.cache import sha256_of
from refkl_lib.models.load import Source

READ = (".json", ".safetensors")  # the files that a model and its tokenizer are made from


def check_same_checkpoint(source: Source) -> None:
    """Compare the files of `source` with those that rank 0 finds, by SHA-256; every rank has to call this.

    Raises ValueError on a rank whose files are others, and as `load_model` does on one that finds none.
    """
    folder = Path(model_folder(source))
    found: list[dict[str, str]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(found, _checksums(folder))
    here, first = found[distributed.get_rank()], found[0]
    others = sorted(name for name in here | first if here.get(name) != first.get(name))
    if others:
        raise ValueError(
            f"{folder} is not the same model here as for rank 0: {', '.join(others)} differ. "
            "Copy rank 0's folder to this machine, or use one that all machines see"
        )


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.suffix in READ}
