"""The wheel, installed alone into a folder: what it holds, and that it needs nothing of the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import copy_to

USE = """
import refkl_lib as rk
from refkl_lib import doctor
from refkl_lib.models import cache_folder

print(rk.__file__)
print(cache_folder())
model = rk.load_model("pocket")
reference = rk.create_reference(model, "clone")
batch = rk.sample_batch("pocket", batch=1, seq=16)
print(rk.compute_kl_divergence(model, reference, batch).item())
print(rk.price("Qwen/Qwen2.5-7B", "clone").reference_bytes)
print(doctor.packages().state)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_to(folder / "kit")
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*pip, "wheel", *options, folder / "kit"], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def test_it_holds_the_library_and_its_data_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"refkl_lib"}
    assert {"refkl_lib/py.typed", "refkl_lib/data/alice.txt", "refkl_lib/data/shapes.json"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


def test_it_works_far_from_the_checkout(wheel, tmp_path):
    target, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", "--target", target]
    subprocess.run([*pip, wheel], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REFKL", "XDG"))}
    environment = kept | {"PYTHONPATH": str(target), "HOME": str(home)}
    run = subprocess.run([sys.executable, "-c", USE], cwd=home, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    file, cache, kl, reference_bytes, packages = run.stdout.split()
    assert Path(file).is_relative_to(target)
    assert Path(cache).is_relative_to(home)
    assert float(kl) == 0
    assert int(reference_bytes) > 2**30
    assert packages == "ok"
