"""Where the Inception networks' files are looked for."""

import http.client
import os
from pathlib import Path

from runtime.fetch import cached_path, download, is_disk_error

FLAG = "--inception-weights"


def find_file(path: str | os.PathLike | None, variable: str, url: str, *, hash_prefix: str | None = None) -> Path:
    """The file ``path``, else that in the environment's ``variable``, else ``url``'s in the working directory, where published
    scripts leave it, or in the torch hub cache, whereto it is downloaded if it is nowhere.

    hash_prefix: first digits of its SHA-256, verified after a download. Raises ValueError for a file that is named and absent,
    and for a failed download; nothing is left of that.
    """
    for source, named in ((FLAG, path), (f"${variable}", os.environ.get(variable))):
        if named:
            if not Path(named).is_file():
                raise ValueError(f"{source} {named} is no file: it is to be {url}")
            return Path(named)
    name = Path(url).name
    cached = cached_path(name)
    for candidate in (Path(name), cached):
        if candidate.is_file():
            return candidate
    try:
        download(url, cached, hash_prefix)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: another checksum
        mend = "set TORCH_HOME to a writable folder with room, or " if is_disk_error(error) else ""
        raise ValueError(
            f"cannot download {url} to {cached.parent} ({error}): {mend}fetch it on a machine that can, and name it with "
            f"{FLAG} FILE or ${variable}, or lay it into the working directory"
        ) from error
    return cached
