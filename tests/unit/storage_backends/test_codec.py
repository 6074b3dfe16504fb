# SPDX-License-Identifier: Apache-2.0
"""Byte planes and zstd: every byte comes back, and nothing that claims to be compressed is trusted."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from loracache.storage_backends import codec
from loracache.storage_backends.codec import CodecError

MIB = 1 << 20
BLOCK = 1024  # zstd's smallest window, so that small objects have several blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "BLOCK_BYTES", BLOCK)


def cut(content: bytes, ends: list[int]) -> list[memoryview]:
    """`content` in writable pieces that end where told."""
    edges = sorted({0, len(content), *(end for end in ends if end < len(content))})
    return [memoryview(bytearray(content[start:end])) for start, end in itertools.pairwise(edges)]


def encoded(content: bytes, planes: int, ends: list[int] | None = None) -> bytes:
    target = memoryview(bytearray(2 * len(content) + 1000))
    return bytes(target[: codec.encode(cut(content, ends or []), planes, target)])


def decoded(kept: bytes, planes: int, size: int, ends: list[int] | None = None) -> bytes:
    target = cut(bytes(size), ends or [])
    codec.decode(memoryview(kept), planes, target)
    return b"".join(target)


def numbers(count: int) -> bytes:
    """Normal float32 numbers."""
    return np.random.default_rng(1).standard_normal(count).astype(np.float32).tobytes()


PLANES = st.sampled_from(codec.PLANES)
ENDS = st.lists(st.integers(1, 5000), max_size=6)
# Texts that repeat themselves, so that frames have literals, matches and raw blocks.
CONTENT = st.builds(
    lambda seed, times, tail: seed * times + tail, st.binary(max_size=400), st.integers(0, 12), st.binary(max_size=300)
)


@given(content=CONTENT, planes=PLANES, ends=ENDS, other=ENDS)
def check_round_trip(content: bytes, planes: int, ends: list[int], other: list[int]) -> None:
    kept = encoded(content, planes, ends)
    assert kept == encoded(content, planes)
    assert decoded(kept, planes, len(content), other) == content


def test_what_is_encoded_is_decoded_however_the_buffers_are_cut(small_blocks: None) -> None:
    check_round_trip()


@pytest.mark.parametrize("planes", codec.PLANES)
@pytest.mark.parametrize("size", [1, 7, 4095, MIB - 1, MIB, MIB + 3, 3 * MIB + 5])
def test_sizes_around_a_block_and_of_no_whole_elements(planes: int, size: int) -> None:
    content = numbers(MIB)[:size]
    assert decoded(encoded(content, planes, [5, MIB - 9]), planes, size, [77, MIB + 1]) == content


def test_planes_are_lowest_byte_first_and_the_rest_comes_last(small_blocks: None) -> None:
    """The format, which other versions have to read."""
    kept = encoded(bytes([1, 2, 3, 4, 5, 6, 7]), 2)
    (frame_bytes,) = struct.unpack_from("<I", kept)
    assert frame_bytes == len(kept) - 4
    assert zstandard.ZstdDecompressor().decompress(kept[4:]) == bytes([1, 3, 5, 2, 4, 6, 7])


def test_planes_of_the_elements_width_make_numbers_smaller() -> None:
    content = numbers(MIB // 4)
    sizes = {planes: len(encoded(content, planes)) for planes in codec.PLANES}
    assert sizes[4] < sizes[2] < sizes[1] < MIB
    assert sizes[4] < 0.86 * MIB


@pytest.mark.parametrize("room", [0, 3, 4, 100])
def test_what_does_not_fit_is_not_encoded(room: int) -> None:
    content = random.Random(1).randbytes(2 * MIB)
    needed = len(encoded(content, 2))
    assert needed > len(content)
    target = memoryview(bytearray(needed))
    assert codec.encode([memoryview(content)], 2, target[:room]) == 0
    assert codec.encode([memoryview(content)], 2, target[:-1]) == 0
    assert codec.encode([memoryview(content)], 2, target) == needed
    assert codec.encode([], 2, target) == 0


@pytest.mark.parametrize("planes", [0, -1, 3, 16])
def test_planes_that_are_none_are_refused(planes: int) -> None:
    with pytest.raises(ValueError, match=f"planes is {planes}"):
        codec.encode([memoryview(b"abc")], planes, memoryview(bytearray(10)))
    with pytest.raises(ValueError, match=f"planes is {planes}"):
        codec.decode(memoryview(b"abc"), planes, [memoryview(bytearray(10))])


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4)


@given(content=CONTENT, planes=PLANES, changes=CHANGES, shift=st.integers(-20, 20))
def check_damage(content: bytes, planes: int, changes: list[tuple[int, int]], shift: int) -> None:
    """Damage is a CodecError, or other bytes, which the payload's checksum finds; never another error."""
    kept = bytearray(encoded(content, planes))
    for at, byte in changes:
        if kept:
            kept[at % len(kept)] = byte
    mended = bytes(kept[: len(kept) + shift] if shift <= 0 else kept + bytes(shift))
    with contextlib.suppress(CodecError):
        assert len(decoded(mended, planes, len(content))) == len(content)


