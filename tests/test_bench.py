"""How benchmarks' results are kept."""

import subprocess

import pytest

from tools.bench import main


@pytest.fixture
def script(tmp_path):
    def written(name, source):
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return written


def test_each_benchmark_is_shown_and_kept_with_its_command(script, tmp_path, capfd):
    fast = script("fast.py", "import sys; print('ratio', sys.argv[1:])")
    file = tmp_path / "RESULTS.md"
    main([str(file), fast, f"{fast} --large"])
    text = file.read_text()
    assert f"## `python {fast}`\n\n```\nratio []\n```" in text
    assert f"## `python {fast} --large`\n\n```\nratio ['--large']\n```" in text
    assert "processor cores" in text
    assert "ratio ['--large']" in capfd.readouterr().out


def test_a_benchmark_that_fails_leaves_the_file_as_it_was(script, tmp_path):
    file = tmp_path / "RESULTS.md"
    file.write_text("the last good ones")
    with pytest.raises(subprocess.CalledProcessError, match=r"bad\.py"):
        main([str(file), script("good.py", "print(1)"), script("bad.py", "raise SystemExit(3)")])
    assert file.read_text() == "the last good ones"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "bad.py", "good.py"]
