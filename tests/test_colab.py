"""The first cells of every notebook in a kernel like Colab's, and how errors look there."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass, field

import colab
import pytest
from jupyter_client.manager import start_new_kernel
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook


@dataclass
class Cell:
    """What a cell gave: the text that it printed, and its error if it ended in one."""

    printed: str = ""
    ename: str = ""
    evalue: str = ""
    trace: list[str] = field(default_factory=list)
    status: str = ""


@dataclass
class Kernel:
    client: object
    folder: object

    def run(self, source: str) -> Cell:
        done = Cell()

        def hook(message: dict) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                done.printed += content["text"]
            elif message["msg_type"] == "error":
                done.ename, done.evalue = content["ename"], content["evalue"]
                done.trace = content["traceback"]

        done.status = self.client.execute_interactive(source, output_hook=hook, timeout=120)["content"][
            "status"
        ]
        return done

    def start(self, path, **injected: object) -> Cell:
        """Run a notebook's first cells in an empty namespace; the outcome of the last, or of one that fails.

        Args:
            injected: what papermill is given.
        """
        notebook = load_notebook_node(str(path))
        if injected:
            notebook = parameterize_notebook(notebook, injected)
        done = Cell()
        for cell in (c for c in notebook.cells if c.cell_type == "code"):
            source = cell.source
            last = "hl.start(" in source
            if last:  # up to the call; what follows loads models
                ends = [n.end_lineno for n in ast.parse(source).body if "hl.start(" in ast.unparse(n)]
                source = "\n".join(source.splitlines()[: ends[0]])
            now = self.run(source)
            now.printed = done.printed + now.printed
            done = now
            if last or done.ename:
                return done
        raise AssertionError("no cell calls hl.start")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colab")
    env = colab.environment(folder)
    (folder / "content").mkdir()
    manager, client = start_new_kernel(kernel_name="python3", env=env, cwd=str(folder / "content"))
    client.execute(  # so resets are quick
        "from harmlens.weights import frontier\nfrom harmlens.flow import patching\n"
        "from harmlens.evidence import results\nimport gc\ngc.freeze()"
    )
    yield Kernel(client, folder / "content")
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(running):
    running.run("%reset -f")
    return running


@pytest.mark.parametrize("path", colab.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_starts_on_colab(kernel, path):
    done = kernel.start(path)
    assert not done.ename, done.evalue
    assert "minute" in done.printed and "harmless" in done.printed
    assert "pip install -q -c held.txt" in done.printed
    assert "\nharmlens " in done.printed and "ignored" not in done.printed
    again = kernel.start(path)  # all cells once more
    assert not again.ename, again.evalue


@pytest.mark.parametrize("path", colab.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_misspelt_parameter_stops_a_notebook(kernel, path):
    """And a variable of the reader's own does not, nor does a parameter that the notebook has."""
    kernel.run("drive_folder = '/content/drive/MyDrive'")
    done = kernel.start(path, seedz=1)
    assert done.status == "error" and done.ename == "ValueError"
    assert done.evalue.startswith("unknown parameter seedz. This notebook takes: ")
    assert "drive_folder" not in done.evalue
    assert done.trace == [f"ValueError: {done.evalue}", "(%tb in a new cell shows where.)"]
    done = kernel.start(path, output="elsewhere")
    assert not done.ename, done.evalue
    assert done.printed.count("ignored: drive_folder") == 1


def test_the_package_lies_where_a_wheel_puts_it(kernel):
    """So these tests see what a session sees that has no clone."""
    kernel.start(colab.NOTEBOOKS[0])
    done = kernel.run("from harmlens.keep import files\nprint(files.repo_root(), files.build_dir())")
    assert done.printed.split() == ["None", str(kernel.folder / "harmlens-build")]


@pytest.fixture
def started(kernel):
    assert not kernel.start(colab.NOTEBOOKS[0]).ename
    return kernel


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        (
            "from harmlens.models import loading\nloading.load('organism/rlhf')",
            "ValueError",
            "there is no organism",
        ),
        (
            "from harmlens.models import loading\nloading.load('nowhere/at/all')",
            "ValueError",
            "no Hugging Face id",
        ),
        ("hl.start(quick=1)", "ValueError", "must be True or False"),
        ("hl.start(colour='red')", "TypeError", "no rule for a parameter"),
        (
            "import os\nos.environ['HARMLENS_DATA'] = 'nowhere'\nfrom harmlens.keep import files\n"
            "try:\n    int('x')\nexcept ValueError:\n    files.data_dir()\n"
            "finally:\n    del os.environ['HARMLENS_DATA']",
            "FileNotFoundError",
            "HARMLENS_DATA is set",
        ),
    ],
)
def test_an_error_of_the_package_is_its_message(started, source, kind, said):
    done = started.run(source)
    assert done.status == "error" and done.ename == kind and said in done.evalue
    assert done.trace == [f"{kind}: {done.evalue}", "(%tb in a new cell shows where.)"]
    assert "harmlens/" in "\n".join(started.run("%tb").trace)


@pytest.mark.parametrize(
    "source",
    [
        "int('x')",
        "raise ValueError('from a cell')",
        "import json\njson.loads('x')",
        "from harmlens.evidence import stats\nstats.bootstrap_of_nothing",
        "from harmlens.keep import files\nfiles.writable(3)",  # fails inside the package, but not on purpose
    ],
)
def test_other_errors_keep_their_trace(started, source):
    done = started.run(source)
    assert done.ename and "Traceback (most recent call last)" in "\n".join(done.trace)


def test_papermill_stops_at_a_misspelt_parameter(tmp_path):
    path = colab.NOTEBOOKS[-1]
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(path),
        "out.ipynb",
        "--no-progress-bar",
        "-p",
        "seedz",
        "1",
    ]
    env = colab.environment(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ValueError: unknown parameter seedz. This notebook takes: " in done.stderr
    assert "notebook.py" not in done.stderr.split("PapermillExecutionError")[-1]
