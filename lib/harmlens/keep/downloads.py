"""Files of public data sets: fetched once, at a fixed revision, and compared with their checksum before use.

A file whose checksum is not known in advance is trusted on first use: its sum goes into ``sources.lock.json``
of the cache, and another sum is refused from then on.
"""

from __future__ import annotations

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

import huggingface_hub
from huggingface_hub import errors as hub

from harmlens.keep import files
from harmlens.keep.files import cache_dir, write_json, write_whole

LOCK = "sources.lock.json"
_TIMEOUT = 60  # seconds without an answer
# A connection that breaks half-way is no OSError in the library that the hub uses.
_BROKEN = (
    OSError, http.client.HTTPException, hub.HfHubHTTPError, *(
        getattr(hub, name) for name in ("HTTPError", "XetDownloadError") if hasattr(hub, name)
    ),
)  # fmt: skip


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
        forms = {
            "folder": "{0.page}",
            "github": "https://raw.githubusercontent.com/{0.repository}/{0.revision}/{0.path}",
            "huggingface": "https://huggingface.co/datasets/{0.repository}/resolve/{0.revision}/{0.path}",
        }
        return forms[self.host].format(self)

    @property
    def key(self) -> str:
        """Its name in the list of known checksums."""
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
    """

    def fill(part: Path) -> None:
        fetch(remote, part)
        _compare(part, remote, sha256)  # before it takes its place

    file = remote.cached
    if folder is not None:
        name = Path(remote.path).name
        file = next((f for f in (folder / remote.path, folder / name) if f.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"folder={str(folder)!r} has no file {name}. Put it there, or leave it out"
            )
    elif not file.is_file():
        write_whole(file, fill)
    seen, lock = _compare(file, remote, sha256), _lock()
    if sha256 is None and remote.key not in lock:
        write_json(cache_dir() / LOCK, dict(sorted({**lock, remote.key: seen}.items())))
    return file


def _lock() -> dict[str, str]:
    file = cache_dir() / LOCK
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{file.parent}/{LOCK} is damaged ({error}). Restore it from a copy, or delete it to trust the "
            "files as they are"
        ) from None


def _compare(file: Path, remote: Remote, sha256: str | None) -> str:
    seen = files.sha256(file)
    wanted = sha256 or _lock().get(remote.key)
    if wanted in (None, seen):
        return seen
    accept = (
        "set its sha256 in data/sources.yaml to the new sum; or load the file as your own, by its path"
        if sha256
        else f"delete the entry {remote.key!r} from {cache_dir() / LOCK}"
    )
    again = f"Delete {file} to load it again." if file == remote.cached else f"It came from {remote.url}."
    raise ValueError(
        f"the checksum of {Path(remote.path).name} has changed: expected sha256 {wanted}, found {seen}. The "
        f"file is damaged, or its publisher changed it. {again} If the change is meant, {accept}."
    )


def fetch(remote: Remote, target: Path) -> None:
    """Write a remote file to ``target``. The only place of this module that uses the network.

    Raises:
        ConnectionError, PermissionError, FileNotFoundError: there is no network, the licence has to be
            accepted first, the host no longer has the file; says what to do.
    """
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on"):
            raise _told(remote, f"{name} is set")
    try:
        if remote.host == "huggingface":
            # Into a folder of its own, so that a gated set is kept in one place only: this cache.
            with tempfile.TemporaryDirectory(dir=target.parent) as passing:
                found = huggingface_hub.hf_hub_download(
                    remote.repository, remote.path, repo_type="dataset", revision=remote.revision,
                    local_dir=passing,
                )  # fmt: skip
                shutil.copyfile(found, target)
        else:
            with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as answer, target.open("wb") as out:
                shutil.copyfileobj(answer, out)
    except _BROKEN as error:
        raise _told(remote, error) from None


def _told(remote: Remote, why: object) -> Exception:
    """What kept a file from coming, with the remedy."""
    status = getattr(getattr(why, "response", None), "status_code", None)
    # Without a valid token the hub also answers "not found" for sets that it does not show.
    if isinstance(why, hub.GatedRepoError | hub.RepositoryNotFoundError) or status in (401, 403):
        return PermissionError(
            f"{remote.repository} is behind a licence. Read and accept it at {remote.page} (its authors may "
            "take days to answer), then log in with `hf auth login` or set HF_TOKEN, and run this again"
        )
    if isinstance(why, hub.RevisionNotFoundError | hub.RemoteEntryNotFoundError) or (
        isinstance(why, urllib.error.HTTPError) and why.code == 404
    ):
        return FileNotFoundError(
            f"{remote.url} is not there any more. Look at {remote.page}; if you have a copy of the file, "
            "give its folder as folder=..., or its path as data=..."
        )
    return ConnectionError(
        f"{Path(remote.path).name} of {remote.repository} is not in the cache and could not be downloaded "
        f"({why}). Check the network and that HF_HUB_OFFLINE is not set; or download {remote.url} elsewhere "
        f"and save it as {remote.cached}"
    )
