# SPDX-License-Identifier: Apache-2.0
"""The daemon's side of REST: takes the port, starts the process that serves it, and starts it again if it dies.

Threading: the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import subprocess
import sys
import time
from typing import Any

from loracache.config import Config, http_address
from loracache.errors import ConfigError
from loracache.rest.settings import check, rest_settings

__all__ = ["RestProcess"]

_log = logging.getLogger(__name__)
_AGAIN_S = 5.0
_END_S = 2.0  # it was told before the cache was drained, and gives its clients three seconds
_BACKLOG = 4096  # where it is full, whoever comes next tries again a second later
_PORT_PATIENCE_S = 5.0


class RestProcess:
    """One daemon's HTTP port. Raises ConfigError where it cannot be had, or could not be served safely."""

    def __init__(self, config: Config) -> None:
        assert config.http is not None
        check(config)
        self._config = config
        self._listener = _listen(config.http)
        self.port = int(self._listener.getsockname()[1])
        self._life: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0
        self._ending = False

    @property
    def pid(self) -> int | None:
        """Of the process while it runs, or is not known to have ended: until then nobody else has the number."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def start(self) -> None:
        """Start the process; where that cannot be done now, `tick` tries again."""
        try:
            self._start()
        except OSError as error:
            _log.error("the REST process cannot be started: %s", error)

    def _start(self) -> None:
        self._next_start = time.monotonic() + _AGAIN_S
        ours = self._listener.fileno()
        theirs, self._life = os.pipe()
        settings = rest_settings(self._config, self.port, ours, theirs).model_dump_json()
        # -P: what lies in the folder that the daemon was started in is no module of ours.
        command = [sys.executable, "-P", "-m", "loracache.rest", settings]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORACACHE_")}
        try:
            self._process = subprocess.Popen(
                command, pass_fds=[ours, theirs], stdin=subprocess.DEVNULL, env=environment
            )
        finally:
            os.close(theirs)

    def tick(self) -> None:
        """Start it again where it died."""
        if (
            self._ending
            or time.monotonic() < self._next_start
            or (self._process is not None and self._process.poll() is None)
        ):
            return
        if self._process is not None:
            _log.error("the REST process ended with %d and is started again", self._process.returncode)
        self._let_go()
        self.start()

    def end(self) -> None:
        """Have the process end; `close` waits for it."""
        self._ending = True
        self._let_go()

    def close(self) -> None:
        """End the process and give the port back. A second call does nothing."""
        self.end()
        self._listener.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
                return
            _log.error("the REST process does not end and is killed")
            self._process.kill()
            self._process.wait()

    def _let_go(self) -> None:
        """Close the pipe that keeps the process alive."""
        if self._life is not None:
            os.close(self._life)
            self._life = None


def _bind(listener: socket.socket, address: Any) -> None:
    """The REST process of a daemon that was killed holds the port until it has noticed. Raises OSError."""
    deadline = time.monotonic() + _PORT_PATIENCE_S
    while True:
        try:
            listener.bind(address)
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def _listen(http: str) -> socket.socket:
    host, port = http_address(http)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(listener, address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"http={http} cannot be listened on: {error.strerror}; give another port") from None
    return listener
