"""What the contract tests share: objects in aligned buffers, and every backend under one name."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import random
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
import xxhash

from loracache.storage_backends.base import ALIGNMENT, Kind, ObjectInfo, Outcome, StorageBackend, Transfer, padded
from loracache.storage_backends.disk import DiskBackend
from loracache.storage_backends.memory import MemoryBackend
from loracache.storage_backends.redis import RedisBackend

SEGMENT = 256 << 10  # small, so that objects of a test have several
_numbers = itertools.count()


def buffers(size: int, pieces: int) -> list[memoryview]:
    """Aligned buffers for `size` bytes, in at most `pieces` pieces that do not lie in their order."""
    blocks = padded(size) // ALIGNMENT
    each = max(1, -(-blocks // pieces)) * ALIGNMENT
    lengths = [min(each, padded(size) - start) for start in range(0, padded(size), each)]
    if not lengths:
        return []
    arena = memoryview(mmap.mmap(-1, sum(lengths)))
    ends = list(itertools.accumulate(reversed(lengths)))
    return [arena[end - length : end] for end, length in zip(reversed(ends), lengths, strict=True)]


class Objects:
    """Makes objects whose bytes and keys are random, but the same in every run."""

    def __init__(self) -> None:
        self._random = random.Random(1)

    def new(self, size: int, *, parent: bytes = b"", pieces: int = 1, key: bytes | None = None) -> Transfer:
        """An object of `size` bytes; what lies behind them in its buffers is noise."""
        content = self._random.randbytes(padded(size))
        views = buffers(size, pieces)
        start = 0
        for view in views:
            view[:] = content[start : start + view.nbytes]
            start += view.nbytes
        checksum = xxhash.xxh3_64_intdigest(content[:size])
        key = key or hashlib.sha256(self._random.randbytes(8)).digest()
        kind = Kind.KV if parent else Kind.LORA
        return Transfer(ObjectInfo(key, parent, kind, hashlib.sha256(b"model").digest(), size, checksum), views)

    def empty(self, of: Transfer, *, pieces: int = 1) -> Transfer:
        """The same object with empty buffers to load it into."""
        return Transfer(of.info, buffers(of.info.size, pieces))

    def payload(self, transfer: Transfer) -> bytes:
        return b"".join(transfer.buffers)[: transfer.info.size]

    def unmatched(self, transfer: Transfer) -> Transfer:
        """The same object with a checksum that is not its payload's."""
        return Transfer(replace(transfer.info, checksum=transfer.info.checksum ^ 1), transfer.buffers)

    def holds(self, backend: StorageBackend, transfer: Transfer) -> bool:
        """Whether `backend` loads exactly the bytes of `transfer`; False is a MISS, anything else fails."""
        target = self.empty(transfer, pieces=3)
        (result,) = backend.load([target])
        if result.outcome is Outcome.MISS:
            return False
        assert result.outcome is Outcome.OK, result
        assert self.payload(target) == self.payload(transfer)
        return True

    def store(self, backend: StorageBackend, transfers: Sequence[Transfer]) -> None:
        assert outcomes(backend.store(transfers)) == [Outcome.OK] * len(transfers)

    def load(self, backend: StorageBackend, transfer: Transfer) -> Outcome:
        return backend.load([self.empty(transfer)])[0].outcome

    def found(self, backend: StorageBackend, transfer: Transfer) -> Outcome:
        return backend.contains([transfer.info.key])[0].outcome


class Folder:
    """A look into a disk backend's folder from the outside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "manifest"
        self.tmp = path / "tmp"

    def at(self, path: Path) -> Folder:
        return Folder(path)

    def file(self, transfer: Transfer) -> Path:
        """Where an object lies."""
        name = transfer.info.key.hex()
        return self.path / "objects" / name[:2] / name

    def files(self) -> list[str]:
        """Names of all files of objects, finished or not."""
        found = [path for part in ("objects", "tmp") for path in (self.path / part).rglob("*")]
        return sorted(path.name for path in found if path.is_file())

    def flip(self, path: Path, offset: int) -> None:
        """Turns one bit over."""
        with path.open("r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1]))


def outcomes(results: Sequence[Any]) -> list[Outcome]:
    return [result.outcome for result in results]


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """The folder of `disk()`; folder.at(path) looks into another."""
    return Folder(tmp_path / "disk")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., DiskBackend]]:
    """disk(**options) opens the test's folder; disk(path) another one. All are closed at the end."""
    opened: list[DiskBackend] = []

    def open_disk(path: Path = tmp_path / "disk", **options: Any) -> DiskBackend:
        opened.append(DiskBackend(path, **options))
        return opened[-1]

    yield open_disk
    for backend in opened:
        backend.close()


