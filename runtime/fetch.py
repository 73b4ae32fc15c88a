"""Files that are named by an URL or a hub id: downloaded once, kept in the cache, checked.

name                                        what it is
an existing file or folder                  itself
https://HOST/DiT.pt#sha256=HEX              a file, also http; the checksum can be left out
file:///FOLDER/DiT.pt#sha256=HEX            a local file, used where it lies
OWNER/NAME, OWNER/NAME@REVISION             a diffusers pipeline on the Hugging Face hub
OWNER/NAME@REVISION/FILE#sha256=HEX         a file on the hub; revision and checksum can be left out

A revision is a branch, a tag, a commit or refs/pr/NUMBER.
"""

import contextlib
import errno
import functools
import hashlib
import http.client
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.hub
from filelock import FileLock

from runtime.cli import first_line
from runtime.distributed import is_first_process, note
from runtime.files import file_sha256
from runtime.redact import redact

SCHEMES = ("https", "http", "file")
PARTS = ("transformer", "vae")  # of a pipeline: all that sampling needs
WEIGHTS = "diffusion_pytorch_model"
PART_FILES = ("config.json", f"{WEIGHTS}.safetensors")
PIPELINE_FILES = ["model_index.json", *(f"{part}/{file}" for part in PARTS for file in PART_FILES)]
FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
HUB_PART = r"[A-Za-z0-9][\w.-]*"
STALL_SECONDS = 60
# What is wrong with the cache's disk, not with the network: no right to write, no room, no folder.
DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}
HUB_ID = re.compile(rf"(?P<repo>{HUB_PART}/{HUB_PART})(?:@(?P<revision>refs/pr/\d+|[\w.-]+))?(?:/(?P<file>[\w./ -]+))?")


@dataclass(frozen=True)
class Source:
    """A name taken apart. sha256: None where it states none."""

    address: str
    sha256: str | None


def fetch(name: str | os.PathLike) -> Path:
    """The local file or folder of that name, downloaded if need be (see the module); any other name as a path, whose absence
    is for its reader to tell.

    Raises ValueError with the mend for a failed download and for a file with another checksum, cached or new.
    """
    scheme = urllib.parse.urlsplit(str(name)).scheme
    if scheme in SCHEMES:
        return _local_file(_split(str(name))) if scheme == "file" else _fetch_url(_split(str(name)))
    if Path(name).exists():
        return Path(name)
    source = _split(str(name))
    match = HUB_ID.fullmatch(source.address)
    if match and not _is_local(match):
        return _fetch_hub(source, **match.groupdict())
    return Path(name)


def cached_path(name: str) -> Path:
    """Where a downloaded file of that name is kept."""
    return Path(torch.hub.get_dir(), "checkpoints", name)


def download(url: str, target: Path, sha256: str | None = None) -> None:
    """With a progress bar, to a temporary name that is moved when all is well; the processes of a machine do it once.

    sha256: the digest or its first digits. Raises OSError (also for a file cut short, and for a server that falls silent),
    RuntimeError (another digest) or HTTPException, and leaves nothing.
    """
    locks = Path(torch.hub.get_dir(), "locks")
    for folder in (locks, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{target.name}.lock"):
        if target.is_file():
            return  # another process has just fetched it
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with _no_stalling():
                torch.hub.download_url_to_file(url, str(part), hash_prefix=sha256)
            # torch hub takes a broken connection for the file's end, which only a checksum would show.
            size, announced = part.stat().st_size, None if sha256 else _announced_size(url)
            if announced and size < announced:
                raise OSError(f"it ended after {size} of {announced} bytes")
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def is_disk_error(error: Exception) -> bool:
    """Whether a download failed for want of a place to put it."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


@contextlib.contextmanager
def _no_stalling() -> Iterator[None]:
    """torch hub sets no timeout: a server that stops sending would be waited for without end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    except OSError as error:
        if isinstance(getattr(error, "reason", error), TimeoutError):
            raise OSError(f"the server sent nothing for {STALL_SECONDS} seconds") from error
        raise
    finally:
        socket.setdefaulttimeout(before)


def _announced_size(url: str) -> int | None:
    """None where the server does not say; some say 0."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "torch.hub"})
    try:
        with urllib.request.urlopen(request, timeout=STALL_SECONDS) as answer:
            length = answer.headers.get("Content-Length", "")
    except (OSError, http.client.HTTPException):
        return None
    return int(length) if length.isdecimal() else None


def _split(name: str) -> Source:
    """Raises ValueError for a fragment that is no checksum."""
    address, sharp, fragment = name.partition("#")
    if not sharp:
        return Source(name, None)
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if not match:
        raise ValueError(f"{redact(address)}: write the checksum as #sha256= and its 64 hexadecimal digits")
    return Source(address, match[1].lower())


def _local_file(source: Source) -> Path:
    """Raises ValueError for a URL of another machine's file, and for a checksum of no file."""
    parts = urllib.parse.urlsplit(source.address)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"{redact(source.address)} names the host {parts.hostname}: a local file is file:///FOLDER/FILE, three slashes"
        )
    path = Path(urllib.request.url2pathname(parts.path))
    if source.sha256 and not path.is_file():
        raise ValueError(f"{redact(source.address)}: {path} is no file, which alone has a checksum: correct the URL")
    if source.sha256 and digest(path) != source.sha256:
        raise ValueError(f"{path} has the sha256 {digest(path)}, not {source.sha256}: correct the checksum or the URL")
    return path


