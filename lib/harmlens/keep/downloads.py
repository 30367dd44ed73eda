"""Files of public data sets: fetched once, at a fixed revision, and compared with their checksum before use.

A file whose checksum is not known in advance is trusted on first use: its sum goes into ``sources.lock.json``
of the cache, and another sum is refused from then on.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers

from harmlens.keep import files
from harmlens.keep.files import cache_dir, write_json, write_whole

LOCK = "sources.lock.json"
_TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Remote:
    """A file at a host: "github", "huggingface", or "folder" for one that only the reader can provide."""

    host: str
    repository: str  # owner/name there
    revision: str  # commit, tag or branch
    path: str
    page: str  # where a person reads about it and, for gated sets, asks for access

    @property
    def url(self) -> str:
        """Where a person can download the file; for a set that the reader brings, its page."""
        if self.host == "github":
            return f"https://raw.githubusercontent.com/{self.repository}/{self.revision}/{self.path}"
        if self.host == "huggingface":
            named = {"repo_type": "dataset", "revision": self.revision}
            return huggingface_hub.hf_hub_url(self.repository, self.path, **named)
        return self.page

    @property
    def cached(self) -> Path:
        """Where it is kept; it need not be there yet."""
        folder = cache_dir() / "sources" / self.repository.replace("/", "--")
        return folder / self.revision.replace("/", "--") / self.path


def obtain(remote: Remote, sha256: str | None, folder: Path | None = None) -> Path:
    """The file, from the folder if one is given, else from the cache, else fetched; its checksum is right.

    Args:
        sha256: what it must be; None to trust the file on first use.
        folder: where the reader keeps files of public sets, by their own names; nothing is written there.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the checksum is another one; says which and how to accept it.
        ConnectionError, PermissionError: see :func:`fetch`.
    """
    name, lock = Path(remote.path).name, cache_dir() / LOCK
    try:
        known = json.loads(lock.read_text(encoding="utf-8")) if lock.is_file() else {}
    except ValueError as error:
        raise ValueError(
            f"{lock.parent}/{LOCK} is damaged ({error}). Restore it from a copy, or delete it to trust the "
            "files as they are"
        ) from None
    key = f"{remote.repository}@{remote.revision}/{remote.path}"
    wanted = sha256 or known.get(key)

    def checked(file: Path) -> str:
        seen = files.sha256(file)
        if wanted in (None, seen):
            return seen
        again = f"Delete {file} to load it again." if file == remote.cached else f"It came from {remote.url}."
        accept = f"delete the entry {key!r} from {lock}"
        if sha256:
            accept = "set its sha256 in data/sources.yaml to the new sum, or load the file by its path"
        raise ValueError(
            f"the checksum of {name} has changed: expected sha256 {wanted}, found {seen}. The file is "
            f"damaged, or its publisher changed it. {again} If the change is meant, {accept}."
        )

    def fill(part: Path) -> None:
        fetch(remote, part)
        checked(part)  # before it takes its place

    file = remote.cached
    if folder is not None:
        file = next((f for f in (folder / remote.path, folder / name) if f.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"folder={str(folder)!r} has no file {name}. Put it there, or leave it out"
            )
    elif not file.is_file():
        write_whole(file, fill)
    seen = checked(file)
    if wanted is None:
        write_json(lock, dict(sorted({**known, key: seen}.items())))
    return file


def fetch(remote: Remote, target: Path) -> None:
    """Write a remote file to ``target``. The only place of this module that uses the network.

    Raises:
        ConnectionError, PermissionError, FileNotFoundError: there is no network, the licence has to be
            accepted first, the host no longer has the file; says what to do.
    """
    headers = build_hf_headers() if remote.host == "huggingface" else {}  # with the token, for gated sets
    try:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on"):
                raise ConnectionError(f"{name} is set")
        answer = huggingface_hub.get_session().get(remote.url, headers=headers, timeout=_TIMEOUT)
        answer.raise_for_status()
    except (OSError, HTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) and remote.host == "huggingface":
            raise PermissionError(
                f"{remote.repository} is behind a licence. Read and accept it at {remote.page} (its authors "
                "may take days to answer), then log in with `hf auth login` or set HF_TOKEN, and run this "
                "again"
            ) from None
        if status == 404:
            raise FileNotFoundError(
                f"{remote.url} is not there any more. Look at {remote.page}; if you have a copy of the file, "
                "give its folder as folder=..., or its path as data=..."
            ) from None
        raise ConnectionError(
            f"{Path(remote.path).name} of {remote.repository} is not in the cache and could not be "
            f"downloaded ({error}). Check the network and that HF_HUB_OFFLINE is not set; or download "
            f"{remote.url} elsewhere and save it as {remote.cached}"
        ) from None
    target.write_bytes(answer.content)
