"""The private daemon of an engine whose configuration names no server.

The first of the engine's processes that needs it starts it, under a lock, in a session of its own; it flushes and
ends when its last connection closes, so it outlives an engine that is killed just long enough to save what it holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from loracache.connectors.vllm.cores import on_all_cores
from loracache.connectors.vllm.options import Options
from loracache.errors import ConfigError, Unavailable

__all__ = ["ensure_private_daemon", "private_server"]

_START_TIMEOUT_S = 15.0
_READY = b"listening on"


def private_server(engine_id: str) -> str:
    """The address of the engine's private daemon; the same in all its processes."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"loracache-{os.getuid()}"
    name = re.sub(r"[^A-Za-z0-9_-]", "_", engine_id)[-60:]
    return f"unix://{folder / name}.sock"


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
    command = [
        sys.executable,
        "-m",
        "loracache",
        "serve",
        "--private",
        "--socket",
        str(path),
        "--memory",
        options.memory,
    ]
    if options.disk_path:
        command += ["--disk-path", options.disk_path, "--disk", options.disk]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORACACHE_")}
    if options.redis:  # not on the command line, where every user could read a password
        environment["LORACACHE_REDIS"] = options.redis
    with open(log_path, "wb") as log, on_all_cores():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True, cwd="/"
        )
    threading.Thread(target=process.wait, name="loracache-private", daemon=True).start()  # else it ends as a zombie
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = Path(log_path).read_text(errors="replace").strip()[-2000:]
            raise ConfigError(f"the private LoRACache daemon did not start: {said}")
        if _READY in Path(log_path).read_bytes():  # its tiers are open too; its socket is there before they are
            return
        time.sleep(0.02)
    raise Unavailable(
        f"the private LoRACache daemon did not answer at {path} within {_START_TIMEOUT_S:g} s; see {log_path}"
    )