def test_damaged_bytes_raise_a_codec_error_and_nothing_else(small_blocks: None) -> None:
    check_damage()


@given(junk=st.binary(max_size=200), size=st.integers(0, 3000), planes=PLANES)
def check_junk(junk: bytes, size: int, planes: int) -> None:
    if junk or size:
        with pytest.raises(CodecError):
            decoded(junk, planes, size)


def test_bytes_that_are_none_of_ours_raise_a_codec_error(small_blocks: None) -> None:
    check_junk()


def blocks(*frames: bytes) -> bytes:
    return b"".join([struct.pack(f"<{len(frames)}I", *map(len, frames)), *frames])


def frame(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)  # type: ignore[arg-type]


def malformed() -> Iterator[tuple[str, bytes]]:
    half, whole = frame(b"a" * (BLOCK // 2)), frame(b"a" * BLOCK)
    yield "a frame for half of the block", blocks(half, whole)
    yield "two frames for one block", blocks(half + half, whole)
    yield "a frame for more than the block", blocks(whole, frame(b"a" * (BLOCK + 1)))
    yield "a frame that does not say its size", blocks(frame(b"a" * BLOCK, write_content_size=False), whole)
    yield "an empty frame", blocks(b"", whole)
    yield "a frame of nothing", blocks(frame(b""), whole)
    yield "a skippable frame", blocks(struct.pack("<II", 0x184D2A50, 4) + b"abcd", whole)
    yield "something behind a frame", blocks(whole + b"x", whole)
    yield "a frame without its end", blocks(whole[:-1], whole)
    yield "something behind the frames", blocks(whole, whole) + b"x"
    yield "too few frames", blocks(whole)
    yield "too many frames", blocks(whole, whole, whole)
    yield "lengths that overlap", struct.pack("<2I", 2 * len(whole), 2 * len(whole)) + whole + whole
    yield "a length beyond the end", struct.pack("<2I", 0xFFFFFFFF, len(whole)) + whole + whole


@pytest.mark.parametrize(("what", "kept"), list(malformed()), ids=[what for what, _ in malformed()])
def test_what_no_encoder_writes_is_refused(small_blocks: None, what: str, kept: bytes) -> None:
    with pytest.raises(CodecError):
        decoded(kept, 1, 2 * BLOCK)


def test_a_well_formed_object_of_two_blocks_is_accepted(small_blocks: None) -> None:
    """What the malformed ones differ from."""
    assert decoded(blocks(frame(b"a" * BLOCK), frame(b"b" * BLOCK)), 1, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK


@pytest.mark.parametrize("says_its_size", [True, False])
def test_a_frame_that_inflates_to_much_more_takes_no_memory(says_its_size: bool) -> None:
    bomb = blocks(frame(bytes(256 * MIB), write_content_size=says_its_size))
    target = memoryview(bytearray(1000))
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            codec.decode(memoryview(bomb), 1, [target])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MIB


def test_a_large_object_needs_scratch_for_some_blocks_only() -> None:
    size = 32 * MIB
    content, target, back = memoryview(bytearray(size)), memoryview(bytearray(size)), memoryview(bytearray(size))
    tracemalloc.start()
    try:
        used = codec.encode([content], 2, target)
        codec.decode(target[:used], 2, [back])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB
