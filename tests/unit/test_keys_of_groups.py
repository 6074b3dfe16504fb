# SPDX-License-Identifier: Apache-2.0
"""Namespaces of models with several groups: their objects' keys, their descriptors; and nothing changes for others."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from loracache.errors import UsageError
from loracache.groups import Group, Need
from loracache.keys import Namespace, chunk_keys, object_key

WINDOW, STATE = Group(Need.WINDOW, 1023, ("w-a", "w-b")), Group(Need.STATE, 0, ("s",))
PLAIN = Namespace("m" * 64, "bfloat16", "layout#a|b", 4)
HYBRID = replace(PLAIN, groups=(WINDOW, STATE))
TOKENS = list(range(14))  # three chunks and a half

# What stands in the descriptors of caches that are there already: a word more would empty them.
WRITTEN = (
    '{"adapter":"","chunk_tokens":4,"kv_dtype":"bfloat16","layout":"layout#a|b","model":"' + "m" * 64 + '","salt":""}'
)


def test_a_namespace_without_groups_is_described_as_ever() -> None:
    assert PLAIN.descriptor() == WRITTEN
    assert Namespace.parse(WRITTEN) == PLAIN
    assert Namespace.parse(WRITTEN[:-1] + ',"groups":[]}').digest() == PLAIN.digest()


def test_groups_are_part_of_what_is_interchangeable_and_are_read_back() -> None:
    spaces = [PLAIN, HYBRID, replace(HYBRID, groups=(WINDOW,)), replace(HYBRID, groups=(STATE, WINDOW))]
    spaces += [replace(HYBRID, groups=(replace(WINDOW, tokens=1022), STATE)), replace(PLAIN, groups=(STATE,))]
    assert len({space.digest() for space in spaces}) == len(spaces)
    assert [Namespace.parse(space.descriptor()) for space in spaces] == spaces
    assert json.loads(HYBRID.descriptor())["groups"][1] == {"need": "state", "shards": ["s"], "tokens": 0}
    assert hash(HYBRID) == hash(Namespace.parse(HYBRID.descriptor()))


def test_objects_beside_a_chain_have_keys_of_their_chunk_and_shard() -> None:
    chunks = chunk_keys(HYBRID.digest(), TOKENS, 4)
    ((chain, beside),) = HYBRID.parts(TOKENS, 100)
    assert chain == [object_key(chunk, shard) for chunk in chunks for shard in ("a", "b")]
    assert beside == [object_key(chunk, shard) for chunk in chunks for shard in ("w-a", "w-b", "s")]
    keys = HYBRID.object_keys(TOKENS)
    assert keys == [object_key(chunk, shard) for chunk in chunks for shard in ("a", "b", "w-a", "w-b", "s")]
    assert len(set(keys)) == len(keys) == 3 * HYBRID.width
    assert (HYBRID.lead, HYBRID.width, HYBRID.beside) == (2, 5, ("w-a", "w-b", "s"))


@pytest.mark.parametrize("space", [PLAIN, HYBRID, replace(PLAIN, layout="l"), replace(HYBRID, layout="l")])
@pytest.mark.parametrize("chunks", [1, 2, 100])
def test_a_prompt_in_parts_is_the_same_prompt(space: Namespace, chunks: int) -> None:
    parts = list(space.parts(TOKENS, chunks))
    ((chain, beside),) = space.parts(TOKENS, 100)
    assert [key for part, _ in parts for key in part] == chain
    assert [key for _, part in parts for key in part] == beside
    assert list(space.keys_by_parts(TOKENS, chunks)) == space.object_keys(TOKENS)
    assert space.object_keys(TOKENS[:3]) == space.object_keys([]) == []


def test_a_chunk_without_shards_is_its_own_object_unless_no_layer_has_full_attention() -> None:
    plain, bare = replace(PLAIN, layout="l"), replace(HYBRID, layout="l")
    assert plain.object_keys(TOKENS) == chunk_keys(plain.digest(), TOKENS, 4)
    assert (plain.lead, plain.width) == (1, 1)
    assert bare.object_keys(TOKENS) == [
        object_key(chunk, shard) for chunk in chunk_keys(bare.digest(), TOKENS, 4) for shard in bare.beside
    ]
    assert (bare.lead, bare.width) == (0, 3)


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ([STATE], "tuple of Group"),
        ((STATE, "state"), "tuple of Group"),
        ((Group(Need.ALL, 0, ("x",)),), "need all"),
        ((STATE, replace(WINDOW, shards=("s",))), "'s' is named twice"),
        ((replace(STATE, shards=("a",)),), "'a' is named twice"),
        ((replace(STATE, shards=("s", "s")),), "'s' is named twice"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        replace(PLAIN, groups=groups)


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        (None, "must be a list"), ("state", "must be a list"), ({}, "must be a list"), (["state"], "map of need"),
        ([{}], "map of need"), ([{"need": "state", "tokens": 0}], "map of need"),
        ([{"need": "state", "tokens": 0, "shards": ["s"], "more": 1}], "map of need"),
        ([{"need": "some", "tokens": 0, "shards": ["s"]}], "'some'"),
        ([{"need": ["state"], "tokens": 0, "shards": ["s"]}], "state"),
        ([{"need": "window", "tokens": -1, "shards": ["s"]}], "-1"),
        ([{"need": "window", "tokens": True, "shards": ["s"]}], "True"),
        ([{"need": "state", "tokens": 0, "shards": []}], "shards"),
        ([{"need": "state", "tokens": 0, "shards": "s"}], "shards"),
        ([{"need": "state", "tokens": 0, "shards": [1]}], "shards"),
        ([{"need": "state", "tokens": 0, "shards": [["s"]]}], "shards"),
    ],
)  # fmt: skip
def test_a_descriptor_whose_groups_are_none_says_what_is_wrong(groups: Any, why: str) -> None:
    descriptor = json.dumps(json.loads(WRITTEN) | {"groups": groups})
    with pytest.raises(UsageError, match="not a namespace descriptor") as refused:
        Namespace.parse(descriptor)
    assert why in str(refused.value)
