"""Where the package's data, the build folder and the cache are, in a clone and when installed.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_MARKER = "claims.yaml"  # a folder is the data folder if and only if this file is in it


def repo_root() -> Path | None:
    """The root of the clone that this package runs from, or None when it is installed elsewhere."""
    root = _PACKAGE.parent.parent
    return root if (root / "data" / _MARKER).is_file() else None


def data_dir() -> Path:
    """The folder with checkpoints, claims and the results of default runs.

    Looked for in this order: the environment variable HARMLENS_DATA, ``data/`` of the clone, the
    copy inside the installed package.

    Raises:
        FileNotFoundError: if none of them holds the data; says what to do.
    """
    from_env = os.environ.get("HARMLENS_DATA", "").strip()
    if from_env:
        folder = Path(from_env).expanduser().resolve()
        if not (folder / _MARKER).is_file():
            raise FileNotFoundError(
                f"HARMLENS_DATA is set to {from_env!r}, but there is no {_MARKER} in that folder. Set "
                "HARMLENS_DATA to the data folder of a clone, or unset it."
            )
        return folder
    root = repo_root()
    if root is not None:
        return root / "data"
    if (_PACKAGE / "data" / _MARKER).is_file():
        return _PACKAGE / "data"
    raise FileNotFoundError(
        f"harmlens' data folder was not found (no {_MARKER} beside the package). Reinstall harmlens "
        "from the repository, or set HARMLENS_DATA to the data folder of a clone."
    )


def build_dir() -> Path:
    """The folder for everything that is made, not kept; it need not exist yet.

    HARMLENS_BUILD if set, else ``build/`` of the clone, else ``harmlens-build`` in the working
    directory.
    """
    from_env = os.environ.get("HARMLENS_BUILD", "").strip()
    if from_env:
        return Path(from_env).expanduser().resolve()
    root = repo_root()
    return root / "build" if root is not None else Path.cwd() / "harmlens-build"


def cache_dir() -> Path:
    """The folder for public data sets and for completions of real models; it need not exist yet.

    HARMLENS_CACHE if set, else ``~/.cache/harmlens``: outside the repository, so that nothing in it is
    committed by accident.
    """
    from_env = os.environ.get("HARMLENS_CACHE", "").strip()
    return Path(from_env or "~/.cache/harmlens").expanduser().resolve()
