# SPDX-License-Identifier: Apache-2.0
"""The cache that is disturbed: a daemon with REST, a disk of its own that can be full, and a real Redis.

Everything that is started here ends in `close`. A daemon's log is looked through when it has ended.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis as redis_client

from loracache import CacheClient
from loracache.errors import LoRACacheError

__all__ = ["Daemon", "House", "RedisServer", "environment", "eventually"]

_DISK_MIB = 160
_START_S = 60.0
_TRACE = "Traceback (most recent call last)"


def eventually(holds: Callable[[], Any], seconds: float) -> Any:
    """What it answers once that is true, or its last answer when the time is over."""
    deadline = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def environment() -> dict[str, str]:
    """Of a child that finds the same modules, without the settings of whoever runs this; its REST counts no calls."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LORACACHE_")}
    return (
        kept
        | {"LORACACHE_HTTP_RATE": "0"}
        | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    )


class Daemon:
    """One life of a daemon. `ready` waits for it."""

    def __init__(self, log: Path, socket: Path, **options: object) -> None:
        self.log, self.socket = log, socket
        arguments = [sys.executable, "-m", "loracache", "serve", "--socket", str(socket)]
        for name, value in options.items():
            arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                arguments, cwd=log.parent, env=environment(), stdout=file, stderr=file, start_new_session=True
            )
        self.descriptors = self.anonymous = 0
        self.loses = False  # its disk's budget is small, or was cleared: what is there may go at any time

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def ready(self, scanned: bool = True) -> None:
        """Wait until it serves, and has read its disk. Raises RuntimeError where it does not."""
        up = eventually(lambda: self.process.poll() is not None or "listening on" in self.log.read_text(), _START_S)
        if not up or self.process.poll() is not None:
            raise RuntimeError(f"the daemon did not start: {self.log.read_text()[-3000:]}")
        if scanned and not eventually(lambda: self.status()["tiers"]["disk"]["scanned"], _START_S):
            raise RuntimeError("the daemon did not read its disk")
        self.descriptors, self.anonymous = self.open_descriptors(), self.anonymous_bytes()

    def status(self) -> dict[str, Any]:
        """Or an empty map where it does not answer."""
        with contextlib.suppress(LoRACacheError), CacheClient(f"unix://{self.socket}", name="chaos") as client:
            return client.status()
        return {"tiers": {"disk": {"scanned": False}}}

    def open_descriptors(self) -> int:
        """How many it has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def anonymous_bytes(self) -> int:
        """Memory that is neither the arena nor a file."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))

    def rest_pids(self) -> list[int]:
        """Its REST process, where there is one."""
        found = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in found if b"loracache.rest" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def kill(self) -> None:
        """With SIGKILL."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)

    def end(self, seconds: float) -> int | None:
        """In order; the exit code, or None where it did not end in time."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def tracebacks(self) -> list[str]:
        """What its log has of them."""
        text = self.log.read_text(errors="replace")
        return [_TRACE + part[:1500] for part in text.split(_TRACE)[1:]]


class RedisServer:
    """On a unix socket, with nothing kept on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.socket = folder / "redis.sock"
        self.stopped = False
        self.redis = redis_client.Redis(unix_socket_path=str(self.socket), socket_timeout=3)
        self.launch()
        if not eventually(self.answers, _START_S):
            self.kill()
            raise RuntimeError("redis-server does not answer")

    def launch(self) -> None:
        """Start, or start again with nothing in it; does not wait until it answers."""
        arguments = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(["redis-server", *arguments], cwd=self._folder, stdout=subprocess.DEVNULL)

    def answers(self) -> bool:
        """Whether it does now."""
        try:
            return bool(self.redis.ping())
        except redis_client.RedisError:
            return False

    @property
    def usable(self) -> bool:
        """Whether it is up, as far as we did not stop it ourselves."""
        return not self.stopped and self.process.poll() is None

    def kill(self) -> None:
        """With SIGKILL; ends a stopped process too."""
        self.redis.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)


class House:
    """The whole, in `folder` (a short name: unix sockets stand in it)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        self.disk.mkdir()
        mounting = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "loracache-chaos", str(self.disk)]
        self.can_fill = os.geteuid() == 0 and subprocess.run(mounting, check=False, capture_output=True).returncode == 0
        self.daemon: Daemon | None = None
        self.lives = 0
        self.tracebacks: list[str] = []
        try:
            self.redis = RedisServer(folder)
        except BaseException:
            self._unmount()
            raise

    def start(self, limit: str, **options: object) -> Daemon:
        """The daemon that is disturbed."""
        self.lives += 1
        log = self.folder / f"daemon-{self.lives}.log"
        self.daemon = Daemon(
            log,
            self.folder / "s",
            memory="12MiB",
            page_size="4KiB",
            disk_path=self.disk / "d",
            disk=limit,
            disk_sync=True,
            redis=f"unix://{self.redis.socket}",
            http="127.0.0.1:0",
            drain=5,
            **options,
        )
        self.daemon.ready()
        port = self.folder / "port.new"
        port.write_text(log.read_text().partition("REST on port ")[2].split()[0])
        port.rename(self.folder / "port")
        return self.daemon

    def auditor(self) -> Daemon:
        """One on the same disk that nobody knows of, without Redis."""
        daemon = Daemon(
            self.folder / "audit.log",
            self.folder / "a",
            memory="8MiB",
            page_size="4KiB",
            disk_path=self.disk / "d",
            disk="4GiB",
            disk_sync=True,
        )
        try:
            daemon.ready()
        except BaseException:
            daemon.kill()
            raise
        return daemon

    def look_through(self, daemon: Daemon) -> None:
        """The log of a daemon that has ended; one without a traceback goes."""
        found = daemon.tracebacks()
        self.tracebacks += found
        if not found:
            daemon.log.unlink(missing_ok=True)

    def limit_descriptors(self, more: int | None) -> None:
        """To so many more than it has now; None: as they were."""
        daemon = self.daemon
        if daemon is not None and daemon.process.poll() is None:
            soft = (
                daemon.open_descriptors() + more if more is not None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            )
            hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[1]
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (soft, hard))

    def close(self) -> None:
        """End everything."""
        if self.daemon is not None:
            self.daemon.kill()
        self.redis.kill()
        self._unmount()

    def _unmount(self) -> None:
        if self.can_fill:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)
