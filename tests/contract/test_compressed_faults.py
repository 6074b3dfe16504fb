# SPDX-License-Identifier: Apache-2.0
"""Compressed objects that are damaged, forged, or not kept as the index believes."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from dataclasses import replace
from typing import Any

import pytest
import xxhash
import zstandard

from loracache.storage_backends import codec, header
from loracache.storage_backends.base import ALIGNMENT, Outcome, Transfer, padded
from loracache.storage_backends.codec import Encoded
from loracache.storage_backends.disk import manifest
from loracache.storage_backends.disk.backend import DiskBackend
from loracache.storage_backends.redis.backend import RedisBackend
from loracache.storage_backends.redis.commands import RETIRED_S, ObjectCommands

OK, MISS, CORRUPT, FULL = Outcome.OK, Outcome.MISS, Outcome.CORRUPT, Outcome.FULL
KEY = b"k" * 32
SIZE = (1 << 20) + 50_001  # two blocks
keyed = pytest.mark.parametrize("integrity_key", [None, KEY], ids=["unkeyed", "keyed"])


@pytest.fixture
def compressed(objects: Any) -> Transfer:
    made: Transfer = objects.keep(objects.new(SIZE, compressible=True), 2)
    return made


def stored(backend: Any, transfer: Transfer) -> int:
    (result,) = backend.store([transfer])
    assert result.outcome is OK
    return int(result.stored)


def spots(taken: int) -> list[int]:
    """Offsets all over the kept bytes: lengths of frames, frames' headers, blocks, ends."""
    return [0, 3, 7, 8, 9, 12, 13, 20, 1000, taken // 3, taken // 2, taken - 5, taken - 1]


# -- damage ------------------------------------------------------------------------------------------------------------


@keyed
def test_a_flipped_bit_anywhere_in_a_file_is_corrupt(
    disk: Any, objects: Any, folder: Any, compressed: Transfer, integrity_key: bytes | None
) -> None:
    backend = disk(integrity_key=integrity_key)
    taken = stored(backend, compressed)
    in_header = [0, 9, 20, 40, 130, 137, 144, 160, header.HEADER_BYTES - 1]
    for offset in in_header + [ALIGNMENT + spot for spot in spots(taken)]:
        assert stored(backend, compressed) == taken
        folder.flip(folder.file(compressed), offset)
        assert objects.load(backend, compressed) is CORRUPT, offset
        assert not folder.file(compressed).exists()
        assert objects.found(backend, compressed) is MISS


@pytest.mark.parametrize("length", [0, 100, 4096, 4100, 8192, 400_000])
def test_a_truncated_file_is_corrupt(disk: Any, objects: Any, folder: Any, compressed: Transfer, length: int) -> None:
    backend = disk()
    stored(backend, compressed)
    os.truncate(folder.file(compressed), length)
    assert objects.load(backend, compressed) is CORRUPT
    assert not folder.file(compressed).exists()


@keyed
def test_a_flipped_bit_anywhere_in_a_segment_is_corrupt(
    any_redis: Any, redis_tier: Any, objects: Any, compressed: Transfer, integrity_key: bytes | None
) -> None:
    backend: RedisBackend = redis_tier(any_redis.url, integrity_key=integrity_key)
    taken = stored(backend, compressed)
    for spot in spots(taken):
        stored(backend, compressed)
        segments = sorted(key for key in any_redis.all_keys() if key.count(b":") == 3)
        assert len(segments) == -(-taken // backend.segment_bytes)
        name, at = segments[spot // backend.segment_bytes], spot % backend.segment_bytes
        raw = any_redis.redis.get(name)
        any_redis.redis.set(name, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert objects.load(backend, compressed) is CORRUPT, spot
        assert any_redis.all_keys() == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_evicted_segment_is_a_miss_and_the_rest_goes(
    any_redis: Any, redis_tier: Any, objects: Any, compressed: Transfer, number: int
) -> None:
    backend = redis_tier(any_redis.url)
    stored(backend, compressed)
    any_redis.redis.delete(sorted(key for key in any_redis.all_keys() if key.count(b":") == 3)[number])
    assert objects.load(backend, compressed) is MISS
    assert any_redis.all_keys() == []


# -- forgery -----------------------------------------------------------------------------------------------------------


def forged(transfer: Transfer, kept: bytes, planes: int = 2, claimed: int = 0) -> bytes:
    """A file that says in all honesty that it holds `kept`."""
    stored = claimed or len(kept)
    shown = Encoded([memoryview(kept)], planes, stored, xxhash.xxh3_64_intdigest(kept))
    return header.pack(transfer.info, shown, None).ljust(ALIGNMENT, b"\0") + kept.ljust(padded(len(kept)), b"\0")


def bomb() -> bytes:
    frames = [zstandard.ZstdCompressor().compress(bytes(64 << 20))] * 2
    return struct.pack("<2I", *map(len, frames)) + b"".join(frames)


@pytest.mark.parametrize("claimed", [0, 1, SIZE - 1, SIZE, 1 << 62], ids=str)
@pytest.mark.parametrize("kept", [b"", b"not compressed", bomb()], ids=["nothing", "garbage", "bomb"])
def test_what_somebody_planted_is_corrupt(
    disk: Any, objects: Any, folder: Any, compressed: Transfer, kept: bytes, claimed: int
) -> None:
    backend = disk()
    for before in (0, 2):  # known to the index as it is, or compressed
        stored(backend, objects.keep(compressed, before))
        folder.file(compressed).write_bytes(forged(compressed, kept, 2 if kept or claimed else 0, claimed))
        assert objects.load(backend, compressed) is CORRUPT
        assert not folder.file(compressed).exists()


def test_another_payload_well_compressed_is_corrupt(disk: Any, objects: Any, folder: Any, compressed: Transfer) -> None:
    backend, target = disk(), memoryview(bytearray(SIZE))
    stored(backend, compressed)
    other = objects.new(SIZE, compressible=True)
    used = codec.encode([memoryview(objects.payload(other))], 2, target)
    folder.file(compressed).write_bytes(forged(compressed, bytes(target[:used])))
    (result,) = backend.load([objects.empty(compressed)])
    assert result.outcome is CORRUPT
    assert "payload has checksum" in result.detail


def test_nothing_of_another_object_gets_into_a_file(disk: Any, objects: Any, folder: Any) -> None:
    backend = disk()
    for size in (900_000, 100_003):
        transfer = objects.keep(objects.new(size, compressible=True), 2)
        taken = stored(backend, transfer)
        behind = folder.file(transfer).read_bytes()[ALIGNMENT + taken :]
        assert behind == bytes(len(behind))


@pytest.mark.parametrize("planes", [0, 2])
def test_what_the_index_knows_is_read_in_one_go(
    disk: Any, objects: Any, compressed: Transfer, monkeypatch: pytest.MonkeyPatch, planes: int
) -> None:
    backend, read, reads = disk(), os.preadv, []

    def note(fd: int, views: list[memoryview], offset: int) -> int:
        reads.append(offset)
        return read(fd, views, offset)

    stored(backend, objects.keep(compressed, planes))
    monkeypatch.setattr("os.preadv", note)
    assert objects.holds(backend, compressed)
    assert reads == [0]


def test_nothing_is_decompressed_before_its_mac_is_checked(
    disk: Any, objects: Any, folder: Any, compressed: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: DiskBackend = disk(integrity_key=KEY)
    stored(backend, compressed)
    folder.file(compressed).write_bytes(forged(compressed, bomb()))

    def refuse(*_: object) -> None:
        raise AssertionError("decompressed")

    monkeypatch.setattr(codec, "decode", refuse)
    (result,) = backend.load([objects.empty(compressed)])
    assert result.outcome is Outcome.UNPROVEN  # and left alone
    assert "MAC" in result.detail


def test_the_mac_covers_how_an_object_is_kept(disk: Any, objects: Any, folder: Any, compressed: Transfer) -> None:
    """An attacker who mends checksum and CRC cannot have the same bytes decoded another way."""
    backend: DiskBackend = disk(integrity_key=KEY)
    taken = stored(backend, compressed)
    whole = folder.file(compressed).read_bytes()
    found = header.unpack(whole)
    shown = Encoded([], 4, taken, found.stored_checksum)
    fields = header.pack(compressed.info, shown, None)[: -header.MAC_BYTES - 4] + found.mac
    folder.file(compressed).write_bytes(fields + zlib.crc32(fields).to_bytes(4, "little") + whole[len(fields) + 4 :])
    (result,) = backend.load([objects.empty(compressed)])
    assert "MAC" in result.detail


# -- an index that is behind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("believed", "true"), [(0, 2), (2, 0), (2, 8)])
def test_the_header_says_how_an_object_is_kept_and_not_the_index(
    disk: Any, objects: Any, folder: Any, tmp_path: Any, compressed: Transfer, believed: int, true: int
) -> None:
    backend, other = disk(), disk(tmp_path / "other")
    stored(backend, objects.keep(compressed, believed))
    taken = stored(other, objects.keep(compressed, true))
    os.replace(folder.at(other.path).file(compressed), folder.file(compressed))
    assert objects.holds(backend, compressed)
    assert objects.holds(backend, compressed)
    list(backend.scan())
    found = backend.contains([compressed.info.key])[0].info
    assert bool(found.stored) is bool(taken)
    assert backend.footprint(found.stored or SIZE) == folder.file(compressed).stat().st_size
    assert objects.holds(backend, compressed)


@pytest.mark.parametrize("lost", [False, True], ids=["manifest", "headers"])
def test_a_restart_knows_how_objects_are_kept(disk: Any, objects: Any, folder: Any, lost: bool) -> None:
    backend = disk()
    made = [objects.keep(objects.new(90_000, compressible=True), planes) for planes in (0, 2, 4)]
    infos = {replace(each.info, stored=stored(backend, each)) for each in made}
    backend.close()
    if lost:
        folder.manifest.unlink()
    again = disk()
    assert set(again.scan()) == infos
    assert all(objects.holds(again, each) for each in made)
    assert {result.info for result in again.contains([each.info.key for each in made])} == infos


def test_a_crash_between_rename_and_record_leaves_the_object(
    disk: Any, objects: Any, compressed: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = disk()
    stored(backend, objects.keep(compressed, 0))
    with monkeypatch.context() as patch:
        patch.setattr(manifest.Manifest, "flush", lambda self: None)
        taken = stored(backend, compressed)
        backend.close()
    again = disk()
    assert objects.holds(again, compressed)
    *_, last = again.scan()  # first what the manifest believed, then what the file says
    assert last == replace(compressed.info, stored=taken)
    assert objects.holds(again, compressed)


def test_a_full_disk_keeps_the_object_as_it_was(
    disk: Any, objects: Any, folder: Any, compressed: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = disk()
    taken = stored(backend, compressed)

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.pwritev", refuse)
        assert backend.store([objects.keep(compressed, 0)])[0].outcome is FULL
    assert backend.contains([compressed.info.key])[0].info.stored == taken
    assert objects.holds(backend, compressed)
    assert folder.files() == [compressed.info.key.hex()]


# -- Redis -------------------------------------------------------------------------------------------------------------


def lifetimes(any_redis: Any) -> dict[str, bool]:
    """Whether each key expires, by what is behind the object's name."""
    return {key.decode().partition("}")[2]: any_redis.redis.ttl(key) > 0 for key in any_redis.all_keys()}


def test_segments_of_the_other_kind_expire_when_their_header_is_replaced(
    any_redis: Any, redis_tier: Any, objects: Any
) -> None:
    backend = redis_tier(any_redis.url)
    plain = objects.new(600_000, compressible=True)
    small = objects.keep(plain, 2)
    stored(backend, plain)
    assert lifetimes(any_redis) == {"": False, ":0": False, ":1": False, ":2": False}
    stored(backend, small)
    after = lifetimes(any_redis)
    compressed = [name for name in after if name.count(":") == 2]
    assert len(compressed) == 2
    assert [name for name, expires in after.items() if expires] == [
        name for name in after if name in (":0", ":1", ":2")
    ]
    assert max(any_redis.redis.ttl(key) for key in any_redis.all_keys()) <= RETIRED_S
    stored(backend, small)
    assert lifetimes(any_redis) == after
    stored(backend, plain)
    assert {name for name, expires in lifetimes(any_redis).items() if expires} == set(compressed)
    backend.delete([plain.info.key])
    assert set(lifetimes(any_redis)) == set(compressed)


def test_who_found_the_old_header_still_reads_the_old_segments(
    any_redis: Any, redis_tier: Any, objects: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = redis_tier(any_redis.url), redis_tier(any_redis.url)
    transfer = objects.new(600_000, compressible=True)
    ask = ObjectCommands.ask
    for before, after in [(0, 2), (2, 4), (4, 0)]:
        stored(writer, objects.keep(transfer, before))
        changed = objects.keep(transfer, after)

        def ask_then_change(self: ObjectCommands, wire: Any, keys: Any, changed: Transfer = changed) -> Any:
            answer = ask(self, wire, keys)
            stored(writer, changed)
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(ObjectCommands, "ask", ask_then_change)
            assert objects.holds(reader, transfer)
        assert objects.holds(reader, transfer)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_full_redis_keeps_the_object_as_it_was(
    any_redis: Any, redis_tier: Any, objects: Any, before: int, after: int
) -> None:
    backend = redis_tier(any_redis.url)
    transfer = objects.new(8 << 20, compressible=True)
    taken = stored(backend, objects.keep(transfer, before))
    names = set(any_redis.all_keys())
    any_redis.leave_room(1 << 20)
    (result,) = backend.store([objects.keep(transfer, after)])
    assert result.outcome is FULL
    assert set(any_redis.all_keys()) == names
    assert backend.contains([transfer.info.key])[0].info.stored == taken
    assert objects.holds(backend, transfer)
