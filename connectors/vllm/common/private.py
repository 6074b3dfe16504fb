# SPDX-License-Identifier: Apache-2.0
"""The private daemon of an engine whose configuration names no server.

The first process that needs it starts it, under a lock, in a session of its own; it flushes and ends when its last
connection closes, so it outlives an engine that is killed just long enough to save what it holds. One that is started
meanwhile waits for that. A folder has one daemon a machine: engines that name the same one share it.

What the daemon is (socket, memory, disk) the connector's configuration says. Every other setting may stand in the
engine's environment: how the daemon is watched, and secrets, which a configuration that vLLM logs has no place for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import select
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from loracache.client.requests import SOCKET_PATH_BYTES
from loracache.config import ENVIRONMENT, Config, parse_size
from loracache.connectors.vllm.common.cores import on_all_cores
from loracache.connectors.vllm.common.options import Options
from loracache.errors import ConfigError, Unavailable

__all__ = ["ensure_private_daemon", "private_server"]

_log = logging.getLogger(__name__)
_START_TIMEOUT_S = 40.0  # more than it waits for the one before it to write what it holds and leave the folder
_RANK = re.compile(r"(_dp\d+)+$")  # what vLLM adds to the engine's id in each data parallel rank
_READY = b"ready"  # what a private daemon writes to its standard output
# A CPU worker's OpenMP settings would pin the daemon, too, to the core of a thread that never sleeps.
_NOT_FOR_THE_DAEMON = (ENVIRONMENT, "GOMP_", "KMP_", "OMP_", "LD_PRELOAD")
_OF_THE_CONFIGURATION = ("socket", "private", "memory", "disk_path", "disk")  # whatever the environment says of them
_REDIS = f"{ENVIRONMENT}REDIS"
# vLLM kills every descendant of an engine that ends slowly, whatever its session. So the daemon is nobody's descendant.
_DETACH = "import os, sys; os.fork() and os._exit(0); os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"


def private_server(engine_id: str, disk_path: str = "") -> str:
    """The address of an engine's private daemon, the same in all its processes. With a disk_path it is the folder's:
    all engines of one user that name the folder share one daemon. Without, all data parallel ranks of one engine do.
    """
    name = _folder_name(disk_path) if disk_path else re.sub(r"[^A-Za-z0-9_-]", "_", _RANK.sub("", engine_id))[-60:]
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        if base:
            path = Path(base) / f"loracache-{os.getuid()}" / f"{name}.sock"
            if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
                return f"unix://{path}"
    raise ConfigError(
        f"TMPDIR={base!r} is too long a path for a unix socket in it; set XDG_RUNTIME_DIR to a shorter one"
    )


def _folder_name(disk_path: str) -> str:
    """A name for a folder, whatever path leads to it. It is made, for what is not there has no identity."""
    path = os.path.realpath(disk_path)
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.stat(path)
    except OSError:  # the daemon says what is wrong, or does without it
        return f"disk-{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}"
    return f"disk-{found.st_dev:x}-{found.st_ino:x}"


def ensure_private_daemon(server: str, options: Options) -> None:
    """Start the daemon at `server` unless it runs; one that is ending is waited for. Raises ConfigError with what the
    daemon said where it does not start, where its files cannot be made, and where the running one works for another
    Redis.
    """
    try:
        _ensure(Path(server.removeprefix("unix://")), server, options)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"the private daemon at {server} cannot be started: {error}; "
            "set XDG_RUNTIME_DIR to a folder that can be written and has room"
        ) from error


def _ensure(path: Path, server: str, options: Options) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{path.parent} belongs to another user, or others may write to it; remove it or set XDG_RUNTIME_DIR"
        )
    with _only_one_starts(Path(f"{path}.start")):
        wanted, settings = _settings(options), Path(f"{path}.settings")
        if _bound(path):
            _compare(wanted, settings, server)
        else:
            settings.write_text(json.dumps(wanted))
            _start(path, options)


@contextlib.contextmanager
def _only_one_starts(path: Path) -> Iterator[None]:
    """Holds the lock at `path`. A daemon that ends removes the file: a lock on what has no name keeps nobody out."""
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    yield
                    return


def _settings(options: Options) -> dict[str, str]:
    """What engines that share a daemon should agree on. Of a Redis its place, without login, and only as a digest."""
    url = options.redis or os.environ.get(_REDIS, "")
    scheme, _, rest = url.partition("://")
    place = rest.rpartition("@")[2].partition("?")[0]
    redis = hashlib.sha256(f"{scheme} {place}".encode()).hexdigest() if url else ""
    http = options.http or os.environ.get(f"{ENVIRONMENT}HTTP", "")
    return {"memory": options.memory, "disk": options.disk if options.disk_path else "", "redis": redis, "http": http}


def _compare(wanted: dict[str, str], settings: Path, server: str) -> None:
    """Warn where the daemon that runs was started with other sizes or another address of REST; with another Redis it is
    none of ours."""
    try:
        running = json.loads(settings.read_text())
    except (OSError, ValueError):
        return
    if wanted["redis"] != running["redis"]:
        raise ConfigError(
            f"kv_connector_extra_config: redis is another one than that of the private daemon at {server}, which "
            "another engine started for this disk_path; give both engines the same redis, or this one another disk_path"
        )
    for key in ("memory", "disk", "http"):
        here, there = wanted[key], running.get(key, "")
        if here and here != there and (key == "http" or parse_size(here) != parse_size(there or "0")):
            _log.warning(
                "the private daemon at %s runs with %s=%s, and %s=%s is asked for here: what it was started with holds",
                server,
                key,
                there or "none",
                key,
                here,
            )


def _bound(path: Path) -> bool:
    """Whether a process has a socket bound there. A socket of the wrong type asks: a connection would be the daemon's
    first client, and its end the last one's.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(str(path)) == errno.EPROTOTYPE


