"""A kernel like Colab's: ``google.colab`` is loaded, pip does nothing, and there is no clone.

Shared by ``test_colab.py`` and ``test_colab_session.py``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import layout

NOTEBOOKS = sorted((layout.ROOT / "book" / "colab" / "notebooks").glob("*.ipynb"))

# IPython runs this in a kernel before the first cell.
STARTUP = """
import google.colab
get_ipython().register_magic_function(lambda line: print("pip", line), magic_name="pip")
del google
"""


def environment(folder: Path) -> dict[str, str]:
    """Variables for a process whose kernels are like Colab's.

    ``folder`` gets the package and its data as an installed wheel has them.
    """
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text(STARTUP)
    (folder / "site" / "google" / "colab").mkdir(parents=True)
    (folder / "site" / "google" / "colab" / "__init__.py").touch()
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(layout.ROOT / "lib" / "harmlens", folder / "site" / "harmlens", ignore=ignore)
    (folder / "site" / "harmlens" / "data").symlink_to(layout.ROOT / "data")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HARMLENS_")}
    return kept | {
        "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(folder / "site"),
        "HARMLENS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "JUPYTER_PREFER_ENV_PATH": "1",
    }  # fmt: skip
