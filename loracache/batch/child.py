# SPDX-License-Identifier: Apache-2.0
"""An engine and a daemon of a batch's own: vLLM's OpenAI server on a unix socket, with our connector, ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

from loracache.batch.http import Server
from loracache.batch.keeper import kept
from loracache.client.connection import Connection
from loracache.client.requests import SOCKET_PATH_BYTES
from loracache.errors import ConfigError, ProtocolError, Unavailable

__all__ = ["ChildEngine"]

_START_S, _END_S, _LOOK_S = 900.0, 60.0, 0.1
_LAST_LINES = 3000  # characters of a log that a message shows


class ChildEngine:
    """vLLM serving `model` with more of its `options`, and a daemon of `memory` behind it, or the one at `socket`. With
    "" and None it has no cache.

    folder: of sockets and logs; ConfigError where its path is too long for the former. Entered, it answers. Raises
    ConfigError where the engine ends instead.
    """

    def __init__(self, model: str, options: Sequence[str], folder: Path, memory: str, socket: Path | None) -> None:
        engine = folder / "engine.sock"
        if len(os.fsencode(engine)) > SOCKET_PATH_BYTES:
            told = f"{engine} is longer than the {SOCKET_PATH_BYTES} bytes that a socket's name may have"
            raise ConfigError(f"{told}; set TMPDIR to a shorter folder")
        self.url = f"unix://{engine}"
        self.socket = socket or (folder / "cache.sock" if memory else None)
        """The daemon's."""
        self._folder = folder
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model,
            "--uds", str(engine), "--enable-prompt-tokens-details",
            "--disable-uvicorn-access-log", *options,
        ]  # fmt: skip
        given = {each.split("=")[0] for each in options}
        self.prioritized = self.socket is not None and "--scheduling-policy" not in given
        """Whether requests may say their priority, and run in its order. Without a cache any order is as good, and the
        first to come is chosen sooner."""
        if self.prioritized:
            self._command += ["--scheduling-policy", "priority"]
        if self.socket is not None and "--kv-transfer-config" not in given:
            transfer = {
                "kv_connector": "LoRACacheConnector",
                "kv_connector_module_path": "loracache.connectors.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"server": f"unix://{self.socket}"},
            }
            self._command += ["--kv-transfer-config", json.dumps(transfer)]
        self._presence: Connection | None = None
        self._daemon: list[str] = []
        if socket is None and self.socket is not None:
            self._presence = Connection(f"unix://{self.socket}", name="batch")
            serve = ["serve", "--private", "--socket", str(self.socket), "--memory", memory, "--log-level", "warning"]
            self._daemon = [sys.executable, "-m", "loracache", *serve]
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []

    async def __aenter__(self) -> ChildEngine:
        try:
            if self._daemon:
                self._start(self._daemon, "cache")
            self._start(self._command, "engine")  # the daemon is there long before an engine wants it
            if self._presence is not None:
                await self._wait(partial(_joined, self._presence))
            server = Server(self.url)
            try:
                await self._wait_healthy(server)
            finally:
                await server.close()
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    async def watch(self) -> None:
        """Without end. Raises ConfigError, with the end of its log, when the engine or the daemon has ended."""
        while True:
            self._check()
            await asyncio.sleep(_LOOK_S)

    def _start(self, command: list[str], name: str) -> None:
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                kept(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # an interrupt is ours to pass on, in order
            )
        self._running.append((process, log))

    async def _wait_healthy(self, server: Server) -> None:
        async def healthy() -> bool:
            with contextlib.suppress(Unavailable, ProtocolError):
                return (await server.get("/health", 10.0)).status == 200
            return False

        deadline = time.monotonic() + _START_S
        while not await healthy():
            self._check(deadline)
            await asyncio.sleep(_LOOK_S)

    async def _wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not ready():
            self._check(deadline)
            await asyncio.sleep(0.02)

    def _check(self, deadline: float = math.inf) -> None:
        for process, log in self._running:
            if process.poll() is not None:
                said = log.read_text(errors="replace")[-_LAST_LINES:]
                raise ConfigError(f"the {log.stem} ended with {process.returncode}: {said}")
        if time.monotonic() > deadline:
            raise Unavailable(f"the engine did not start within {_START_S:g} s")

    def _end(self) -> None:
        """The engine first, then the daemon that it stores to."""
        if self._presence is not None:
            self._presence.close()
        for process, _ in reversed(self._running):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._running.clear()


def _joined(presence: Connection) -> bool:
    """Whether we are among the daemon's clients: alone it would end, and an engine may take many minutes until it
    connects."""
    with contextlib.suppress(Unavailable):
        presence.connect()
    return presence.connected
