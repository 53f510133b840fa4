"""A verified download: the complete file under its final name, or nothing."""

import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

_CHUNK = 1 << 20


def download_file(url: str, target: Path, md5: str) -> None:
    """Download ``url`` to ``target``, with a progress bar on a terminal, and verify its checksum.

    The bytes go to a temporary file beside the target, which is renamed once the checksum matches. On any failure
    the temporary file is removed, and an existing file at ``target`` stays.

    Args:
        url: an http, https or file address.
        target: the file to write; its folder is created if missing.
        md5: the expected MD5 in hexadecimal.

    Raises:
        ValueError: the download fails or is cut short, the checksum differs, or the file cannot be written.
    """
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            found = _fetch(url, file, target.name)
        if found != md5:
            raise ValueError(f"{url} has MD5 {found}; expected {md5}")
        partial.chmod(0o644)
        partial.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{url} cannot be downloaded to {target}: {error}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _fetch(url: str, file: BinaryIO, label: str) -> str:
    """Stream a URL into a file; returns its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=60) as response:
        expected = int(response.headers.get("Content-Length") or 0)
        received = 0
        # disable=None: no bar if stderr is not a terminal.
        with tqdm(total=expected or None, unit="B", unit_scale=True, desc=label, disable=None) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if received < expected:
        raise ValueError(f"{url} was cut short: {received:,} of {expected:,} bytes arrived")
    return digest.hexdigest()
