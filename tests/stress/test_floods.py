# SPDX-License-Identifier: Apache-2.0
"""Floods of the HTTP port from another address, TLS and all: whoever asks how the daemon is gets an answer within a
second, wherever they ask from; an address has what it may have and not more; afterwards all is as it was.

The other address is one of a network namespace with a wire to this one (root makes it; else these tests are skipped).
A plain port is never off loopback, where the other address is another of loopback's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loracache.rest.gate import GatedServer
from loracache.rest.tokens import add_token, tokens_path

CLONE_NEWNET = 0x40000000
SILENT, SLOW = 1100, 520
SECOND = 1.0
HALF_A_HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
NO_BODY = b"GET /healthz HTTP/1.1\r\nHost: localhost:PORT\r\nContent-Length: 1000\r\n\r\n"  # answered, and waited for


@dataclass
class Place:
    """Where connections come from. source: an address of this machine's; enter: what a thread does to be there."""

    server: tuple[str, int]
    source: str = ""
    enter: Callable[[], None] = lambda: None
    tls: ssl.SSLContext | None = None
    token: str = ""
    socks: list[socket.socket] = field(default_factory=list)

    def run(self, work: Callable[[], Any]) -> Any:
        """What `work` answers, done there."""
        with ThreadPoolExecutor(1, initializer=self.enter) as there:
            return there.submit(work).result()

    def opened(self) -> socket.socket:
        made = socket.socket()
        if self.source:
            made.bind((self.source, 0))
        return made

    def secured(self, sock: socket.socket) -> socket.socket:
        return self.tls.wrap_socket(sock, server_hostname="localhost") if self.tls is not None else sock

    def flood(self, count: int, said: bytes | None) -> None:
        """So many connections, which stay. said: what each says, after a hello where there is TLS. None: nothing, not
        even that, and all come at once."""
        if said is None:
            self.socks += [self.opened() for _ in range(count)]
            for sock in self.socks:
                sock.setblocking(False)
                sock.connect_ex(self.server)
            return
        said = said.replace(b"PORT", str(self.server[1]).encode())
        for _ in range(count):
            sock = self.opened()
            sock.settimeout(5)
            with contextlib.suppress(OSError):
                sock.connect(self.server)
                sock = self.secured(sock)
                sock.sendall(said)
            self.socks.append(sock)

    def alive(self) -> int:
        """How many of the flood's connections the server has not ended."""
        ended = 0
        for sock in self.socks:
            look = select.poll()
            if sock.fileno() >= 0:
                look.register(sock, select.POLLRDHUP)
            ended += sock.fileno() < 0 or bool(look.poll(0))
        return len(self.socks) - ended

    def ask(self, path: str, sock: socket.socket | None = None) -> socket.socket:
        """Ask on a connection (a new one where none is given), which stays open; fails where the answer is not 200."""
        if sock is None:
            sock = self.opened()
            sock.settimeout(5)
            sock.connect(self.server)
            sock = self.secured(sock)
        named = f"Authorization: Bearer {self.token}\r\n" if self.token else ""
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost:{self.server[1]}\r\n{named}\r\n".encode())
        head, _, body = sock.recv(1 << 16).partition(b"\r\n\r\n")
        assert head.split()[1:2] == [b"200"], head
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        while len(body) < length:
            body += sock.recv(1 << 16)
        return sock

    def close(self) -> None:
        for sock in self.socks:
            sock.close()
        self.socks.clear()