@pytest.fixture
def redis_tier() -> Iterator[Callable[..., RedisBackend]]:
    """redis_tier(url, **options) makes a backend with small segments; all are closed at the end."""
    opened: list[RedisBackend] = []

    def make(url: str, **options: Any) -> RedisBackend:
        opened.append(RedisBackend(url, **{"segment_bytes": SEGMENT, "timeout_s": 10.0} | options))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


class Certificates:
    """A CA and what it signs, made by openssl in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca = self._make("ca", "-subj", "/CN=test CA", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        self.stranger = self._make("stranger", "-subj", "/CN=other CA")

    def signed(self, name: str, alternative: str = "DNS:localhost,IP:127.0.0.1", days: int = 2) -> tuple[Path, Path]:
        """Certificate and key of a server or client known under the `alternative` names; expired where days < 0."""
        key, request, certificate = (self._folder / f"{name}.{end}" for end in ("key", "csr", "crt"))
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n")
        self._openssl("req", "-newkey", *_CURVE, "-nodes", "-keyout", key, "-out", request, "-subj", "/CN=test")
        self._openssl(
            "x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._folder / "ca.key", "-CAcreateserial",
            "-days", days, "-extfile", extensions, "-out", certificate,
        )  # fmt: skip
        return certificate, key

    def locked(self, key: Path, password: str) -> Path:
        """The same key under a password."""
        locked = key.with_suffix(".locked")
        self._openssl("pkey", "-in", key, "-aes256", "-passout", f"pass:{password}", "-out", locked)
        return locked

    def _make(self, name: str, *options: str) -> Path:
        key, certificate = self._folder / f"{name}.key", self._folder / f"{name}.crt"
        self._openssl(
            "req", "-x509", "-newkey", *_CURVE, "-nodes", "-days", 2, "-keyout", key, "-out", certificate, *options
        )
        return certificate

    def _openssl(self, *arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, cwd=self._folder)


class NetServer:
    """A redis-server on loopback ports of its own, with nothing kept on disk."""

    def __init__(
        self,
        folder: Path,
        *options: object,
        tls: tuple[Path, Path] | None = None,
        ca: Path | None = None,
        password: str | None = None,
    ) -> None:
        self.port = free_port()
        self.tls_port = free_port() if tls else 0
        self._folder = folder / str(self.port)
        self._folder.mkdir()
        self._arguments = ["--port", self.port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._arguments += ["--repl-diskless-sync-delay", 0, *options]
        if tls:
            self._arguments += ["--tls-port", self.tls_port, "--tls-cert-file", tls[0], "--tls-key-file", tls[1]]
            self._arguments += ["--tls-ca-cert-file", ca]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.tls_url = f"rediss://localhost:{self.tls_port}?ssl_ca_certs={ca}"
        if password:
            self._arguments += ["--requirepass", password, "--masterauth", password]
        self.redis = redis_client.Redis(port=self.port, password=password)
        self.start()

    def start(self) -> None:
        command = ["redis-server", *map(str, self._arguments)]
        self.process = subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL)

    def answers(self) -> bool:
        assert self.process.poll() is None, f"redis-server ended with {self.process.returncode}"
        try:
            return bool(self.redis.ping())
        except redis_client.ConnectionError:
            return False

    def kill(self) -> None:
        self.redis.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)


def free_port() -> int:
    """A port nobody listens on, nor on the one 10000 above, which a cluster's nodes speak among themselves by."""
    while True:
        port = _chosen.randrange(*_PORTS)
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 10_000)):
                return port
        except OSError:
            continue


