import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from refkl_lib import models
from refkl_lib.models import ModelUnavailableError, cache, hub, load_model, load_tokenizer, model_folder
from refkl_lib.models.cache import build_once, cache_folder
from refkl_lib.models.pocket import pocket_model, write_pocket

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFKL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pocket_tokens():
    return load_tokenizer("pocket")


def equal_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# The pocket model


def test_pocket_is_a_small_llama_with_tied_embeddings():
    model = load_model("pocket")
    assert 1e6 < model.num_parameters() < 3e6
    assert model.config.num_hidden_layers >= 4
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert not model.training


def test_pocket_is_always_the_same_and_leaves_the_callers_state_alone():
    expected, state = pocket_model(), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = pocket_model()
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal_weights(again, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_pocket_from_the_cache_is_the_model_as_it_is_built_today():
    """It fails if the model was changed and its folder's number was not."""
    assert equal_weights(load_model("pocket"), pocket_model())


def test_pocket_loads_as_from_pretrained_loads_it():
    plain = AutoModelForCausalLM.from_pretrained(model_folder("pocket"))
    loaded = load_model("pocket")
    tokens = torch.arange(10)[None]
    assert equal_weights(loaded, plain)
    assert torch.equal(loaded(tokens).logits, plain(tokens).logits)


def test_pocket_is_not_a_uniform_guess():
    log_probs = load_model("pocket")(torch.arange(50)[None]).logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    assert entropy < torch.tensor(259.0).log() - 0.3


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8")))
def test_pocket_has_one_token_for_each_byte_of_any_text(pocket_tokens, text):
    ids = pocket_tokens(text).input_ids
    assert len(ids) == len(text.encode())
    assert pocket_tokens.decode(ids) == text


def test_pocket_and_smollm2_format_a_chat_alike(pocket_tokens):
    form = {"tokenize": False, "add_generation_prompt": True}
    expected = load_tokenizer("smollm2").apply_chat_template(CHAT, **form)
    assert pocket_tokens.apply_chat_template(CHAT, **form) == expected


# Loading


def test_dtype_and_device_are_those_asked_for():
    model = load_model("pocket", dtype=torch.bfloat16, device="meta")
    assert model.dtype == torch.bfloat16
    assert model.device.type == "meta"


@pytest.mark.parametrize("dtype", ["fp32", torch.int8, None])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype):
    with pytest.raises(TypeError, match=r"torch\.float32"):
        load_model("pocket", dtype=dtype)


def test_loading_prints_nothing_and_leaves_progress_bars_as_they_were(capfd):
    seen = []
    logging.set_tqdm_hook(lambda factory, args, options: seen.append(1) or factory(*args, **options))
    try:
        load_model("pocket")
        load_tokenizer("pocket")
        assert capfd.readouterr() == ("", "")
        assert not seen
        logging.tqdm([])
        assert seen == [1]
    finally:
        logging.set_tqdm_hook(None)


def test_several_threads_may_load_at_once():
    with ThreadPoolExecutor(8) as threads:
        loaded = list(threads.map(load_model, ["pocket"] * 32))
    loaded.append(load_model("pocket"))
    assert all(model.lm_head.weight is model.get_input_embeddings().weight for model in loaded)
    assert not any(weight.is_meta for model in loaded for weight in model.parameters())


