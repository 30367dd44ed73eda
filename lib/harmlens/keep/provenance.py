"""Where a result comes from: versions, parameters, checksums, time. No machine paths, no names of people.

Introduced in notebook 01 ("What there is to explain").
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

from harmlens import __version__
from harmlens.keep import WORLD_SEED
from harmlens.keep.paths import data_dir, repo_root

PACKAGES = (
    "torch", "transformers", "transformer-lens", "safetensors", "tokenizers", "numpy", "pandas", "scipy",
    "statsmodels", "scikit-learn", "peft",
)  # fmt: skip

# /a/b, ~/a, C:\a, file:///a; an identifier such as organism/sft or Qwen/Qwen2.5-0.5B is left alone
_MACHINE_PATH = re.compile(r"""(?<![\w.~:/\\-])(?:file://)?(?:~?/|[A-Za-z]:[\\/])[^\s'",;:()\[\]{}]+""")


def portable(value: Any) -> Any:
    """``value`` with every machine path in its strings cut down, recursively.

    A path inside the clone is written from its root, any other one as its last part.
    """
    if isinstance(value, Path):
        return _shortened(str(value)) if value.is_absolute() else value.as_posix()
    if isinstance(value, str):
        return _MACHINE_PATH.sub(lambda match: _shortened(match.group()), value)
    if isinstance(value, Mapping):
        return {str(portable(key)): portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [portable(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "item") and getattr(value, "size", None) == 1:  # a numpy scalar
        return value.item()
    return value


def _shortened(path: str) -> str:
    root = repo_root()
    plain = Path(path.removeprefix("file://"))
    if root is not None and plain.is_relative_to(root) and plain != root:
        return plain.relative_to(root).as_posix()
    return PureWindowsPath(plain).name or "/"  # takes both kinds of slashes


def slug(model: str) -> str:
    """The model's name as one folder name: "organism/sft" -> "organism--sft"."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(portable(model)).strip("/. ").replace("/", "--"))
    if not name.strip(".-"):
        raise ValueError(f"model: {model!r} gives no usable folder name")
    return name


@cache
def _checksum(path: str, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: str | Path) -> str:
    """Checksum of a file; read once per process as long as the file doesn't change."""
    stat = Path(path).stat()
    return _checksum(str(path), stat.st_mtime_ns, stat.st_size)


def weights_sha256(folder: Path) -> str:
    """sha256 over the safetensors files of a folder, in the order of their names.

    They are read once per process as long as none of them changes.
    """
    files = sorted(folder.glob("*.safetensors"))
    return _joint_checksum(tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@cache
def _joint_checksum(files: tuple[tuple[str, int, int], ...]) -> str:
    out = hashlib.sha256()
    for path, *_ in files:
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                out.update(part)
    return out.hexdigest()


def _weights(model: str) -> str | None:
    """The weights' sum of a model in a folder, the commit of one from the Hub that was loaded; else None."""
    if model.partition("/")[0] == "organism":
        return None
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return weights_sha256(folder) if any(folder.glob("*.safetensors")) else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        return None
    from huggingface_hub import try_to_load_from_cache

    source, _, revision = model.partition("@")
    found = try_to_load_from_cache(source, "config.json", revision=revision or None)
    return Path(found).parent.name if isinstance(found, str) else None


def named(model: str) -> str:
    """A model as results call it: folders have the beginning of their weights' sum behind their name.

    So two folders of one name, or a folder whose weights were changed, are two models.
    """
    weights = _weights(model) if model and Path(model).expanduser().is_dir() else None
    return str(portable(model)) + ("" if weights is None else f"@{weights[:8]}")


def _git() -> dict[str, Any]:
    """Commit and state of the clone; nothing when the package is installed or git is missing."""
    root = repo_root()
    if root is None or not (root / ".git").exists():
        return {"git_commit": None, "dirty": None}
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(root), *command],
                capture_output=True, text=True, timeout=20, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return {"git_commit": None, "dirty": None}
        answers.append(done.stdout.strip() if done.returncode == 0 else None)
    commit, status = answers
    return {"git_commit": commit, "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _checkpoints(model: str, seeds: Sequence[int]) -> dict[str, str]:
    """Checksums of the organism's checkpoints behind "organism/<stage>" (or all of "organism") and seeds."""
    kind, _, stage = model.partition("/")
    if kind != "organism":
        return {}
    found = {}
    for path in sorted((data_dir() / "organisms").glob("*/*.safetensors")):
        of, _, seed = path.parent.name.rpartition("-")
        if path.parent.name == stage or (stage in ("", of) and seed in {str(number) for number in seeds}):
            found[f"{path.parent.name}/{path.name}"] = sha256(path)
    return found


def _device(device: str) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and str(device).startswith("cuda") and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _peak_gb(device: str) -> dict[str, float]:
    """Largest memory of this process so far, and of the GPU if it was used."""
    peaks = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        peaks["process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
    torch = sys.modules.get("torch")
    if torch is not None and str(device).startswith("cuda") and torch.cuda.is_available():
        peaks["gpu"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return peaks


def collect(
    model: str,
    *,
    revision: str | None = None,
    seeds: Sequence[int] = (),
    params: Mapping[str, Any] | None = None,
    inputs: Iterable[str | Path] = (),
    device: str = "cpu",
    dtype: str = "float32",
    wall_s: float | None = None,
) -> dict[str, Any]:
    """The provenance block of a result file.

    Raises:
        FileNotFoundError: an input file does not exist.
    """
    files = [Path(item) for item in inputs]
    if missing := [str(item) for item in files if not item.is_file()]:
        raise FileNotFoundError(f"inputs: no such file: {', '.join(missing)}")
    return {
        "created_utc": datetime.now(UTC).isoformat(timespec="microseconds"),
        **_git(),
        "lib_version": __version__,
        "python": platform.python_version(),
        "packages": versions(),
        "device": _device(device),
        "dtype": str(dtype).removeprefix("torch."),
        "model": {
            "id": named(model), "revision": revision or _weights(model),
            "checkpoints": _checkpoints(model, seeds),
        },
        "dataset": {"id": "world", "seed": WORLD_SEED} if model.partition("/")[0] == "organism" else None,
        "seeds": list(seeds),
        "params": portable(params or {}),
        "inputs": {str(portable(item.resolve())): sha256(item) for item in files},
        "wall_s": wall_s,
        "peak_gb": _peak_gb(device),
    }  # fmt: skip
