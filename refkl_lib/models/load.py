"""Load a model or a tokenizer by where it comes from."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from refkl_lib.models.cache import ORIGIN, ModelUnavailableError, build_once, cache_folder
from refkl_lib.models.hub import download_from_hub
from refkl_lib.models.pocket import FOLDER as POCKET
from refkl_lib.models.pocket import write_pocket
from refkl_lib.tensors import is_partitioned

Source = str | os.PathLike[str]
# While transformers builds a model, it changes torch's default dtype and a method of all models, for every thread, and
# puts back what it found. Of two threads that do so at once, one could leave them changed for good.
ONE_AT_A_TIME = threading.RLock()


def load_model(
    source: Source = "smollm2",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Return the causal language model that `source` names, in evaluation mode like from `from_pretrained`.

    `source` is "pocket", "smollm2", a folder, or a hub id. Without a `device`, the model goes to the GPU if
    CUDA has one and stays on the CPU if not. While an `HfDeepSpeedConfig` for ZeRO-3 is alive, the model
    comes partitioned and DeepSpeed decides where its shards lie. Only safetensors are read, and no code that
    comes with a model is run. Raises as `model_folder` does, and TypeError for a dtype weights cannot have.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}, but weights need one like torch.float32 or torch.bfloat16")
    folder = model_folder(source)
    with ONE_AT_A_TIME, without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    if is_partitioned(model):
        return model
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_tokenizer(source: Source = "smollm2") -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to `source`; if it came without a pad token, that is its end token.

    Raises as `model_folder` does, and ValueError if the folder holds no tokenizer.
    """
    folder = model_folder(source)
    if not any(Path(folder).glob("tokenizer*")):
        raise ValueError(f"{folder} holds a model but no tokenizer; add it with tokenizer.save_pretrained(folder)")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_folder(source: Source = "smollm2") -> str:
    """Return the folder from which `from_pretrained` loads the model and the tokenizer that `source` names.

    "pocket" is built when first asked for, and a hub id is downloaded, with a progress bar; "smollm2" is
    fetched by a command of its own. Raises ModelUnavailableError (a RuntimeError) if smollm2 has not been
    fetched, the hub cannot be reached or the disk is full, and ValueError if there is no such model or it has
    no safetensors.
    """
    name = os.fspath(source)
    if name == "pocket":
        return str(build_once(POCKET, write_pocket))
    if name == "smollm2":
        return str(_smollm2_folder())
    folder = Path(name).expanduser()
    return str(_checked(folder if folder.is_dir() else download_from_hub(name)))


def model_origin(source: Source = "smollm2") -> str:
    """Return one sentence on what the weights of `source` are. Raises as `model_folder` does."""
    note = Path(model_folder(source)) / ORIGIN
    if not note.is_file():
        return f"The weights are those of {os.fspath(source)}, as they are."
    return f"The weights are {json.loads(note.read_text(encoding='utf-8'))['weights']}."


def _smollm2_folder() -> Path:
    folder = cache_folder() / "smollm2"
    if not folder.is_dir():
        raise ModelUnavailableError(
            f"smollm2 is not in {folder.parent}; fetch it once (93 MB) with: python -m refkl_lib.models fetch smollm2"
        )
    return folder


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no model to load: it needs config.json and *.safetensors, "
            "as model.save_pretrained(folder) writes them"
        )
    return folder


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars in a block."""
    previous = logging.set_tqdm_hook(lambda _, args, options: logging.EmptyTqdm(*args, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)