class Asker:
    """Asks for health and metrics from a place, again and again, each time on a new connection."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stop = threading.Event()
        self.took: list[float] = []
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._place.enter()
        while not self._stop.wait(0.05):
            for path in ("/healthz", "/metrics"):
                began = time.monotonic()
                try:
                    self._place.ask(path).close()
                except (OSError, AssertionError) as error:
                    self.wrong.append(f"{path}: {error!r}")
                self.took.append(time.monotonic() - began)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(20)


@pytest.fixture(scope="module", autouse=True)
def descriptors() -> Iterator[None]:
    """For as many connections as a flood has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"needs 4096 descriptors; this process may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def namespace() -> Iterator[SimpleNamespace]:
    """A network namespace with a wire to this one: `here`, the address of this end; `enter`, which moves a thread."""
    name, net = f"loracache-{os.getpid()}", f"198.18.{os.getpid() % 256}"  # a network set aside for tests of networks
    wire = f"lc{os.getpid()}"
    commands = [
        f"ip netns add {name}", f"ip link add {wire} type veth peer name {wire}x netns {name}",
        f"ip addr add {net}.1/30 dev {wire}", f"ip link set {wire} up",
        f"ip -n {name} addr add {net}.2/30 dev {wire}x", f"ip -n {name} link set {wire}x up",
    ]  # fmt: skip

    def enter() -> None:
        with Path(f"/run/netns/{name}").open("rb") as there:
            if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    try:
        for command in commands:
            try:
                done = subprocess.run(command.split(), check=False, capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("needs the command ip, to make a network namespace")
            if done.returncode:
                pytest.skip(f"may not make a network namespace: {command}: {done.stderr.strip()}")
        yield SimpleNamespace(here=f"{net}.1", there=f"{net}.2", enter=enter)
    finally:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["ip", "link", "del", wire], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def rest_process(running: Any) -> int:
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"loracache.rest" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def is_up(place: Place) -> bool:
    try:
        place.ask("/readyz").close()
    except (OSError, AssertionError):
        return False
    return True


@pytest.fixture(scope="module")
def secured(
    module_daemon: Any, namespace: SimpleNamespace, eventually: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """A daemon with TLS on all addresses: asked from `near`, flooded from `far`."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=DNS:localhost", "-keyout", f"{folder}/key", "-out", f"{folder}/cert"]
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    (folder / "key").chmod(0o600)
    with tempfile.TemporaryDirectory(prefix="lc-") as short:
        path = Path(short) / "lc.sock"
        token = add_token(tokens_path(path), "read", "read")
        running = module_daemon(
            socket=path,
            memory="4MiB",
            http="0.0.0.0:0",
            http_hosts="cache.example.org",
            tls_cert=folder / "cert",
            tls_key=folder / "key",
        )
        tls = ssl.create_default_context(cafile=folder / "cert")
        port = int(running.http.rpartition(":")[2])
        near = Place(("127.0.0.1", port), tls=tls, token=token)
        far = Place((namespace.here, port), enter=namespace.enter, tls=tls, token=token)
        eventually(lambda: is_up(near), "REST answers")
        yield SimpleNamespace(near=near, far=far, pid=rest_process(running))


def on_loopback(daemon: Any, eventually: Any) -> SimpleNamespace:
    running = daemon(memory="4MiB", http="127.0.0.1:0")
    server = ("127.0.0.1", int(running.http.rpartition(":")[2]))
    near, far = Place(server), Place(server, source="127.0.0.2")
    eventually(lambda: is_up(near), "REST answers")
    return SimpleNamespace(near=near, far=far, pid=rest_process(running))


@pytest.fixture(scope="module")
def plain(module_daemon: Any, eventually: Any) -> SimpleNamespace:
    """A daemon on loopback: asked from `near`, flooded from `far`."""
    return on_loopback(module_daemon, eventually)


@pytest.fixture(scope="module")
def calm(module_daemon: Any, eventually: Any) -> Any:
    """Where to ask another daemon."""
    return on_loopback(module_daemon, eventually).near


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def survives(served: SimpleNamespace, calm: Place, count: int, said: bytes | None, eventually: Any) -> None:
    """Flood it while it is asked from both places. calm: where nobody floods, which shows how the machine stalls."""
    near, far, most = served.near, served.far, GatedServer.MOST_OF_ADDRESS
    before = open_descriptors(served.pid)
    with contextlib.ExitStack() as stack:
        stack.callback(far.close)
        kept = [stack.enter_context(near.ask("/healthz")) for _ in range(5)]
        askers = [Asker(near), Asker(far), Asker(calm)]
        try:
            far.run(lambda: far.flood(count, said))
            asked = [len(asker.took) for asker in askers]
            eventually(lambda: all(len(each.took) > was + 5 for each, was in zip(askers, asked, strict=True)))
            held = far.alive()
        finally:
            for asker in askers:
                asker.end()
        for sock in kept:  # of who has done nothing wrong
            near.ask("/healthz", sock)
    assert [asker.wrong for asker in askers] == [[], [], []]
    *took, stalls = [max(asker.took) for asker in askers]
    assert max(took) < SECOND + 2 * stalls
    assert held <= most
    eventually(lambda: open_descriptors(served.pid) <= before, "its connections are forgotten")
    with contextlib.closing(far):
        far.run(lambda: far.flood(most - 10, None))
        assert far.alive() == most - 10
        assert is_up(near)
    eventually(lambda: open_descriptors(served.pid) <= before, "its connections are forgotten")


@pytest.mark.parametrize(
    ("count", "said"),
    [(SILENT, None), (SILENT, b""), (SLOW, HALF_A_HEAD), (SILENT, NO_BODY)],
    ids=["no hello", "silent after the hello", "half a head", "no body"],
)
def test_a_flood_from_another_machine_takes_nobodys_health_down(
    secured: SimpleNamespace, calm: Place, count: int, said: bytes | None, eventually: Any
) -> None:
    survives(secured, calm, count, said, eventually)


@pytest.mark.parametrize(
    ("count", "said"),
    [(SILENT, None), (SLOW, HALF_A_HEAD), (SILENT, NO_BODY)],
    ids=["silent", "half a head", "no body"],
)
def test_a_flood_from_another_address_takes_nobodys_health_down(
    plain: SimpleNamespace, calm: Place, count: int, said: bytes | None, eventually: Any
) -> None:
    survives(plain, calm, count, said, eventually)
