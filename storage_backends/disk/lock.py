# SPDX-License-Identifier: Apache-2.0
"""The lock of a disk tier's folder: one backend or check at a time, and who it is. Threading: none here."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from loracache.errors import ConfigError
from loracache.folder import open_file
from loracache.storage_backends.disk.object_files import UNWRITABLE

__all__ = ["DiskInUse", "lock_folder"]


class DiskInUse(ConfigError):
    """Another backend uses the folder now. owner: who that says it is, in words, or ""."""

    def __init__(self, path: Path, owner: str) -> None:
        self.owner = owner
        _, _, server = owner.partition(" at ")
        use = f"give server={server!r} to use that one, or stop it" if server else "stop that one"
        super().__init__(
            f"disk_path {str(path)!r} is in use by {'the' if owner else 'another'} LoRACache {owner or 'daemon'}; "
            f"{use}, or choose another disk_path"
        )


def lock_folder(path: Path, owner: str) -> int:
    """A descriptor that holds the folder for `owner`, in words, until it is closed; -1 where nobody has ever written
    there and nobody can. Raises DiskInUse, and OSError for what the device does."""
    lock = path / "lock"
    try:
        fd = open_file(lock, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        try:
            fd = open_file(lock, os.O_RDONLY)
        except FileNotFoundError:
            return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = os.pread(fd, 1000, 0).decode(errors="replace").strip()
        os.close(fd)
        raise DiskInUse(path, other) from None
    except OSError:
        os.close(fd)
        raise
    with contextlib.suppress(OSError):  # on a full disk nobody is told
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{owner}\n".encode(), 0)
    return fd
