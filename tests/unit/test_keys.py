# SPDX-License-Identifier: Apache-2.0
"""Keys: two machines agree on every one, for ever, and nothing that tells two objects apart is left out."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracache.errors import UsageError
from loracache.groups import Group, Need
from loracache.keys import KEY_BYTES, Media, Namespace, checksum, chunk_keys, object_key, salt_digest, token_array

NAMESPACE = Namespace("org/model@1a2b", "bfloat16", "BHND:16x8x128", 16)
ROOT = bytes(range(32))
IMAGE = Media("bild\u00e9", 30, 4)

# What was stored yesterday and on other machines is found under these: a change here empties every cache there is.
GOLDEN = {
    "namespace": "7c757f052f621594c9ea57c4d25d3e2aeb1e315724d5230fa92a220cb5b5bbe9",
    "tenant": "30eb1ba89f0f3e4b88f10b09640be5b7590aeef45f82c6e4e19e6d84c5e3f396",
    "salt": "8b56bbdb2288ebc2016c8038dba31ca79af78aa13501a5204139bf93970cb592",
    "chain": "f16e4edb031447ea793edb3058fda698dfafdef4807df9a00665075bcf463012",
    "media": "165ac5f102c1009e3bc16f43ed7705a6d711559c7a55460f360ee00e533cb0a7",
    "extremes": "36ea9bf1960185f2c220e03f2fdc4476c09b751c409c1facb34f99a2eb13a43e",
    "object": "d7f66f1ba396cbffd3cf3280bd83085dc711581754c53aa19bd40527cda458c0",
    "checksum": "c17ce6a7a0d6a7d9",
}


def computed() -> dict[str, str]:
    values = {
        "namespace": NAMESPACE.digest(),
        "tenant": replace(NAMESPACE, adapter="ab" * 32, salt=salt_digest("tenant")).digest(),
        "salt": bytes.fromhex(salt_digest("tenant")),
        "chain": chunk_keys(ROOT, range(40), 16)[-1],
        "media": chunk_keys(ROOT, [7] * 32, 16, start=16, media=[IMAGE])[-1],
        "extremes": chunk_keys(ROOT, [-1, 2**31 - 1, -(2**31), 0], 4)[0],
        "object": object_key(ROOT, "l0-15/h0-7"),
        "checksum": checksum([b"LoRA", b"Cache"]).to_bytes(8, "big"),
    }
    return {name: value.hex() for name, value in values.items()}


def test_keys_are_the_same_for_ever() -> None:
    assert computed() == GOLDEN


@pytest.mark.parametrize("seed", ["0", "4711"])
def test_keys_do_not_depend_on_the_process_hash_seed(seed: str) -> None:
    script = f"import sys, json; sys.path[:] = {sys.path!r}\n" + (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('keys_here', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(json.dumps(module.computed()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == GOLDEN


def test_chunk_key_is_sha256_of_parent_and_little_endian_tokens() -> None:
    parent = NAMESPACE.digest()
    expected = []
    for at in (0, 4):
        parent = hashlib.sha256(parent + struct.pack("<4i", *range(at, at + 4))).digest()
        expected.append(parent)
    assert chunk_keys(NAMESPACE.digest(), range(11), 4) == expected  # the tail of 3 has no key


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=60), st.integers(1, 20), st.integers(0, 60))
def test_a_chain_computed_in_two_parts_is_the_same_chain(tokens: list[int], width: int, at: int) -> None:
    whole = chunk_keys(ROOT, tokens, width)
    assert len(whole) == len(tokens) // width
    split = min(at // width, len(whole))
    head = chunk_keys(ROOT, tokens[: split * width], width)
    tail = chunk_keys(head[-1] if head else ROOT, tokens[split * width :], width, start=split * width)
    assert head + tail == whole


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=8, max_size=8), st.integers(0, 7), st.integers(1, 2**31))
def test_another_token_changes_its_chunk_and_all_after_it(tokens: list[int], at: int, by: int) -> None:
    other = list(tokens)
    other[at] = (tokens[at] + by + 2**31) % 2**32 - 2**31
    for number, (one, two) in enumerate(zip(chunk_keys(ROOT, tokens, 2), chunk_keys(ROOT, other, 2), strict=True)):
        assert (one == two) == (number < at // 2)


def test_a_list_an_array_and_wider_integers_give_the_same_keys() -> None:
    tokens = [0, 5, 2**31 - 1, -(2**31)]
    keys = chunk_keys(ROOT, tokens, 2)
    for dtype in ("<i4", ">i4", "<i8"):
        assert chunk_keys(ROOT, np.array(tokens, dtype=dtype), 2) == keys
    strided = np.zeros(8, dtype=np.int32)
    strided[::2] = tokens
    assert chunk_keys(ROOT, strided[::2], 2) == keys
    assert chunk_keys(ROOT, np.array([3, 4], dtype=np.uint32), 2) == chunk_keys(ROOT, [3, 4], 2)


@pytest.mark.parametrize(
    "tokens",
    [
        [2**31],
        [-(2**31) - 1],
        [2**80],
        ["7"],
        [None],
        [1.0],
        [True],
        np.array([2**32 + 5], dtype=np.int64),
        np.array([2**31], dtype=np.uint32),
        np.array([-(2**31) - 1], dtype=np.int64),
        np.array([1.5]),
    ],
    ids=str,
)
def test_a_token_id_that_is_no_int32_is_refused_and_not_wrapped(tokens: object) -> None:
    with pytest.raises(UsageError, match="32 bits"):
        token_array(tokens)  # type: ignore[arg-type]


def test_no_tokens_have_no_keys() -> None:
    assert chunk_keys(ROOT, [], 16) == chunk_keys(ROOT, np.zeros(0, dtype=np.int64), 16) == []


@pytest.mark.parametrize("width", [0, -1])
def test_a_chunk_without_tokens_is_refused(width: int) -> None:
    with pytest.raises(UsageError, match=str(width)):
        chunk_keys(ROOT, [1, 2], width)


def test_a_parent_of_another_length_is_refused() -> None:
    with pytest.raises(UsageError, match="31"):
        chunk_keys(ROOT[:31], [1], 1)


def keys_with(media: list[Media], start: int = 0) -> list[bytes]:
    return chunk_keys(ROOT, [7] * 12, 4, start=start, media=media)


def test_media_change_exactly_the_chunks_they_touch_and_what_follows() -> None:
    plain = keys_with([])
    inside = keys_with([Media("a", 5, 2)])  # chunk 1 only
    assert inside[0] == plain[0]
    assert inside[1] != plain[1]
    assert keys_with([Media("a", 0, 4)])[0] != plain[0]
    assert keys_with([Media("a", 3, 2)])[0] != plain[0]  # chunks 0 and 1
    assert keys_with([Media("a", 12, 4), Media("b", 40, 4)]) == plain  # behind the tokens
    assert keys_with([Media("a", 0, 4)], start=4) == plain  # before them


def test_media_are_told_apart_by_identifier_and_by_offset() -> None:
    assert keys_with([Media("a", 4, 2)])[1] != keys_with([Media("b", 4, 2)])[1]
    assert keys_with([Media("a", 4, 2)])[1] != keys_with([Media("a", 5, 2)])[1]
    assert keys_with([Media("ab", 4, 1), Media("c", 6, 1)])[1] != keys_with([Media("a", 4, 1), Media("bc", 6, 1)])[1]


@given(st.permutations([Media("a", 0, 3), Media("b", 3, 6), Media("c", 9, 3), Media("d", 9, 3)]))
def test_the_order_in_which_media_are_given_does_not_matter(media: list[Media]) -> None:
    assert keys_with(media) == keys_with(sorted(media, key=lambda item: item.identifier))


def test_the_shards_of_a_chunk_have_different_keys() -> None:
    names = ["", "h0-3", "h4-7", "l0-15/h0-3"]
    keys = {object_key(ROOT, name) for name in names}
    assert len(keys) == len(names)
    assert {len(key) for key in keys} == {KEY_BYTES}


def test_every_field_of_a_namespace_keeps_objects_apart() -> None:
    changed = [NAMESPACE]
    for field in fields(Namespace):
        others: dict[str, Any] = {"chunk_tokens": 32, "adapter": "ab" * 32, "salt": "cd" * 32}
        others["groups"] = (Group(Need.STATE, 0, ("s",)),)
        value = others.get(field.name, "other")
        changed.append(replace(NAMESPACE, **{field.name: value}))
    changed.append(replace(NAMESPACE, adapter="cd" * 32))
    assert len({namespace.digest() for namespace in changed}) == len(changed)


def test_salts_are_told_apart_and_no_salt_is_empty() -> None:
    assert salt_digest(None) == salt_digest("") == ""
    assert len({salt_digest("a"), salt_digest("b"), salt_digest("A")}) == 3
    assert "tenant" not in salt_digest("tenant")


def test_an_adapter_is_the_parent_of_its_first_chunk() -> None:
    assert NAMESPACE.adapter_key() == b""
    assert replace(NAMESPACE, adapter="ab" * 32).adapter_key() == b"\xab" * 32


@given(st.text(), st.text(), st.text(), st.integers(1, 2**40))
def test_a_descriptor_is_read_back_as_the_namespace_it_describes(
    model: str, dtype: str, layout: str, chunk_tokens: int
) -> None:
    namespace = Namespace(model, dtype, layout, chunk_tokens, "", salt_digest(model))
    descriptor = namespace.descriptor()
    assert descriptor.isascii()
    assert Namespace.parse(descriptor) == namespace
    reordered = json.dumps(dict(reversed(json.loads(descriptor).items())), indent=1)
    assert Namespace.parse(reordered).digest() == namespace.digest()


@pytest.mark.parametrize(
    "descriptor",
    [
        "",
        "null",
        "[1]",
        "{}",
        "[" * 50_000,
        '{"a":' * 10_000,
        NAMESPACE.descriptor()[:-1],
        NAMESPACE.descriptor().replace("16,", "true,", 1),
        NAMESPACE.descriptor().replace(":16,", ":0,", 1),
        NAMESPACE.descriptor().replace(":16,", ":16.0,", 1),
        NAMESPACE.descriptor().replace(":16,", ':"16",', 1),
        NAMESPACE.descriptor().replace('"bfloat16"', "[]"),
        NAMESPACE.descriptor().replace('"adapter":""', '"adapter":"ab"'),
        NAMESPACE.descriptor().replace('"adapter":""', '"adapter":null'),
        NAMESPACE.descriptor().replace('"salt":""', '"salt":"' + "AB" * 32 + '"'),
        NAMESPACE.descriptor().replace('"salt"', '"pepper"'),
    ],
    ids=lambda text: text[-60:],
)
def test_what_describes_no_namespace_is_refused(descriptor: str) -> None:
    with pytest.raises(UsageError):
        Namespace.parse(descriptor)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_a_checksum_does_not_depend_on_how_the_payload_is_cut(data: bytes, at: int) -> None:
    assert checksum([data]) == checksum([data[:at], memoryview(data)[at:]])
