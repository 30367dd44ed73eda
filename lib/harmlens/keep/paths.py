"""Where the package's data, the build folder and the cache are, and files that are written whole.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
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


def writable(folder: Path) -> Path:
    """The folder, made if need be.

    Raises:
        PermissionError: nothing can be written there; names the variables that choose another place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "no permission"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    raise PermissionError(
        f"nothing can be written in {str(folder)!r} ({reason}). Give another folder, or set HARMLENS_CACHE "
        "(answers and downloads), HARMLENS_BUILD (runs) or HARMLENS_RESULTS (result files) to one where you "
        "may write"
    )


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file, then put it in the place of ``file``.

    An interruption leaves the old file as it was; of two processes that write, the last one's is there.

    Raises:
        PermissionError: nothing can be written there.
    """
    handle, name = tempfile.mkstemp(dir=writable(file.parent), prefix=f".{file.name}-", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)  # mkstemp makes it private; what is kept is meant to be shared
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step: a reader sees the old file or the whole new one. NaN is refused."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
