"""The private daemon of an engine whose configuration names no server.

The first of the engine's processes that needs it starts it, under a lock, in a session of its own; it flushes and
ends when its last connection closes, so it outlives an engine that is killed just long enough to save what it holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loracache.connectors.vllm.cores import on_all_cores
from loracache.connectors.vllm.options import Options
from loracache.errors import ConfigError, Unavailable
from loracache.protocol import SOCKET_PATH_BYTES

__all__ = ["ensure_private_daemon", "private_server"]

_START_TIMEOUT_S = 15.0
_READY = b"ready"  # what a private daemon writes to its standard output
# A CPU worker's OpenMP settings would pin the daemon, too, to the core of a thread that never sleeps.
_NOT_FOR_THE_DAEMON = ("LORACACHE_", "GOMP_", "KMP_", "OMP_", "LD_PRELOAD")
# vLLM kills every descendant of an engine that ends slowly, whatever its session. So the daemon is nobody's descendant.
_DETACH = "import os, sys; os.fork() and os._exit(0); os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"


def private_server(engine_id: str) -> str:
    """The address of the engine's private daemon; the same in all its processes."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", engine_id)[-60:]
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        if base:
            path = Path(base) / f"loracache-{os.getuid()}" / f"{name}.sock"
            if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
                return f"unix://{path}"
    raise ConfigError(
        f"TMPDIR={base!r} is too long a path for a unix socket in it; set XDG_RUNTIME_DIR to a shorter one"
    )


def ensure_private_daemon(server: str, options: Options) -> None:
    """Start the daemon at `server` unless it runs. Raises ConfigError with what the daemon said where it does not
    start.
    """
    path = Path(server.removeprefix("unix://"))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_uid != os.getuid():
        raise ConfigError(f"{path.parent} belongs to another user; remove it or set XDG_RUNTIME_DIR")
    with open(f"{path}.start", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _bound(path):
            _start(path, options)


def _bound(path: Path) -> bool:
    """Whether a process has a socket bound there. A socket of the wrong type asks: a connection would be the daemon's
    first client, and its end the last one's.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(str(path)) == errno.EPROTOTYPE


def _start(path: Path, options: Options) -> None:
    log_path = f"{path}.log"
    command = ["-m", "loracache", "serve", "--private", "--socket", str(path), "--memory", options.memory]
    if options.disk_path:
        command += ["--disk-path", options.disk_path, "--disk", options.disk]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_FOR_THE_DAEMON)}
    if options.redis:  # not on the command line, where every user could read a password
        environment["LORACACHE_REDIS"] = options.redis
    said, held_by_daemon = os.pipe()  # ends with the daemon: nobody waits for a process that is no child of ours
    try:
        with open(log_path, "wb") as log, on_all_cores():
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _DETACH, sys.executable, *command],
                stdin=subprocess.DEVNULL, stdout=held_by_daemon, stderr=log, env=environment, cwd="/", check=True,
            )  # fmt: skip
        os.close(held_by_daemon)
        _wait_until_ready(path, log_path, said)
    finally:
        os.close(said)


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
