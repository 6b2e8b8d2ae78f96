"""Models of the Hugging Face hub: their weights, configuration and tokenizer, and nothing that is code."""

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from refkl_lib.models.cache import ModelUnavailableError, explained_disk_errors

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
UNWANTED = ["*/*", "consolidated*"]  # other formats, and second copies of the weights


def download_from_hub(model_id: str) -> Path:
    """Return the folder in the hub's own cache that holds a model; what is missing there is downloaded.

    A model that is there is not looked up again. Raises ValueError if the hub has no such model or keeps it
    from this user, ModelUnavailableError if the hub cannot be reached or the disk is full.
    """
    try:
        return _snapshot(model_id, local_files_only=True)
    except HFValidationError as error:
        raise ValueError(
            f'{model_id!r} is not "pocket", "smollm2", an existing folder or a hub id ("owner/name")'
        ) from error
    except LocalEntryNotFoundError:
        return _download(model_id)


def _download(model_id: str) -> Path:
    try:
        with explained_disk_errors(Path(constants.HF_HUB_CACHE), "set HF_HOME to another folder"):
            return _snapshot(model_id)
    except GatedRepoError as error:
        raise ValueError(
            f"the owners of {model_id!r} give it to users who accepted their terms: "
            "accept them on its page on the hub, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f'{model_id!r} is not "pocket", "smollm2" or an existing folder, and the hub has no such model '
            "(if it is a private one, run: hf auth login)"
        ) from error
    except (OSError, HTTPError) as error:
        raise ModelUnavailableError(
            f"{model_id!r} is not on this machine, and the hub cannot be reached to download it: "
            'check the spelling, the network and HF_HUB_OFFLINE, or use "pocket", "smollm2" or a folder'
        ) from error


def _snapshot(model_id: str, local_files_only: bool = False) -> Path:
    folder = snapshot_download(
        model_id, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=local_files_only
    )
    return Path(folder)