class NetCluster:
    """Three nodes with a third of the slots each, reached plainly and by TLS."""

    def __init__(self, folder: Path, certificates: Certificates, eventually: Callable[..., Any]) -> None:
        self._eventually = eventually
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", 1000, "--cluster-require-full-coverage", "no"]
        options += ["--tls-cluster", "yes", "--tls-replication", "yes", "--tls-auth-clients", "no"]
        pair = certificates.signed("node")
        self.new_node = lambda: NetServer(folder, *options, tls=pair, ca=certificates.ca)
        self.nodes = [self.new_node() for _ in range(3)]
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        self.tls_url = self.url.replace("redis", "rediss", 1) + f"?ssl_ca_certs={certificates.ca}"
        for plain, tls in ((node.port, node.tls_port) for node in self.nodes):
            self.tls_url = self.tls_url.replace(f":{plain}", f":{tls}")

    def join(self) -> NetCluster:
        """Makes the nodes one cluster."""
        for number, node in enumerate(self.nodes):
            self._eventually(node.answers, "a node answers")
            node.redis.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            node.redis.execute_command("CLUSTER ADDSLOTS", *range(number * 16384 // 3, (number + 1) * 16384 // 3))
        for node in self.nodes[1:]:
            node.redis.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].tls_port)
        self._eventually(self.whole, "the cluster is whole")
        return self

    def whole(self) -> bool:
        """Whether every node knows of all slots and nodes."""
        states = [node.redis.execute_command("CLUSTER INFO") for node in self.nodes]
        return all(
            state["cluster_state"] == "ok"
            and (state["cluster_slots_ok"], state["cluster_known_nodes"]) == ("16384", "3")
            for state in states
        )

    def owner(self, slot: int) -> int:
        """The number of the node that says it has the slot."""
        for number, node in enumerate(self.nodes):
            for first, last, (_, port, *_), *_ in node.redis.execute_command("CLUSTER SLOTS"):
                if first <= slot <= last and port == node.port:
                    return number
        raise AssertionError(f"nobody has slot {slot}")

    def move(self, slot: int, to: int) -> None:
        """Moves a slot and what is in it, as `redis-cli --cluster reshard` does."""
        source, target = self.nodes[self.owner(slot)].redis, self.nodes[to].redis
        self.begin_move(slot, to)
        while keys := source.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
            source.execute_command("MIGRATE", "127.0.0.1", self.nodes[to].tls_port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            node.execute_command("CLUSTER SETSLOT", slot, "NODE", self.id(to))

    def begin_move(self, slot: int, to: int) -> None:
        """From now on the keys of the slot that are not there are asked for at the other node."""
        source = self.owner(slot)
        self.nodes[to].redis.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", self.id(source))
        self.nodes[source].redis.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", self.id(to))

    def end_move(self, slot: int) -> None:
        """Has a slot stay where it is."""
        for node in self.nodes:
            node.redis.execute_command("CLUSTER SETSLOT", slot, "STABLE")

    def id(self, number: int) -> str:
        return str(self.nodes[number].redis.execute_command("CLUSTER MYID").decode())

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


_CURVE = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
_chosen = random.Random()
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8  # those beside us choose others
_PORTS = (10_000 + 1500 * _worker, 11_500 + 1500 * _worker)  # and 10000 above still below those of outgoing connections


@pytest.fixture(scope="session")
def net_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def certificates(net_folder: Path) -> Certificates:
    return Certificates(net_folder)


@pytest.fixture(scope="module")
def port() -> Callable[[], int]:
    """port() finds one that nobody listens on."""
    return free_port


@pytest.fixture(scope="module")
def net_redis(net_folder: Path, eventually: Callable[..., Any]) -> Iterator[Callable[..., NetServer]]:
    """net_redis(*options, tls=(certificate, key), ca=file) starts one on loopback; all end with the module."""
    started: list[NetServer] = []

    def start(*options: object, **tls: Any) -> NetServer:
        started.append(NetServer(net_folder, *options, **tls))
        eventually(started[-1].answers, "redis-server answers")
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def tls_redis(net_redis: Callable[..., NetServer], certificates: Certificates) -> NetServer:
    return net_redis("--tls-auth-clients", "no", tls=certificates.signed("server"), ca=certificates.ca)


@pytest.fixture(scope="module")
def redis_cluster(net_folder: Path, certificates: Certificates, eventually: Callable[..., Any]) -> Iterator[NetCluster]:
    """A cluster that the tests of a module share."""
    cluster = NetCluster(net_folder, certificates, eventually)
    try:
        yield cluster.join()
    finally:
        cluster.kill()


@pytest.fixture(params=["memory", "disk", "disk-synced", "redis", "redis-keyed", "redis-tls", "redis-cluster"])
def backend(request: pytest.FixtureRequest) -> StorageBackend:
    """Every backend that keeps the contract, in the flavours that take other paths through the code."""
    name, _, flavour = request.param.partition("-")
    if name == "memory":
        return MemoryBackend()
    if name == "disk":
        return request.getfixturevalue("disk")(sync=flavour == "synced")
    if flavour in ("tls", "cluster"):  # servers that all tests share: each has a prefix of its own
        tls = flavour == "tls"
        url = request.getfixturevalue("tls_redis").tls_url if tls else request.getfixturevalue("redis_cluster").url
        return request.getfixturevalue("redis_tier")(url, prefix=f"test-{next(_numbers)}")
    server = request.getfixturevalue("redis_server")()
    key = b"k" * 32 if flavour == "keyed" else None
    return request.getfixturevalue("redis_tier")(server.url, integrity_key=key)
