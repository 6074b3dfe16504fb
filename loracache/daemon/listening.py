# SPDX-License-Identifier: Apache-2.0
"""The daemon's socket: one daemon a path, told from a stale file by a lock beside it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import socket
import stat
import time
from pathlib import Path

from loracache.errors import ConfigError
from loracache.wire import protocol

__all__ = ["PATIENCE_S", "listen", "most_clients", "unlink", "unlink_unless_locked"]

_log = logging.getLogger(__name__)

PATIENCE_S = 20.0  # longer than a daemon drains
_PAUSE_S = 0.05
_MOST_CLIENTS = 100_000
_OTHER_DESCRIPTORS = 96  # of tiers, adapters, the REST process and the event loop


def listen(path: Path, stack: contextlib.ExitStack, *, private: bool) -> socket.socket:
    """The listening socket; `stack` gives it back, of a private daemon with its lock file. A private daemon waits for
    the one before it, which may be writing what it holds. Raises ConfigError.
    """
    if len(os.fsencode(path)) > protocol.SOCKET_PATH_BYTES:
        raise ConfigError(
            f"socket={str(path)!r} is longer than the {protocol.SOCKET_PATH_BYTES} bytes a unix socket's path may have"
        )
    try:
        _look_at_folder(path.parent)
        stack.callback(os.close, _lock(path, time.monotonic() + (PATIENCE_S if private else 0.0)))
        if private:
            stack.callback(unlink, Path(f"{path}.lock"))  # while it is held: later it may be another daemon's
        if path.exists() and not path.is_socket():
            raise ConfigError(f"socket={str(path)!r} is not a socket and stays as it is; give --socket another path")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.callback(listener.close)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        old = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
    except OSError as error:
        raise ConfigError(
            f"socket={str(path)!r} cannot be made: {error.strerror}; give --socket a writable path"
        ) from None
    stack.callback(unlink, path)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _look_at_folder(folder: Path) -> None:
    """Who owns the socket's folder could put another in its place: clients believe whom they find there."""
    found = os.stat(folder)
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"socket: its folder {folder} belongs to another user (uid {found.st_uid}); give --socket a path in a "
            "folder of this user or of root"
        )
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        _log.warning("others may write to %s, and put another socket in the place of this one: chmod go-w it", folder)


def most_clients() -> int:
    """How many connections this process has descriptors for, two each (the socket, and one that watches its process).
    Raises the soft limit to the hard one first.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return _MOST_CLIENTS
    return max(1, min(_MOST_CLIENTS, (soft - _OTHER_DESCRIPTORS) // 2))


def unlink(path: Path) -> None:
    """Remove a file where that can be done."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def unlink_unless_locked(lock: Path, others: list[Path]) -> None:
    """Remove `others` and their lock file, unless somebody holds it: then they are in use again."""
    with contextlib.suppress(OSError):
        held = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in (*others, lock):
                unlink(path)
        finally:
            os.close(held)


def _lock(path: Path, deadline: float) -> int:
    """The descriptor of the locked file beside the socket. Its last holder may have removed the file: a lock on what
    has no name any more keeps nobody out.
    """
    name = f"{path}.lock"
    while True:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(name) and os.path.samestat(os.fstat(lock), os.stat(name)):
                return lock
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(lock)
                raise ConfigError(
                    f"socket={str(path)!r}: another daemon serves it; stop that one or give --socket another path"
                ) from None
            time.sleep(_PAUSE_S)
        except OSError:
            os.close(lock)
            raise
        os.close(lock)