def _start(path: Path, options: Options) -> None:
    log_path = f"{path}.log"
    command = ["-m", "loracache", "serve", "--private", "--socket", str(path), "--memory", options.memory]
    if options.disk_path:  # absolute, for the daemon has another working directory
        command += ["--disk-path", os.path.abspath(options.disk_path), "--disk", options.disk]
    Path(log_path).unlink(missing_ok=True)  # one that is ending may still write to it
    said, held_by_daemon = os.pipe()  # ends with the daemon: nobody waits for a process that is not a child of ours
    try:
        with open(log_path, "wb") as log, on_all_cores():
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _DETACH, sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=held_by_daemon,
                stderr=log,
                env=_environment(options),
                cwd="/",
                check=True,
            )
        os.close(held_by_daemon)
        _wait_until_ready(path, log_path, said)
        _log.info("the private daemon listens on %s and logs to %s", path, log_path)
    finally:
        os.close(said)


def _environment(options: Options) -> dict[str, str]:
    """The engine's own, as far as it is the daemon's business, and what the configuration says besides. Not on the
    command line, which every user can read."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_FOR_THE_DAEMON)}
    for key, field in Config.model_fields.items():
        name = f"{ENVIRONMENT}{key.upper()}"
        given = getattr(options, key, "") or os.environ.get(name)
        if given is None or key in _OF_THE_CONFIGURATION:
            continue
        # The daemon has another working directory.
        environment[name] = os.path.abspath(given) if field.annotation == Path | None else given
    return environment


def _wait_until_ready(path: Path, log_path: str, said: int) -> None:
    """Read from `said` until the daemon says that it serves, or has ended."""
    heard = b""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while select.select([said], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(said, 64)
        heard += part
        if _READY in heard:
            return
        if not part:
            reason = Path(log_path).read_text(errors="replace").strip()[-2000:]
            raise ConfigError(f"the private LoRACache daemon did not start: {reason}")
    raise Unavailable(
        f"the private LoRACache daemon did not answer at {path} within {_START_TIMEOUT_S:g} s; see {log_path}"
    )
