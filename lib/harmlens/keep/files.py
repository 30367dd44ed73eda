"""Where things are, files that are written whole, lines that grow, and where a result comes from.

Introduced in notebook 00 ("A model organism of harm").
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import psutil
import yaml
from filelock import FileLock, Timeout

if TYPE_CHECKING:  # pages and tables are made without torch
    import torch

WORLD_SEED = 2604  # fixes the tables of the fictional world; training seeds never touch it
PACKAGES = (
    "torch", "transformers", "transformer-lens", "safetensors", "tokenizers", "numpy", "pandas", "scipy",
    "statsmodels", "scikit-learn", "peft",
)  # fmt: skip

_PACKAGE = Path(__file__).resolve().parents[1]
_MARKER = "claims.yaml"  # a folder is the data folder if and only if this file is in it


# --------------------------------------------------------------------------- where things are


def repo_root() -> Path | None:
    """The root of the clone that this package runs from, or None when it is installed elsewhere."""
    root = _PACKAGE.parent.parent
    return root if (root / "data" / _MARKER).is_file() else None


def folder_from(variable: str) -> Path | None:
    """The folder that a variable of the environment names; None if it is not set."""
    named = os.environ.get(variable, "").strip()
    return Path(named).expanduser().resolve() if named else None


def data_dir() -> Path:
    """The folder with checkpoints, claims and the results of default runs.

    HARMLENS_DATA if set, else ``data/`` of the clone, else the copy inside the installed package.

    Raises:
        FileNotFoundError: none of them holds the data; says what to do.
    """
    named, root = folder_from("HARMLENS_DATA"), repo_root()
    folder = named or (root or _PACKAGE) / "data"
    if not (folder / _MARKER).is_file():
        raise FileNotFoundError(
            f"HARMLENS_DATA is set to {str(named)!r}, but there is no {_MARKER} in that folder. Set it to "
            "the data folder of a clone, or unset it."
            if named
            else f"harmlens' data folder was not found (no {_MARKER} beside the package). Reinstall harmlens "
            "from the repository, or set HARMLENS_DATA to the data folder of a clone."
        )
    return folder


def build_dir() -> Path:
    """The folder for what is made here; it need not exist yet.

    HARMLENS_BUILD if set, else ``build/`` of the clone, else ``harmlens-build`` in the working directory.
    """
    root = repo_root()
    return folder_from("HARMLENS_BUILD") or (root / "build" if root else Path.cwd() / "harmlens-build")


def organism_homes() -> tuple[Path, Path]:
    """Where organisms are: those that ship with the package, and those that were trained here."""
    return data_dir() / "organisms", build_dir() / "organisms"


def cache_dir() -> Path:
    """The folder for public data sets and completions of real models: HARMLENS_CACHE, or below ``~/.cache``.

    Outside the repository, so that nothing in it is committed by accident. It need not exist yet.
    """
    return folder_from("HARMLENS_CACHE") or Path("~/.cache/harmlens").expanduser().resolve()


def outside_repository(file: Path) -> Path:
    """The file as a whole path, outside the repository or in its build folder; ValueError otherwise."""
    whole, root = file.expanduser().resolve(), repo_root()
    if root is not None and whole.is_relative_to(root) and not whole.is_relative_to(build_dir()):
        raise ValueError(
            f"file={file.name!r} lies inside the repository, where completions of models do not belong: they "
            "may be harmful, and would be published with it. Leave file= out, or give a path outside."
        )
    return whole


def free_memory(device: torch.device | str) -> int:
    """Bytes that can be had on a device now, what torch holds in reserve included."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return psutil.virtual_memory().available


def size_text(size: int) -> str:
    """A number of bytes for people: 3_250_000_000 is '3.2 GB'."""
    power = min((len(str(int(size))) - 1) // 3, 3)
    return f"{size / 1000**power:.1f} {('B', 'kB', 'MB', 'GB')[power]}" if power else f"{size:.0f} B"


# --------------------------------------------------------------------------- files written whole


def writable(folder: Path) -> Path:
    """The folder, made if need be; PermissionError, with the remedy, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no permission")
    except OSError as error:
        raise PermissionError(
            f"nothing can be written in {str(folder)!r} ({error.strerror or error}). Give another folder, or "
            "set HARMLENS_CACHE (answers and downloads), HARMLENS_BUILD (runs) or HARMLENS_RESULTS (result "
            "files) to one where you may write"
        ) from error
    return folder


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file that then takes the place of ``file``; an interruption leaves the old."""
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
    """Write JSON in one step; infinite and missing numbers are a ValueError."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, with what is known of them as JSON in one entry of the metadata."""
    from safetensors.torch import save_file

    # One entry: several would be written in an order that changes from run to run.
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(file, lambda part: save_file(kept, part, {"about": json.dumps(about)}))


def read_tensors(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What :func:`write_tensors` wrote; for another or a damaged file, whatever its parser raises."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        about = json.loads(stored.metadata()["about"])
        return about, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Within, no other process that asks for the same file goes on; this one may ask again for it.

    Raises:
        PermissionError: there is no such file, and none can be written; the message names the remedy.
    """
    try:
        lock = FileLock(writable(file.parent) / f".{file.name}.lock", is_singleton=True)
    except PermissionError:
        if not file.exists():
            raise
        yield  # nobody can change it here, and it may be all there
        return
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        warnings.warn(f"another process writes {file.name!r}; waiting until it has done so", stacklevel=3)
        held = lock.acquire()
    with held:
        yield


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.MarkedYAMLError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return node


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; a key that is given twice is a ``yaml.YAMLError`` too."""
    return yaml.load(path.read_text(encoding="utf-8"), _Loader)


# --------------------------------------------------------------------------- JSON lines


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; none if there is no file. Names a damaged line as ValueError."""
    out = []
    rows = file.read_bytes().split(b"\n") if file.is_file() else []
    for number, row in enumerate(rows[:-1], 1):  # what follows the last line break was not written to its end
        if row.strip():
            try:
                out.append(json.loads(row))
            except ValueError as error:
                raise ValueError(
                    f"line {number} of {file.name!r} is damaged ({error}). Remove that line; it is made anew"
                ) from error
    return out


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]], *, add: bool = False) -> None:
    """Put other lines in the place of all, in one step; or ``add`` some, and see them onto the disk.

    Where lines are added, a half-written last one makes way.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if not add:
        return write_whole(file, lambda part: part.write_bytes(lines))
    with locked(file), open(file, "a+b") as out:
        out.seek(0)
        out.truncate(out.read().rfind(b"\n") + 1)
        out.write(lines)
        out.flush()
        os.fsync(out.fileno())


def settle(file: Path, settings: Mapping[str, Any], begun: bool) -> None:
    """Write down beside a file, as ``<file>.meta.json``, what its lines are made with; refuse other settings.

    Raises:
        ValueError: the file has lines (``begun``) with other settings, or with none that can be read; the
            message names the difference and the remedy.
    """
    beside = file.with_name(file.name + ".meta.json")
    settings = json.loads(json.dumps(portable(settings)))
    if not begun:
        model, how = (
            str(settings.get("model") or settings.get("id") or ""),
            str(settings.get("dtype", "none")),
        )
        about = provenance(model, revision=settings.get("revision"), dtype=how, params=settings)
        return write_json(beside, {"settings": settings, "provenance": about})
    remedy = "Give another file, or remove it together with its .meta.json to begin anew."
    try:
        old = json.loads(beside.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file.name!r} has no readable {beside.name!r}, so its settings are unknown. {remedy}"
        ) from None
    if differ := [
        f"{key} was {old.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted({*old, *settings})
        if old.get(key) != settings.get(key)
    ]:
        raise ValueError(f"{file.name!r} was made with other settings: {'; '.join(differ)}. {remedy}")


# --------------------------------------------------------------------------- where a result comes from

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
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    return value.item() if hasattr(value, "item") and getattr(value, "size", None) == 1 else value


def _shortened(path: str) -> str:
    root, plain = repo_root(), Path(path.removeprefix("file://"))
    if root is not None and plain.is_relative_to(root) and plain != root:
        return plain.relative_to(root).as_posix()
    return PureWindowsPath(plain).name or "/"  # takes both kinds of slashes


def slug(model: str) -> str:
    """The model's name as one folder name: "organism/sft" -> "organism--sft"."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(portable(model)).strip("/. ").replace("/", "--"))
    if not name.strip(".-"):
        raise ValueError(f"model: {model!r} gives no usable folder name")
    return name


def sha256(*paths: str | Path) -> str:
    """Checksum of files in a row; read once per process as long as none changes."""
    return _checksum(tuple((str(p), os.stat(p).st_mtime_ns, os.stat(p).st_size) for p in paths))


@cache
def _checksum(files: tuple[tuple[str, int, int], ...]) -> str:
    out = hashlib.sha256()
    for path, *_ in files:
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                out.update(part)
    return out.hexdigest()


def weights_sha256(folder: Path) -> str:
    """sha256 over the safetensors files of a folder, in the order of their names."""
    return sha256(*sorted(folder.glob("*.safetensors")))


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


def numbered(folder: Path) -> bool:
    """Whether a folder that is not there stands for several training runs: folder-0, folder-1, ..."""
    return not folder.is_dir() and any(folder.parent.glob(f"{folder.name}-[0-9]*/"))


def model_name(model: str) -> str:
    """A model as results call it: folders of one name are told apart by their weights' sum.

    One that stands for several training runs (:func:`models.loading.in_runs`) is known by its own parent.
    """
    folder = Path(model).expanduser()
    if folder.is_absolute() and numbered(folder):
        return f"{folder.parent.name}/{folder.name}"
    weights = _weights(model) if model and folder.is_dir() else None
    return str(portable(model)) + ("" if weights is None else f"@{weights[:8]}")


def _git(*words: str) -> str | None:
    """What git says of the clone; None when the package is installed or git is missing."""
    root = repo_root()
    if root is None or not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Those of the packages that numbers depend on, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance(
    model: str,
    *,
    revision: str | None = None,
    seeds: Sequence[int] = (),
    params: Mapping[str, Any] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    wall_s: float | None = None,
) -> dict[str, Any]:
    """The provenance block of a result file."""
    kind, _, stage = model.partition("/")
    checkpoints: dict[str, str] = {}  # those of the organism behind "organism/<stage>", or behind all of it
    stored = organism_homes() if kind == "organism" else ()
    for path in sorted(path for home in stored for path in home.glob("*/*.safetensors")):
        of, _, seed = path.parent.name.rpartition("-")
        if path.parent.name == stage or (stage in ("", of) and seed in map(str, seeds)):
            checkpoints[f"{path.parent.name}/{path.name}"] = sha256(path)
    status = _git("status", "--porcelain", "--untracked-files=no")
    device, peak_gb, torch = str(device), {}, sys.modules.get("torch")
    with suppress(ImportError):  # Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        peak_gb["process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
    if torch is not None and device.startswith("cuda") and torch.cuda.is_available():
        peak_gb["gpu"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "created_utc": datetime.now(UTC).isoformat(timespec="microseconds"),
        "git_commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "lib_version": sys.modules["harmlens"].__version__,  # above every room
        "python": platform.python_version(),
        "packages": versions(),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "model": {
            "id": model_name(model), "revision": revision or _weights(model), "checkpoints": checkpoints,
        },
        "dataset": {"id": "world", "seed": WORLD_SEED} if kind == "organism" else None,
        "seeds": list(seeds),
        "params": portable(params or {}),
        "inputs": {},  # files that were read: none by the results of the book
        "wall_s": wall_s,
        "peak_gb": peak_gb,
    }  # fmt: skip
