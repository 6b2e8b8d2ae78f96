"""What a model is made of, without its weights: the configuration that gives its shapes."""

import json
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoConfig, PreTrainedConfig

from refkl_lib.models import ModelUnavailableError
from refkl_lib.models.load import model_folder

Model: TypeAlias = str | os.PathLike[str] | PreTrainedConfig


def known_models() -> dict[str, int]:
    """Return the models whose shapes come with this library, by hub id, and how many parameters each has.

    Each shape agrees with a transcription of the config.json at `published_at`, and half of them with a copy of it or
    with the authors' own training file as well: data/shapes.json names both for each (`compared_with`), and the fields
    that neither of them has (`not_compared`: mostly whether the embeddings are tied). A test builds each model and
    counts its parameters. The files themselves were not read; for a bill that matters, pass the configuration:
    `AutoConfig.from_pretrained(hub_id)`.
    """
    return {name: entry["parameters"] for name, entry in _shapes().items()}


def config_of(model: Model) -> PreTrainedConfig:
    """Return the configuration of a model: one given as it is, or that of a name; no weights are read.

    A name is a hub id of `known_models` (its last part will do: "Qwen2.5-7B"), "pocket", "smollm2", a folder with a
    config.json, or any other hub id, whose config.json is then downloaded unless it has been before.
    Raises TypeError if `model` is none of these, ValueError for a folder without a config.json that transformers can
    read, ModelUnavailableError if that of a hub id cannot be had.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"model is a {type(model).__name__}, but must be a name, a folder or a transformers configuration "
            "(of a model you have: model.config)"
        )
    name = os.fspath(model)
    if name == "pocket":
        return AutoConfig.from_pretrained(model_folder(name))
    if entry := _known(name):
        return AutoConfig.for_model(**entry["config"])
    return _read(name)


def _read(name: str) -> PreTrainedConfig:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _read_folder(folder)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(hub_id.split("/")[-1] for hub_id in _shapes()))
        raise ModelUnavailableError(
            f"{name!r} is not a model whose shapes are known here ({known}), nor a folder, and its config.json cannot "
            f"be had from the hub: {str(error).splitlines()[0]}"
        ) from error


def _read_folder(folder: Path) -> PreTrainedConfig:
    wanted = "give the folder that model.save_pretrained(folder) wrote"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: {wanted}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"transformers cannot read {folder / 'config.json'} ({said}): {wanted}") from error


def _known(name: str) -> dict[str, Any] | None:
    wanted = _ALIASES.get(name, name).lower()
    for known, entry in _shapes().items():
        if wanted in (known.lower(), known.lower().split("/")[-1]):
            return entry
    return None


_ALIASES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@cache
def _shapes() -> dict[str, Any]:
    return json.loads(files("refkl_lib").joinpath("data/shapes.json").read_text(encoding="utf-8"))
