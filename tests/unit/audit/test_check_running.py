# SPDX-License-Identifier: Apache-2.0
"""`loracache check` on a running daemon: its index beside what it keeps, while clients use it."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loracache import CacheClient, Namespace, Selection, chunk_keys
from loracache.cli.app import app
from loracache.client.control import ControlCalls
from loracache.errors import Rejected, Unknown
from loracache.storage_backends import header
from loracache.storage_backends.base import Kind, ObjectInfo, padded
from loracache.storage_backends.codec import Encoded

CHUNK, SIZE = 4, 9000
Damage = Callable[[Any], object]


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def other_object(kept: Any) -> None:
    """A whole object under the key of one that has other bytes."""
    path = kept.file(kept.chains[0][3])
    info = header.unpack(path.read_bytes()).info
    payload = bytes(padded(info.size))
    view = memoryview(payload)[: info.size]
    made = header.pack(replace(info, checksum=header.payload_checksum([view])), Encoded([view]), None)
    path.write_bytes(made.ljust(4096, b"\0") + payload)


def stray(kept: Any, key: bytes = bytes(32), parent: bytes = b"") -> None:
    """A file as a daemon would write it, of an object that this one does not have."""
    payload = memoryview(bytes(4096))
    info = ObjectInfo(key, parent, Kind.KV, kept.space, 4096, header.payload_checksum([payload]))
    kept.file(key).write_bytes(header.pack(info, Encoded([payload]), None).ljust(4096, b"\0") + payload)


def newer(kept: Any) -> None:
    """An object of a newer release, which the daemon does not name, and one that depends on it."""
    stray(kept)
    raw = bytearray(kept.file(bytes(32)).read_bytes())
    raw[8] = 9
    kept.file(bytes(32)).write_bytes(raw)
    stray(kept, b"\0" * 31 + b"\1", bytes(32))


# what is done to a folder in use, the faults seen, and whether a fix mends them
BROKEN: dict[str, tuple[Damage, dict[tuple[str, str], int], bool]] = {
    "lost": (lambda kept: kept.file(kept.chains[0][3]).unlink(), {("index", "missing"): 1}, True),
    "payload": (lambda kept: flip(kept.file(kept.chains[0][3]), 5000), {("disk", "damaged"): 1}, True),
    "compressed": (lambda kept: flip(kept.file(kept.chains[1][3]), 4200), {("disk", "damaged"): 1}, True),
    "header": (lambda kept: flip(kept.file(kept.chains[0][3]), 20), {("disk", "damaged"): 1}, True),
    "truncated": (lambda kept: os.truncate(kept.file(kept.chains[0][3]), 5000), {("disk", "damaged"): 1}, True),
    "other bytes": (
        other_object,
        {("index and disk", "contradiction"): 1, ("disk", "manifest"): 1},
        True,
    ),
    "stray": (stray, {("disk", "unindexed"): 1, ("disk", "manifest"): 1}, False),
    "newer": (newer, {("disk", "other_version"): 1, ("disk", "manifest"): 1}, False),
    "foreign": (
        lambda kept: [path.write_bytes(b"x") for path in (kept.path / "notes", kept.path / "objects" / "notes")],
        {("disk", "foreign"): 2},
        False,
    ),
    "manifest cut": (lambda kept: os.truncate(kept.path / "manifest", 200), {("disk", "manifest"): 13}, False),
    "manifest lost": (lambda kept: (kept.path / "manifest").unlink(), {("disk", "manifest"): 1}, False),
    "manifest overwritten": (
        lambda kept: (kept.path / "manifest").write_bytes(b"x"),
        {("disk", "manifest"): 1},
        False,
    ),
    "descriptors": (lambda kept: shutil.rmtree(kept.path / "namespaces"), {("disk", "undescribed"): 12}, False),
    "record of a name": (
        lambda kept: (kept.path / "adapters" / f"{'0' * 64}.json").write_bytes(b'["{}", ""]'),
        {("disk", "damaged"): 1},
        False,
    ),
}


@pytest.fixture
def running(kept: Any, daemon: Callable[..., Any], eventually: Callable[..., Any]) -> Any:
    """A daemon that uses the folder `kept`, and has read it."""
    started = daemon(disk_path=kept.path)
    eventually(lambda: started.status()["tiers"]["disk"]["scanned"])
    kept.space = header.unpack(kept.file(kept.chains[0][0]).read_bytes()).info.namespace
    return started


def test_a_daemon_and_what_it_keeps_fit(kept: Any, running: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"checked": {"disk": 13, "index": 13}, "left": 0, "findings": []}
    assert check(kept) == (0, whole)  # the folder says whose it is
    assert check(kept, "--socket", str(running.socket), disk=False) == (0, whole)
    assert check(kept, "--socket", str(running.socket), "--fix") == (0, whole)
    monkeypatch.setenv("LORACACHE_SOCKET", str(running.socket))
    assert check(kept, disk=False) == (0, whole)


@pytest.mark.parametrize("case", BROKEN)
def test_a_fault_is_seen_and_mended_where_that_is_safe(
    case: str, kept: Any, running: Any, check: Any, faults: Any
) -> None:
    damage, expected, mends = BROKEN[case]
    damage(kept)
    for _ in range(2):  # looking changes nothing
        code, said = check(kept)
        assert (code, faults(said)) == (1, expected)
        assert said["left"] == sum(expected.values())
    before = set(kept.objects())
    code, said = check(kept, "--fix")
    assert faults(said) == expected
    fixed = {(each["place"], each["fault"]): each["fixed"] for each in said["findings"]}
    assert {place for place, count in fixed.items() if count} == ({next(iter(expected))} if mends else set())
    after = check(kept)
    assert after[0] == (0 if mends else 1)
    assert faults(after[1]) == ({} if mends else expected)
    if mends:
        chain = kept.chains[1 if case == "compressed" else 0]
        assert running.client().lookup(chain).hits == 3
    else:
        assert set(kept.objects()) == before
    assert running.process.poll() is None


def test_what_depends_on_an_object_that_is_dropped_goes_too(kept: Any, running: Any, check: Any, faults: Any) -> None:
    kept.file(kept.chains[0][1]).unlink()
    code, said = check(kept, "--fix")
    assert (code, faults(said), said["left"]) == (0, {("index", "missing"): 1}, 0)
    assert running.client().lookup(kept.chains[0]).hits == 1
    assert not any(kept.file(key).exists() for key in kept.chains[0][1:])
    assert check(kept)[0] == 0


def test_what_is_pinned_is_left_and_told(kept: Any, running: Any, check: Any, faults: Any) -> None:
    running.client().pin([kept.chains[0][3]], tier="disk")
    kept.file(kept.chains[0][3]).unlink()
    code, said = check(kept, "--fix")
    assert (code, faults(said), said["left"]) == (1, {("index", "missing"): 1}, 1)


def test_the_books_of_the_index_are_told(
    kept: Any, running: Any, check: Any, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ControlCalls.check_index

    def wrong(client: Any) -> dict[str, Any]:
        said = told(client)
        assert said["faults"] == 0
        said["counts"]["disk"][1] += 5
        said["used"]["cpu"][0] += 4096
        return said | {"faults": 2, "examples": [[bytes(32), "held nowhere"], [os.urandom(32), "only once"]]}

    monkeypatch.setattr(ControlCalls, "check_index", wrong)
    code, said = check(kept, "--fix")
    assert (code, faults(said), said["left"]) == (1, {("index", "state"): 1, ("index", "count"): 2}, 3)
    assert [each["examples"] for each in said["findings"]] == [
        [f"{bytes(32).hex()}: held nowhere"],
        ["disk: the books are off by +0 objects, +5 bytes", "cpu: bytes in use are off by +4096"],
    ]


def test_a_redis_that_says_otherwise_than_the_index_is_told(
    filled: Any, server: Any, check: Any, faults: Any, daemon: Any, eventually: Any
) -> None:
    started = daemon(disk_path=filled.path, redis=filled.url)
    eventually(lambda: started.status()["tiers"]["disk"]["scanned"])
    assert check(filled) == (0, {"checked": {"redis": 13, "disk": 13, "index": 13}, "left": 0, "findings": []})
    one, other = filled.chains[0][:2]
    names = [f"loracache:{{{key.hex()}}}" for key in (one, other)]
    payload = server.get(f"{names[1]}:0")
    first, second = (header.unpack(server.get(name)) for name in names)
    info = replace(second.info, key=one, parent=first.info.parent)
    server.set(names[0], header.pack(info, Encoded([memoryview(payload)]), None, segment_bytes=first.segment_bytes))
    server.set(f"{names[0]}:0", payload)
    server.delete(f"loracache:{{{filled.chains[0][3].hex()}}}:0")
    expected = {("index and redis", "contradiction"): 1, ("redis", "incomplete"): 1}
    code, said = check(filled, "--fix")
    assert (code, faults(said), said["left"]) == (1, expected, 1)


def test_people_get_a_table_and_are_told_what_was_not_looked_at(
    kept: Any, daemon: Any, redis_server: Callable[[], Any]
) -> None:
    started = daemon(disk_path=kept.path, redis=redis_server().url)
    done = CliRunner().invoke(app, ["check", "--socket", str(started.socket)], prog_name="loracache")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == ["disk: 13 objects are whole", "index: 13 objects are named", "faults left: 0"]
    assert done.stderr == "loracache: the daemon's Redis was not looked at; give --redis, or --config with it\n"


def test_what_does_not_go_with_the_daemon_is_wrong_usage(
    kept: Any, running: Any, check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["--socket", str(running.socket)]
    (tmp_path / "other").mkdir()
    code, said = check(kept, *own, "--disk-path", str(tmp_path / "other"), disk=False)
    assert code == 2
    assert "is not that of the daemon" in said["error"]
    monkeypatch.setenv("LORACACHE_INTEGRITY_KEY", "0123456789abcdef")
    code, said = check(kept, *own)
    assert code == 2
    assert "has no integrity_key" in said["error"]
    code, said = check(kept, "--socket", str(tmp_path / "nobody"), disk=False)
    assert code == 1


def _use(url: str, seed: int, stop: threading.Event, failed: list[BaseException]) -> None:
    """Store chains, read them, compress, evict and flush until told to stop."""
    numbers = random.Random(seed)
    try:
        with CacheClient(url, timeout=60) as client:
            root = client.register(Namespace("ab" * 32, "bfloat16", "bytes", CHUNK, salt=f"{seed:064x}"), ["model"])
            chains: list[list[bytes]] = []
            while not stop.is_set():
                match numbers.randrange(7):
                    case 0 | 1 | 2:
                        _store(client, root, chains, numbers)
                    case 3 if chains:
                        client.lookup(numbers.choice(chains))
                        client.get(numbers.choice(chains)[0])
                    case 4 if chains:
                        client.evict(numbers.choice(chains)[numbers.randrange(4) :], tiers=("disk", "redis"))
                    case 5 if chains:
                        verb = numbers.choice([client.compress, client.decompress])
                        verb(Selection(keys=numbers.choice(chains)), tier="disk")
                    case 6:
                        client.flush()
    except BaseException as error:  # noqa: BLE001 - the test looks at it
        failed.append(error)


def _store(client: CacheClient, root: bytes, chains: list[list[bytes]], numbers: random.Random) -> None:
    start = numbers.randrange(40) * 100  # often one that was stored and evicted before
    keys = chunk_keys(root, range(start, start + 4 * CHUNK), CHUNK)
    with client.reserve(root, keys, [SIZE] * 4) as reservation:
        for position, slot in enumerate(reservation.slots):
            if slot is not None:
                reservation.write(position, numbers.randbytes(SIZE // 2) + bytes(SIZE - SIZE // 2))
    chains.append(keys)


@pytest.fixture
def busy(daemon: Callable[..., Any], redis_server: Callable[[], Any], tmp_path: Path) -> Iterator[Any]:
    """A daemon with little room, its Redis, and clients that use it meanwhile."""
    server = redis_server()
    started = daemon(disk_path=tmp_path / "busy", memory="4MiB", page_size="4KiB", disk="2MiB", redis=server.url)
    stop = threading.Event()
    failed: list[BaseException] = []
    users = [threading.Thread(target=_use, args=(started.url, seed, stop, failed)) for seed in range(3)]
    for user in users:
        user.start()
    started.redis_url = server.url
    yield started
    stop.set()
    for user in users:
        user.join(60)
    assert [error for error in failed if not isinstance(error, Rejected | Unknown)] == []


def test_a_busy_daemon_yields_no_false_finding(busy: Any, check: Any, tmp_path: Path) -> None:
    class Used:
        path, url = tmp_path / "busy", busy.redis_url

    changed = busy.status()["counters"]
    for _ in range(6):
        code, said = check(Used)
        assert (code, said["findings"]) == (0, [])
    now = busy.status()["counters"]
    assert now["store.objects"] > changed.get("store.objects", 0) + 100
    assert sum(now[name] for name in now if name.startswith("evict.disk.")) > 100
    assert not [name for name in now if name.startswith("failure.")]
