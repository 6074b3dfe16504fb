# SPDX-License-Identifier: Apache-2.0
"""The folders that are kept beside the disk tier, which may be out of reach when a daemon starts, and the small files
in them, which are replaced whole.

A rename or a new folder is durable once the folder around it was synced, a file's content once the file was: `sync`
does both, so that after a crash of the machine a file holds what it held before or after, and after once that was
answered. Nothing follows a symbolic link. Threading: none here.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["make_folder", "make_folders", "sync_folder", "write_file"]


def make_folder(path: Path, *, sync: bool = False) -> str:
    """Make a folder unless it is there. Answers in words why that cannot be done now, "" where it is there; raises
    OSError for what no waiting makes a folder of ours.
    """
    try:
        make_folders(path, sync=sync)
    except (FileExistsError, NotADirectoryError, PermissionError):
        raise
    except OSError as error:
        return error.strerror or str(error)
    return ""


def make_folders(path: Path, *, sync: bool) -> None:
    """Make a folder (mode 0700) and those around it, unless they are there. Raises OSError."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
        if sync:
            sync_folder(each.parent)


def sync_folder(path: Path) -> None:
    """Make the names in it durable: what was made, renamed and removed there. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, *, sync: bool) -> None:
    """A new file (mode 0600), in the place of one that was never finished. Leaves none where it raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        if sync:
            os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)
