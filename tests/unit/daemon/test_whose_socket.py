# SPDX-License-Identifier: Apache-2.0
"""Whom a client believes, and in whose folder a daemon puts its socket, its lock and its audit log."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loracache import CacheClient, ConfigError, Unavailable
from loracache.client.connection import server_uid, socket_path
from loracache.control.audit import Audit

OTHER = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs to be other users")

SERVER = """
import contextlib, os, socket, sys
from pathlib import Path
from loracache.cache.state.arena import Arena
from loracache.wire import protocol
path, uid = sys.argv[1], int(sys.argv[2])
os.setuid(uid)
arena = Arena(1 << 20, 4096)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path)
    os.chmod(path, 0o666)
    listener.listen()
    print("listens", flush=True)
    while True:
        client, _ = listener.accept()
        with contextlib.suppress(OSError):
            greeting = protocol.Greeting(protocol.VERSION, b"i" * 16, 1 << 20, 4096)
            socket.send_fds(client, [greeting.encode()], [arena.fd])
"""


@pytest.fixture
def server_of(short_tmp: Path) -> Iterator[Callable[..., Path]]:
    """server_of(uid, folder's owner): the socket of somebody who greets as a daemon does."""
    started = []

    def start(uid: int, owner: int) -> Path:
        short_tmp.chmod(0o755)
        folder = short_tmp / "run"
        folder.mkdir()
        folder.chmod(0o777)
        os.chown(folder, owner, owner)
        path = folder / "lc.sock"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(path), str(uid)], stdout=subprocess.PIPE, text=True, env=environment
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        return path

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(("uid", "owner"), [(0, 0), (OTHER, OTHER), (0, OTHER)])
def test_root_ourselves_and_the_owner_of_the_folder_are_believed(
    server_of: Callable[..., Path], uid: int, owner: int
) -> None:
    CacheClient(f"unix://{server_of(uid, owner)}").close()


def test_a_stranger_is_not_believed_unless_the_address_names_him(server_of: Callable[..., Path]) -> None:
    path = server_of(OTHER, 0)
    with pytest.raises(Unavailable, match=rf"has uid {OTHER}, which is not .*unix://{path}\?uid={OTHER}"):
        CacheClient(f"unix://{path}")
    CacheClient(f"unix://{path}?uid={OTHER}").close()


def test_an_address_that_names_a_user_takes_nobody_else(server_of: Callable[..., Path]) -> None:
    with pytest.raises(Unavailable, match=f"has uid 0, not {OTHER}"):
        CacheClient(f"unix://{server_of(0, 0)}?uid={OTHER}")


def test_the_command_line_takes_such_an_address(server_of: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "loracache", "status", "--socket", f"{server_of(0, 0)}?uid={OTHER}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, f"has uid 0, not {OTHER}" in done.stderr) == (1, True)


def test_the_user_is_no_part_of_the_path() -> None:
    assert (socket_path("unix:///run/lc.sock?uid=12"), server_uid("unix:///run/lc.sock?uid=12")) == ("/run/lc.sock", 12)
    assert server_uid("/run/lc.sock") is None
    for address in ("unix:///run/lc.sock?uid=", "unix:///run/lc.sock?uid=me", "unix:///run/lc.sock?uid=-1"):
        with pytest.raises(ConfigError, match="is not a user's number"):
            server_uid(address)


def serve(*arguments: object, timeout: float = 20) -> tuple[int, str]:
    """A daemon that does not start."""
    command = [sys.executable, "-m", "loracache", "serve", "--memory", "1MiB", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    return done.returncode, done.stderr


def test_no_socket_is_made_in_the_folder_of_another_user(short_tmp: Path) -> None:
    os.chown(short_tmp, OTHER, OTHER)
    code, said = serve("--socket", short_tmp / "lc.sock")
    assert code == 2
    assert f"its folder {short_tmp} belongs to another user (uid {OTHER})" in said
    assert os.listdir(short_tmp) == []


def test_a_lock_that_is_a_link_is_not_followed(short_tmp: Path) -> None:
    (short_tmp / "lc.sock.lock").symlink_to(short_tmp / "made by us")
    code, said = serve("--socket", short_tmp / "lc.sock")
    assert (code, "lc.sock" in said) == (2, True)
    assert not (short_tmp / "made by us").exists()


def test_a_folder_that_others_may_write_to_is_warned_of(daemon: Any, short_tmp: Path) -> None:
    folder = short_tmp / "open"
    folder.mkdir()
    folder.chmod(0o777)
    assert f"others may write to {folder}" in daemon(socket=folder / "lc.sock").log()


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_an_audit_log_is_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    path, precious = tmp_path / "audit.log", tmp_path / "precious"
    precious.write_text("precious")
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "hard link":
        path.hardlink_to(precious)
    else:
        os.mkfifo(path)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"audit_log='{path}' cannot be written"):
        Audit(path)
    assert time.monotonic() - began < 20
    assert precious.read_text() == "precious"


def test_a_disk_path_of_another_user_ends_the_start_with_the_fix(short_tmp: Path) -> None:
    disk = short_tmp / "disk"
    disk.mkdir()
    (disk / "manifest.new").symlink_to(short_tmp / "made by us")
    os.chown(disk, OTHER, OTHER)
    code, said = serve("--socket", short_tmp / "lc.sock", "--disk-path", disk)
    assert (code, "Traceback" in said) == (2, False)
    assert f"disk_path {str(disk)!r} cannot be trusted" in said
    assert f"chown -R 0 {disk}" in said
    assert not (short_tmp / "made by us").exists()
