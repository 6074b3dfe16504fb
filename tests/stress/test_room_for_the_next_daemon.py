# SPDX-License-Identifier: Apache-2.0
"""A daemon that was killed comes back beside clients that hold its arena, in a container with no room for two."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ARENA, LIMIT = 1 << 30, 3 << 29
_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")

# Maps the whole arena, says so, and then does nothing but wait for its standard input to end.
_CLIENT = """
import sys
from loracache import CacheClient
from loracache.mapping import fill_page_tables
client = CacheClient(sys.argv[1])
fill_page_tables(lambda: client.connection.map)
print("mapped", flush=True)
sys.stdin.read()
"""


class Container:
    """Processes that together may take LIMIT bytes; where this machine lets us make no control group, any."""

    def __init__(self) -> None:
        v1 = (_V1 / "cgroup.procs").exists()
        self.folder: Path | None = (_V1 if v1 else _V2) / f"loracache-{os.getpid()}"
        try:
            self.folder.mkdir()
            (self.folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(LIMIT))
        except OSError:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            self.folder = None

    def start(self, arguments: list[str], **options: Any) -> subprocess.Popen[str]:
        enter = f"echo $$ > {self.folder}/cgroup.procs && " if self.folder else ""
        return subprocess.Popen(["sh", "-c", f'{enter}exec "$@"', "sh", *arguments], text=True, **options)

    def close(self) -> None:
        if self.folder is not None:
            deadline = time.monotonic() + 10
            while True:
                try:
                    self.folder.rmdir()
                    return
                except OSError:  # its last process is on its way out
                    assert time.monotonic() < deadline
                    time.sleep(0.05)


@pytest.fixture
def container() -> Iterator[Container]:
    made = Container()
    yield made
    made.close()


def arenas(pid: int) -> set[str]:
    """Inodes of the arenas that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:loracache-arena" in line}


@pytest.mark.timeout(300)
def test_a_killed_daemon_comes_back_where_two_arenas_have_no_room(
    container: Container, short_tmp: Path, eventually: Any
) -> None:
    socket, log = short_tmp / "s", short_tmp / "log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    serve = [sys.executable, "-m", "loracache", "serve", "--socket", str(socket), "--memory", str(ARENA)]
    running: list[subprocess.Popen[str]] = []

    def start_daemon() -> subprocess.Popen[str]:
        with log.open("w") as file:
            daemon = container.start(serve, env=environment, stdout=file, stderr=file)
        running.append(daemon)
        eventually(lambda: "ready after" in log.read_text() or daemon.poll() is not None, "its arena is filled", 60)
        assert daemon.poll() is None, f"ended with {daemon.returncode}: {log.read_text()}"
        return daemon

    try:
        daemon = start_daemon()
        clients = [
            container.start(
                [sys.executable, "-c", _CLIENT, f"unix://{socket}"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        running += clients
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == "mapped\n"
        (arena,) = arenas(daemon.pid)
        assert all(arenas(client.pid) == {arena} for client in clients)
        for _ in range(2):
            os.kill(daemon.pid, signal.SIGKILL)
            daemon.wait(30)
            eventually(lambda: not any(arenas(client.pid) for client in clients), "no client maps it any more")
            daemon = start_daemon()
        assert all(client.poll() is None for client in clients)
    finally:
        for process in running:
            process.kill()
            process.communicate()
