"""Whole sessions on Colab: notebooks from the first cell to the last, with results on a mounted Drive."""

from __future__ import annotations

import json
import subprocess
import sys

import colab
import pytest

NAMES = ("00", "01", "02", "18")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_quick_mode(name, tmp_path):
    [path] = (path for path in colab.NOTEBOOKS if path.name.startswith(name))
    content, drive = tmp_path / "content", tmp_path / "content" / "drive" / "MyDrive" / "my results"
    drive.mkdir(parents=True)
    command = [sys.executable, "-m", "papermill", str(path), "out.ipynb", "--no-progress-bar"]
    command += ["-p", "quick", "True", "-p", "output", str(drive)]
    env = colab.environment(tmp_path)
    done = subprocess.run(command, cwd=content, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [c for c in json.loads((content / "out.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    assert list(drive.rglob("*.json")), "results lie on the Drive"
    others = {file.name for file in content.rglob("*") if file.is_file() and drive not in file.parents}
    assert others == {"out.ipynb", "held.txt"}, "and nowhere else"