def test_a_folder_is_loaded_and_its_tokenizer_gets_a_pad_token(tmp_path):
    write_pocket(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    told = json.loads(settings_file.read_text())
    del told["pad_token"]
    settings_file.write_text(json.dumps(told))
    assert equal_weights(load_model(tmp_path), load_model("pocket"))
    assert load_tokenizer(str(tmp_path)).pad_token == "<|im_end|>"


def test_a_folder_without_safetensors_is_refused_even_if_it_holds_a_pickle(tmp_path):
    write_pocket(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"config\.json and \*\.safetensors"):
        load_model(tmp_path)


def test_a_folder_without_tokenizer_says_how_to_add_one(tmp_path):
    write_pocket(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.save_pretrained"):
        load_tokenizer(tmp_path)


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    write_pocket(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_smollm2_that_was_not_fetched_names_the_command(empty_cache):
    with pytest.raises(ModelUnavailableError, match=r"python -m refkl_lib\.models fetch smollm2"):
        load_model()


def test_model_origin_says_what_the_weights_are(tmp_path):
    write_pocket(tmp_path)
    assert models.model_origin("pocket") == "The weights are random, and always the same."
    (tmp_path / "origin.json").unlink()
    assert models.model_origin(tmp_path) == f"The weights are those of {tmp_path}, as they are."


ZERO3 = """
import deepspeed, torch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # plain gloo, nothing to compile
deepspeed.init_distributed("gloo")
from safetensors.torch import load_file
from transformers.integrations import HfDeepSpeedConfig
from refkl_lib.models import load_model, model_folder

alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
model = load_model("pocket")
assert all(parameter.shape == (0,) for parameter in model.parameters()), "not partitioned"
saved = load_file(model_folder("pocket") + "/model.safetensors")
with deepspeed.zero.GatheredParameters(list(model.parameters())):
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters()), "other weights"
print("as it should be")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed runs on Linux")
def test_under_zero3_the_model_comes_partitioned(empty_cache, free_port):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | alone | {"MASTER_PORT": str(free_port), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", ZERO3], env=environment, capture_output=True, text=True)
    assert "as it should be" in done.stdout, done.stderr
    # The files were written while the configuration was alive, by this very call: they hold whole weights.
    assert equal_weights(load_model("pocket"), pocket_model())


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# The hub


@pytest.fixture
def hub_says(monkeypatch):
    """Let the hub answer a download with an error, or with a folder."""

    def answer(outcome):
        def snapshot_download(model_id, local_files_only, **options):
            if local_files_only:
                raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
            if isinstance(outcome, Exception):
                raise outcome
            return str(outcome)

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)

    return answer


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (huggingface_hub.errors.RepositoryNotFoundError, ValueError, "the hub has no such model"),
        (huggingface_hub.errors.GatedRepoError, ValueError, "accepted their terms"),
        (huggingface_hub.errors.HfHubHTTPError, ModelUnavailableError, "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub_says, kind, error, words):
    hub_says(kind("no", response=mock.Mock(headers={})))
    with pytest.raises(error, match=words):
        load_model("someone/something")


def test_an_id_from_the_hub_is_loaded(hub_says, tmp_path):
    write_pocket(tmp_path)
    hub_says(tmp_path)
    assert equal_weights(load_model("someone/something"), load_model("pocket"))


def test_a_full_disk_during_a_download_is_not_called_a_network_error(hub_says):
    hub_says(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ModelUnavailableError, match=r"full.*HF_HOME"):
        load_model("someone/something")


def test_with_the_hub_switched_off_an_unknown_id_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelUnavailableError, match="check the spelling, the network and HF_HUB_OFFLINE"):
        load_model("someone/something")


@pytest.mark.parametrize("source", ["./no-such-folder", "/no/such/folder", "two words"])
def test_a_source_that_cannot_be_an_id_is_refused(source):
    with pytest.raises(ValueError, match="is not"):
        load_model(source)


# The cache


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "CHECKOUT", tmp_path)
    monkeypatch.delenv("REFKL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / "refkl"
    (tmp_path / "pyproject.toml").touch()
    assert cache_folder() == tmp_path / ".cache"
    monkeypatch.setenv("REFKL_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"


def test_a_builder_that_fails_leaves_nothing(empty_cache):
    def build(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once("model", build)
    assert [path.name for path in empty_cache.iterdir()] == [".model.lock"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full"),
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), "is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "may not write"),
    ],
)
def test_disk_trouble_is_explained(empty_cache, error, words):
    def build(folder):
        raise error

    with pytest.raises(ModelUnavailableError, match=f"{words}.*REFKL_CACHE"):
        build_once("model", build)


def test_a_builder_that_is_killed_is_followed_by_one_that_succeeds(empty_cache):
    script = """
        import time
        from refkl_lib.models.cache import build_once
        def build(folder):
            (folder / "half").touch()
            print("building", flush=True)
            time.sleep(60)
        build_once("model", build)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "building\n"
        process.send_signal(signal.SIGKILL)
    assert (empty_cache / ".model.partial" / "half").exists()
    folder = build_once("model", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not (empty_cache / ".model.partial").exists()


def test_of_several_processes_one_builds(empty_cache):
    empty_cache.mkdir()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.map(_build_and_log, [empty_cache / "log"] * 4)
    assert set(folders) == {empty_cache / "model"}
    assert (empty_cache / "log").read_text() == "built\n"


def _build_and_log(log):
    def build(folder):
        with log.open("a") as file:
            file.write("built\n")

    return build_once("model", build)