def _fetch_url(source: Source) -> Path:
    url = source.address
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise ValueError(
            f"{redact(url)} with a user or a password before its host is not fetched: they would stay in the shell's history; "
            "fetch it with another program and name the file"
        )
    file_name = re.sub(r"[^\w.-]", "_", Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name)
    # The URL's own digest first: files of one name from two places are two files.
    path = cached_path(f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{file_name[-100:]}")
    if not path.is_file():
        try:
            download(url, path, source.sha256)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            mend = "correct the digits after #sha256=" if "invalid hash" in str(error) else "correct the URL"
            if is_disk_error(error):
                mend = "set TORCH_HOME to a writable folder with room"
            raise ValueError(
                f"cannot download {redact(url)} ({first_line(error)}): {mend}, or fetch it on a machine that can and "
                "name the file"
            ) from error
    _check(path, source)
    if source.sha256 is None and is_first_process():
        _advise(url, path)
    return path


def _is_local(match: re.Match) -> bool:
    """A mistyped path is nothing to ask the hub for: one in a folder that exists, or of a file like owner/name."""
    owner, _, name = match["repo"].partition("/")
    return Path(owner).is_dir() or (match["file"] is None and name.endswith(FILE_SUFFIXES))


def _fetch_hub(source: Source, repo: str, revision: str | None, file: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    if file is None and source.sha256:
        raise ValueError(f"{source.address}#sha256=...: a repository has no checksum; pin it as {repo}@REVISION")
    if {".", ".."} & {revision, *(file or "").split("/")}:
        raise ValueError(f"{source.address}: a path on the hub has no . and .. in it; name the file itself")
    try:
        if file is None:
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=PIPELINE_FILES))
            older = [f"{part}/{WEIGHTS}.bin" for part in PARTS if not (path / part / f"{WEIGHTS}.safetensors").is_file()]
            if older:
                path = Path(snapshot_download(repo, revision=revision, allow_patterns=older))
        else:
            path = Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # the hub's errors have no common class; offline it may raise anything
        mend = "set HF_HOME to a writable folder with room" if is_disk_error(error) else "correct the name"
        raise ValueError(
            f"{source.address} is no file or folder here, and could not be fetched from the Hugging Face hub "
            f"({first_line(error)}): {mend}, or download it on a machine with network and name the file or folder"
        ) from error
    if file is None and not (path / "transformer").is_dir():
        raise ValueError(
            f"{source.address} on the hub is no diffusers pipeline with a transformer: name a file in it, as {repo}/FILE.pt"
        )
    _check(path, source)
    return path


def _check(path: Path, source: Source) -> None:
    if source.sha256 and digest(path) != source.sha256:
        raise ValueError(
            f"{path}, the copy of {redact(source.address)}, has the sha256 {digest(path)}, not {source.sha256}: "
            "remove that file and run again, or correct the checksum"
        )


@functools.cache
def _advise(url: str, path: Path) -> None:
    rest = " (and its query before the #)" if urllib.parse.urlsplit(url).query else ""
    note(f"{redact(url)} is not checked; pin it as {redact(url)}#sha256={digest(path)}{rest}")


def digest(path: Path) -> str:
    """A file's SHA-256, computed once per process: a checkpoint's gigabytes take seconds."""
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns)


@functools.cache
def _digest(path: Path, *_: int) -> str:
    return file_sha256(path)
