# SPDX-License-Identifier: Apache-2.0
"""What the contract tests share: objects in aligned buffers, and every backend under one name."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import mmap
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from loracache.storage_backends.base import ALIGNMENT, Kind, ObjectInfo, Outcome, StorageBackend, Transfer, padded
from loracache.storage_backends.disk.backend import DiskBackend
from loracache.storage_backends.memory import MemoryBackend
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.storage_backends.redis.names import RedisNames

SEGMENT = 256 << 10  # small, so that objects of a test have several
_numbers = itertools.count()
_NIBBLES = bytes(byte & 15 for byte in range(256))


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


net_servers = _load(Path(__file__).parent / "net_servers.py")
_power_cut = _load(Path(__file__).parent / "power_cut.py")


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

    def new(self, size: int, *, compressible: bool = False, **options: Any) -> Transfer:
        """An object of `size` bytes; what lies behind them in its buffers is noise.

        compressible: its bytes repeat themselves by half, with 1, 2, 4 and 8 planes, and no two runs of them are alike.
        """
        noise = self._random.randbytes(padded(size))
        return self.of(noise[:size].translate(_NIBBLES) if compressible else noise[:size], noise[size:], **options)

    def keep(self, of: Transfer, planes: int) -> Transfer:
        """The same object, to be stored in so many planes."""
        return replace(of, planes=planes)

    def of(
        self,
        payload: bytes,
        behind: bytes = b"",
        *,
        parent: bytes = b"",
        pieces: int = 1,
        key: bytes | None = None,
    ) -> Transfer:
        """An object with this payload."""
        size = len(payload)
        content = (payload + behind).ljust(padded(size), b"\0")
        views = buffers(size, pieces)
        start = 0
        for view in views:
            view[:] = content[start : start + view.nbytes]
            start += view.nbytes
        checksum = xxhash.xxh3_64_intdigest(payload)
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
def power_cut() -> Any:
    """`Recorder` and `looked` of power_cut.py."""
    return _power_cut


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


@pytest.fixture(scope="session")
def net_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def certificates(net_folder: Path) -> Any:
    return net_servers.Certificates(net_folder)


@pytest.fixture(scope="module")
def port() -> Callable[[], int]:
    """port() finds one that nobody listens on."""
    free: Callable[[], int] = net_servers.free_port
    return free


@pytest.fixture(scope="module")
def net_redis(net_folder: Path, eventually: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """net_redis(*options, tls=(certificate, key), ca=file) starts one on loopback; all end with the module."""
    started: list[Any] = []

    def start(*options: object, **tls: Any) -> Any:
        started.append(net_servers.NetServer(net_folder, *options, **tls))
        eventually(started[-1].answers, "redis-server answers")
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def tls_redis(net_redis: Callable[..., Any], certificates: Any) -> Any:
    return net_redis("--tls-auth-clients", "no", tls=certificates.signed("server"), ca=certificates.ca)


@pytest.fixture(scope="module")
def redis_cluster(net_folder: Path, certificates: Any, eventually: Callable[..., Any]) -> Iterator[Any]:
    """A cluster that the tests of a module share."""
    cluster = net_servers.NetCluster(net_folder, certificates, eventually)
    try:
        yield cluster.join()
    finally:
        cluster.kill()


@pytest.fixture
def names_at() -> Iterator[Callable[..., RedisNames]]:
    """names_at(url, **options) makes one; all are closed at the end."""
    opened: list[RedisNames] = []

    def make(url: str, **options: Any) -> RedisNames:
        opened.append(RedisNames(url, **{"timeout_s": 10.0} | options))
        return opened[-1]

    yield make
    for names in opened:
        names.close()


@pytest.fixture(params=["unix", "tls", "cluster"])
def any_redis(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A Redis with nothing in it, reached in every way that takes another path through the code."""
    if request.param == "unix":
        server = request.getfixturevalue("redis_server")()
        found = net_servers.Content(server.url, [server.redis])
    elif request.param == "tls":
        server = request.getfixturevalue("tls_redis")
        found = net_servers.Content(server.tls_url, [server.redis])
    else:
        cluster = request.getfixturevalue("redis_cluster")
        found = net_servers.Content(cluster.tls_url, [node.redis for node in cluster.nodes])
    with found:
        yield found


@pytest.fixture(
    params=["memory", "disk", "disk-synced", "disk-keyed", "redis", "redis-keyed", "redis-tls", "redis-cluster"]
)
def backend(request: pytest.FixtureRequest) -> Any:
    """Every backend that keeps the contract, in the flavours that take other paths through the code."""
    name, _, flavour = request.param.partition("-")
    key = b"k" * 32 if flavour == "keyed" else None
    if name == "memory":
        return MemoryBackend()
    if name == "disk":
        return request.getfixturevalue("disk")(sync=flavour == "synced", integrity_key=key)
    if flavour in ("tls", "cluster"):  # servers that all tests share: each has a prefix of its own
        tls = flavour == "tls"
        url = request.getfixturevalue("tls_redis").tls_url if tls else request.getfixturevalue("redis_cluster").url
        return request.getfixturevalue("redis_tier")(url, prefix=f"test-{next(_numbers)}")
    server = request.getfixturevalue("redis_server")()
    return request.getfixturevalue("redis_tier")(server.url, integrity_key=key)
