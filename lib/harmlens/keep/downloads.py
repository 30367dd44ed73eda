"""Files of public data sets: fetched once, at a fixed revision, and compared with their checksum before use.

A file whose checksum is not known in advance is trusted on first use: its sum goes into ``sources.lock.json``
of the cache, and another sum is refused from then on.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harmlens.keep.files import cache_dir, write_whole

_TIMEOUT = 60  # seconds without an answer
LOCK = "sources.lock.json"


@dataclass(frozen=True)
class Remote:
    """A file at a host.

    Attributes:
        host: "github", "huggingface", or "folder" for one that only the reader can provide.
        repository: owner/name there.
        revision: commit, tag or branch.
        path: of the file in the repository.
        page: where a person reads about it and, for gated sets, asks for access.
    """

    host: str
    repository: str
    revision: str
    path: str
    page: str

    @property
    def url(self) -> str:
        """Where a person can download the file; for a set that the reader brings, its page."""
        if self.host == "folder":
            return self.page
        if self.host == "github":
            return f"https://raw.githubusercontent.com/{self.repository}/{self.revision}/{self.path}"
        return f"https://huggingface.co/datasets/{self.repository}/resolve/{self.revision}/{self.path}"

    @property
    def key(self) -> str:
        """Its name in the lock file."""
        return f"{self.repository}@{self.revision}/{self.path}"

    @property
    def cached(self) -> Path:
        """Where it is kept; it need not be there yet."""
        folder = cache_dir() / "sources" / self.repository.replace("/", "--")
        return folder / self.revision.replace("/", "--") / self.path


def obtain(
    remote: Remote, sha256: str | None, fetch: Callable[[Remote, Path], None], folder: Path | None = None
) -> Path:
    """The file, from the folder if one is given, else from the cache, else fetched; its checksum is right.

    Args:
        sha256: what it must be; None to trust the file on first use.
        fetch: writes the file to a path.
        folder: where the reader keeps files of public sets, by their own names; nothing is written there.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the checksum is another one; says which and how to accept it.
        ConnectionError, PermissionError: what ``fetch`` raises.
    """
    if folder is not None:
        choices = [folder / remote.path, folder / Path(remote.path).name]
        file = next((choice for choice in choices if choice.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"folder={str(folder)!r} has no file {choices[1].name}. Put it there, or leave it out"
            )
    else:
        file = remote.cached
        if not file.is_file():

            def fill(part: Path) -> None:
                try:
                    fetch(remote, part)
                    _compare(part, remote, sha256)  # before it takes its place
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise

            write_whole(file, fill)
    seen = _compare(file, remote, sha256)
    if sha256 is None and remote.key not in _lock():
        lock = _lock() | {remote.key: seen}
        text = json.dumps(dict(sorted(lock.items())), indent=2) + "\n"
        write_whole(_lock_file(), lambda part: part.write_text(text, encoding="utf-8"))
    return file


def _lock_file() -> Path:
    return cache_dir() / LOCK


def _lock() -> dict[str, str]:
    if not _lock_file().is_file():
        return {}
    try:
        return dict(json.loads(_lock_file().read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{_lock_file()} is damaged ({error}). Restore it from a copy, or delete it to trust the files "
            "as they are"
        ) from None


def _compare(file: Path, remote: Remote, sha256: str | None) -> str:
    with file.open("rb") as stream:
        seen = hashlib.file_digest(stream, "sha256").hexdigest()
    wanted = sha256 or _lock().get(remote.key)
    if wanted is None or seen == wanted:
        return seen
    if sha256:
        accept = (
            "If the change is meant, set its sha256 in data/sources.yaml to the new sum; or load the file "
            "as your "
            "own, by its path."
        )
    else:
        accept = f"If the change is meant, delete the entry {remote.key!r} from {_lock_file()}."
    again = f"Delete {file} to load it again." if file == remote.cached else f"It came from {remote.url}."
    raise ValueError(
        f"the checksum of {Path(remote.path).name} has changed: expected sha256 {wanted}, found {seen}. The "
        f"file is damaged, or its publisher changed it. {again} {accept}"
    )


def fetch(remote: Remote, target: Path) -> None:
    """Write a remote file to ``target``. The only place of this module that uses the network.

    Raises:
        ConnectionError: no network, an offline mode, or the host did not answer; says how to bring the file.
        PermissionError: the licence has to be accepted first; says where.
        FileNotFoundError: the host no longer has the file.
        ImportError: huggingface_hub is missing.
    """
    offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if _on(os.environ.get(name, ""))]
    if offline:
        raise ConnectionError(_unreachable(remote, f"{offline[0]} is set"))
    if remote.host == "huggingface":
        _from_huggingface(remote, target)
    else:
        _from_github(remote, target)


def _on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _unreachable(remote: Remote, why: object) -> str:
    return (
        f"{Path(remote.path).name} of {remote.repository} is not in the cache and could not be downloaded "
        f"({why}). Check the network and that HF_HUB_OFFLINE is not set; or download {remote.url} elsewhere "
        f"and save it as {remote.cached}"
    )


def _gone(remote: Remote) -> str:
    return (
        f"{remote.url} is not there any more. Look at {remote.page}; if you have a copy of the file, give "
        "its folder as folder=..., or its path as data=..."
    )


def _from_github(remote: Remote, target: Path) -> None:
    try:
        with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as answer, target.open("wb") as out:
            shutil.copyfileobj(answer, out)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise FileNotFoundError(_gone(remote)) from None
        raise ConnectionError(_unreachable(remote, error)) from None
    except (OSError, http.client.HTTPException) as error:  # URLError, time-out, a connection that breaks
        raise ConnectionError(_unreachable(remote, error)) from None


def _from_huggingface(remote: Remote, target: Path) -> None:
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"{remote.repository} needs huggingface_hub: pip install huggingface_hub"
        ) from error
    # A connection that breaks half-way is no OSError in the library that the hub uses.
    broken = (OSError, getattr(hub, "HTTPError", OSError), getattr(hub, "XetDownloadError", OSError))
    # Into a folder of its own, so that a gated set is kept in one place only: this cache.
    with tempfile.TemporaryDirectory(dir=target.parent) as passing:
        try:
            found = hf_hub_download(
                remote.repository,
                remote.path,
                repo_type="dataset",
                revision=remote.revision,
                local_dir=passing,
            )
        except (hub.GatedRepoError, hub.RepositoryNotFoundError) as error:
            # Without a valid token the hub also answers "not found" for sets that it does not show.
            raise PermissionError(_gated(remote)) from error
        except (hub.RevisionNotFoundError, hub.RemoteEntryNotFoundError):
            raise FileNotFoundError(_gone(remote)) from None
        except hub.HfHubHTTPError as error:
            if getattr(error.response, "status_code", None) in (401, 403):
                raise PermissionError(_gated(remote)) from error
            raise ConnectionError(_unreachable(remote, error)) from None
        except broken as error:  # offline, no such host, time-out
            raise ConnectionError(_unreachable(remote, error)) from None
        shutil.copyfile(found, target)


def _gated(remote: Remote) -> str:
    return (
        f"{remote.repository} is behind a licence. Read and accept it at {remote.page} (its authors may take "
        "days to answer), then log in with `hf auth login` or set HF_TOKEN, and run this again"
    )
