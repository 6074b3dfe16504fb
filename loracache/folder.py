# SPDX-License-Identifier: Apache-2.0
"""The folders that are kept beside the disk tier, which may be out of reach when a daemon starts, and the small files
in them, which are replaced whole.

What lies there is trusted, so that nobody else may put it there: folders belong to this process's user alone, and no
symbolic link, nor another name of a file elsewhere, is followed into writing.

A rename or a new folder is durable once the folder around it was synced, a file's content once the file was: `sync`
does both, so that after a crash of the machine a file holds what it held before or after, and after once that was
answered. Threading: none here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
from pathlib import Path

__all__ = [
    "make_folder", "make_folders", "open_file", "own_folder", "owner_fault", "replace_file", "sync_folder",
    "write_file",
]  # fmt: skip


def make_folder(path: Path, *, sync: bool = False) -> str:
    """Make a folder unless it is there. Answers in words why that cannot be done now, "" where it is there; raises
    OSError for what no waiting makes a folder of ours.
    """
    try:
        make_folders(path.parent, sync=sync)
        if own_folder(path) and sync:
            sync_folder(path.parent)
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


def own_folder(path: Path) -> bool:
    """Make a folder (mode 0700) in one that is there; whether it was not there. Raises OSError, also where it is no
    folder but a link to one, or another user's."""
    try:
        os.mkdir(path, 0o700)
        return True
    except FileExistsError:
        found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"it belongs to {_user(found.st_uid)}", str(path))
    return False


def owner_fault(path: Path) -> str:
    """In words why others could put files into a folder, and what to do; "" where they cannot. Raises OSError."""
    found, user = os.stat(path), os.geteuid()
    if found.st_uid != user:
        return (
            f"it belongs to {_user(found.st_uid)}, and this process is {_user(user)}'s: chown -R {user} {path} if all "
            "in it may be trusted, or give a folder below it, which is made"
        )
    if found.st_mode & 0o022:
        return (
            f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o}): chmod go-w {path} if all in it may be "
            "trusted, or give a folder below it, which is made"
        )
    return ""


def open_file(path: Path, flags: int) -> int:
    """The descriptor of a file (made with mode 0600). Raises OSError, also where it is a link, no file, or has another
    name elsewhere."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise PermissionError(errno.EPERM, "it is no file, or one that has another name elsewhere", str(path))


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


def replace_file(path: Path, data: bytes, *, sync: bool) -> None:
    """A file's new content, whole or not at all. Its name is durable once the folder was synced. Raises OSError."""
    fresh = path.with_suffix(".tmp")
    write_file(fresh, data, sync=sync)
    os.replace(fresh, path)


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
