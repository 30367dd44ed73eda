"""Set-up for all tests: one thread, no network, nothing written into the repository.

The package is not imported here: the type checks of jaxtyping are hooked in before the first import only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Two threads per process make tiny models many times slower as soon as two processes run.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"


@pytest.fixture(autouse=True)
def one_thread():
    """Also where torch was imported before the variable was set; torch itself is imported by who needs it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # As a plugin: the hooks of a conftest.py reach its own folder only, and the notebooks lie elsewhere.
    config.pluginmanager.register(NotebookRules(), "notebook-rules")
    compare_up_to_rounding()


def compare_up_to_rounding() -> None:
    """Let nbval compare printed decimals up to their last place; see :mod:`rounding`."""
    from nbval.plugin import IPyNbCell
    from rounding import settle

    strict = IPyNbCell.compare_outputs
    if getattr(strict, "up_to_rounding", False):
        return

    def compare_outputs(self, test, ref, skip_compare=None):
        return strict(self, settle(test, ref), ref, skip_compare)

    compare_outputs.up_to_rounding = True
    IPyNbCell.compare_outputs = compare_outputs


class NotebookRules:
    """How nbval runs and compares the notebooks."""

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        """What is never compared: chatter, and renderings of what is compared as text."""
        if hasattr(collector, "skip_compare"):
            collector.skip_compare += ("stderr", "text/html", "image/png", "image/svg+xml")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Give each notebook an empty folder for its results, before its kernel starts.

        So nothing lands in build/, and a notebook that reads results sees the stored ones of data/results.
        """
        os.environ.pop("HARMLENS_BUILD", None)
        os.environ.pop("HARMLENS_RESULTS", None)
        if item.path.suffix == ".ipynb":
            base = item.config._tmp_path_factory.getbasetemp() / "notebooks" / item.path.stem
            os.environ["HARMLENS_BUILD"] = str(base)
            os.environ["HARMLENS_RESULTS"] = str(base / "results")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT
