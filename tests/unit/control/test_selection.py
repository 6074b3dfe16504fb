# SPDX-License-Identifier: Apache-2.0
"""What a selector stands for, and what of it a tenant may know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loracache.cache.state.index import Index
from loracache.cache.state.slices import whole
from loracache.control.selection import Selected, Selector, select
from loracache.errors import Unknown, UsageError
from loracache.keys import LORA_NAMESPACE, Namespace, chunk_keys, object_key
from loracache.namespaces import Namespaces
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

IDENTITY = "0123456789abcdef" * 4
OTHER = "fedcba98" * 8
ADAPTER, OURS, THEIRS = "ad" * 32, "50" * 32, "60" * 32
TOKENS = np.arange(40, dtype="<i4")
SPACES = {
    "base": Namespace(IDENTITY, "float32", "x", 16),
    "adapter": Namespace(IDENTITY, "float32", "x", 16, ADAPTER),
    "ours": Namespace(IDENTITY, "float32", "x", 16, "", OURS),
    "our adapter": Namespace(IDENTITY, "float32", "x", 16, ADAPTER, OURS),
    "theirs": Namespace(IDENTITY, "float32", "x", 16, "", THEIRS),
    "sharded": Namespace(OTHER, "float32", "x#a|b", 8),
}


@pytest.fixture
def namespaces() -> Namespaces:
    made = Namespaces(None)
    for space in SPACES.values():
        made.register(space.descriptor(), ["llama"] if space.model == IDENTITY else ["qwen", "qwen-2"])
    return made


def chosen(selector: Selector, namespaces: Namespaces, scope: str) -> Selected:
    return whole(select(selector, namespaces, scope))


def digests(*names: str) -> set[bytes]:
    return {SPACES[name].digest() for name in names}


@pytest.mark.parametrize("model", ["llama", IDENTITY, IDENTITY[:8], IDENTITY[:20]])
def test_a_model_is_meant_by_its_name_its_identity_or_its_first_digits(namespaces: Namespaces, model: str) -> None:
    found = chosen(Selector(model=model), namespaces, "")
    assert set(found.spaces) == digests("base", "adapter", "ours", "our adapter", "theirs")
    assert (found.total, list(found.keys())) == (None, [])


@pytest.mark.parametrize("model", [IDENTITY[:7], "lla", "Llama", "llama2", IDENTITY[1:9], IDENTITY + "0"])
def test_what_no_engine_registered_is_unknown_but_to_a_tenant_it_is_nothing(namespaces: Namespaces, model: str) -> None:
    for tokens in (None, TOKENS.tobytes()):
        with pytest.raises(Unknown, match="no engine has registered"):
            chosen(Selector(model=model, tokens=tokens), namespaces, "")
        found = chosen(Selector(model=model, tokens=tokens), namespaces, OURS)
        assert (list(found.spaces), list(found.keys())) == ([], [])


@pytest.mark.parametrize(
    ("selector", "named"),
    [
        (Selector(model="*"), set(SPACES)),
        (Selector(model="*", adapter=""), {"base", "ours", "theirs", "sharded"}),
        (Selector(model="llama", adapter=ADAPTER), {"adapter", "our adapter"}),
        (Selector(salt=OURS), {"ours", "our adapter"}),
        (Selector(salt=""), {"base", "adapter", "sharded"}),
        (Selector(salt=OURS, adapter=""), {"ours"}),
        (Selector(model="qwen-2", salt=OURS), set()),
        (Selector(model="llama", adapter="00" * 32), set()),
    ],
)
def test_fields_restrict_what_is_meant_and_none_does_not(
    namespaces: Namespaces, selector: Selector, named: set[str]
) -> None:
    assert set(chosen(selector, namespaces, "").spaces) == digests(*named)


@pytest.mark.parametrize(
    "selector",
    [
        Selector(keys=bytes(32), model="llama"),
        Selector(keys=bytes(32), tokens=b""),
        Selector(keys=bytes(32), salt=""),
        Selector(keys=bytes(32), adapter=ADAPTER),
        Selector(keys=b"", adapter=""),
        Selector(),
        Selector(adapter=""),
        Selector(tokens=TOKENS.tobytes()),
        Selector(tokens=TOKENS.tobytes(), salt=OURS),
    ],
)
def test_contradictory_and_empty_selectors_are_refused(namespaces: Namespaces, selector: Selector) -> None:
    with pytest.raises(UsageError, match="selector"):
        chosen(selector, namespaces, "")


@pytest.mark.parametrize("scope", ["", OURS])
@pytest.mark.parametrize("selector", [Selector(keys=b""), Selector(model="llama", tokens=b"")])
def test_keys_and_tokens_that_are_given_and_empty_mean_nothing_rather_than_everything(
    namespaces: Namespaces, selector: Selector, scope: str
) -> None:
    found = chosen(selector, namespaces, scope)
    assert (list(found.spaces), list(found.keys()), found.total) == ([], [], 0)


def test_an_adapter_alone_is_its_own_object(namespaces: Namespaces) -> None:
    found = chosen(Selector(adapter=ADAPTER), namespaces, "")
    assert (list(found.keys()), list(found.spaces)) == ([bytes.fromhex(ADAPTER)], [])


def test_tokens_are_of_the_base_model_without_salt_where_nothing_else_is_said(namespaces: Namespaces) -> None:
    found = chosen(Selector(model="llama", tokens=TOKENS.tobytes()), namespaces, "")
    assert list(found.keys()) == chunk_keys(SPACES["base"].digest(), TOKENS, 16)
    assert found.total == 2
    found = chosen(Selector(model="llama", tokens=TOKENS.tobytes(), adapter=ADAPTER, salt=OURS), namespaces, "")
    assert list(found.keys()) == chunk_keys(SPACES["our adapter"].digest(), TOKENS, 16)
    assert chosen(Selector(model="llama", tokens=TOKENS[:15].tobytes()), namespaces, "").total == 0


def test_a_chunks_shards_stand_side_by_side(namespaces: Namespaces) -> None:
    found = chosen(Selector(model="qwen", tokens=TOKENS.tobytes()), namespaces, "")
    chunks = chunk_keys(SPACES["sharded"].digest(), TOKENS, 8)
    keys = [object_key(chunk, shard) for chunk in chunks for shard in "ab"]
    assert list(found.keys()) == keys
    assert (found.total, [list(found.keys(at)) for at in (3, 10, 99)]) == (10, [keys[3:], [], []])


def test_any_model_means_the_chains_of_all(namespaces: Namespaces) -> None:
    found = chosen(Selector(model="*", tokens=TOKENS.tobytes()), namespaces, "")
    assert (len(found.chains), found.total, len(list(found.keys()))) == (2, 12, 12)
    both = list(found.keys())
    assert [list(found.keys(at)) for at in range(13)] == [both[at:] for at in range(13)]


# -- tenants -----------------------------------------------------------------------------------------------------------


def test_a_tenant_selects_inside_of_its_own_only(namespaces: Namespaces) -> None:
    assert set(chosen(Selector(), namespaces, OURS).spaces) == digests("ours", "our adapter")
    assert set(chosen(Selector(model="*"), namespaces, OURS).spaces) == digests("ours", "our adapter")
    assert set(chosen(Selector(adapter=ADAPTER), namespaces, OURS).spaces) == digests("our adapter")
    assert set(chosen(Selector(salt=OURS), namespaces, OURS).spaces) == digests("ours", "our adapter")
    found = chosen(Selector(model="llama", tokens=TOKENS.tobytes()), namespaces, OURS)
    assert list(found.keys()) == chunk_keys(SPACES["ours"].digest(), TOKENS, 16)


@pytest.mark.parametrize("salt", ["", THEIRS])
def test_another_tenant_is_nothing_to_a_tenant(namespaces: Namespaces, salt: str) -> None:
    for selector in (Selector(salt=salt), Selector(model="llama", tokens=TOKENS.tobytes(), salt=salt)):
        assert chosen(selector, namespaces, OURS) == Selected(scope=OURS)


def held(*names: str) -> tuple[Index, dict[str, bytes]]:
    """An object in each of these namespaces, and an adapter's."""
    index = Index(lambda tier, node: None, lambda node: None)
    keys = {}
    for number, name in enumerate([*names, "lora"]):
        keys[name] = bytes([number + 1]) * 32
        space, kind = (LORA_NAMESPACE, Kind.LORA) if name == "lora" else (SPACES[name].digest(), Kind.KV)
        node = index.insert(ObjectInfo(keys[name], b"", kind, space, 100, 0))
        assert node is not None
        index.enter(node, Tier.CPU)
    return index, keys


def test_keys_of_others_and_of_nobody_are_alike_to_a_tenant(namespaces: Namespaces) -> None:
    index, keys = held("base", "ours", "theirs", "our adapter")
    asked = [keys["theirs"], keys["ours"], b"?" * 32, keys["lora"], keys["base"], keys["our adapter"]]
    found = chosen(Selector(keys=b"".join(asked)), namespaces, OURS)
    assert list(found.parts(index, namespaces, 4)) == [[keys["ours"]], [keys["our adapter"]]]
    assert found.total == 6  # as it was asked: it says nothing of what there is


def test_parts_are_small_name_each_key_once_and_look_at_a_part_at_a_time(namespaces: Namespaces) -> None:
    index, keys = held("base", "ours")
    blob = b"".join([keys["base"], keys["ours"], keys["base"], b"?" * 32, keys["base"]])
    assert list(chosen(Selector(keys=blob), namespaces, "").parts(index, namespaces, 2)) == [
        [keys["base"], keys["ours"]],
        [b"?" * 32],
        [],
    ]
    looked: list[bytes] = []
    watched: Any = SimpleNamespace(get=looked.append, spaces=index.spaces)
    parts = chosen(Selector(keys=blob), namespaces, OURS).parts(watched, namespaces, 2)
    assert (next(parts), len(looked)) == ([], 2)


def test_whole_namespaces_are_what_they_hold_when_their_turn_comes(namespaces: Namespaces) -> None:
    index, keys = held("base", "ours")
    parts = chosen(Selector(salt=OURS), namespaces, "").parts(index, namespaces, 2)
    node = index.insert(ObjectInfo(b"l" * 32, b"", Kind.KV, SPACES["our adapter"].digest(), 1, 0))
    assert node is not None
    index.enter(node, Tier.DISK)
    assert sorted(key for part in parts for key in part) == sorted([keys["ours"], b"l" * 32])
    gone = index.get(keys["base"])
    assert gone is not None
    parts = chosen(Selector(model="llama", adapter="", salt=""), namespaces, "").parts(index, namespaces, 2)
    index.leave(gone, Tier.CPU)
    assert list(parts) == []
