# SPDX-License-Identifier: Apache-2.0
"""Pages of objects and of the tree: all of it, once, in order, whatever comes and goes, at a bounded price a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loracache.cache.state.index import Index
from loracache.cache.state.slices import whole
from loracache.control import listing
from loracache.control.listing import Listing
from loracache.control.selection import Selected, Selector, select
from loracache.errors import Unknown, UsageError
from loracache.keys import LORA_NAMESPACE, Namespace
from loracache.namespaces import Namespaces
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.tiers import Tier

OURS, THEIRS = "50" * 32, "60" * 32
FIRST, SECOND, UNHELD = "a1" * 32, "b2" * 32, "c3" * 32


class Held:
    """An index with objects of several namespaces, adapters and tenants."""

    def __init__(self) -> None:
        self.index = Index(lambda tier, node: None, lambda node: None)
        self.namespaces = Namespaces(None)
        self.listing = Listing(self.index, self.namespaces)
        self.made = 0

    def space(self, model: str = "m", adapter: str = "", salt: str = "") -> bytes:
        return self.namespaces.register(
            Namespace(model, "float32", "x", 16, adapter, salt).descriptor(), [f"{model}-name"]
        ).digest()

    def put(self, space: bytes, parent: bytes = b"", tier: Tier = Tier.CPU, key: bytes = b"") -> bytes:
        self.made += 1
        key = key or (self.made * 7919 % 10007).to_bytes(2) * 16
        kind = Kind.LORA if space == LORA_NAMESPACE else Kind.KV
        node = self.index.insert(ObjectInfo(key, parent, kind, space, 100, 0))
        assert node is not None
        self.index.enter(node, tier)
        return key

    def drop(self, key: bytes) -> None:
        node = self.index.get(key)
        assert node is not None
        for tier in (Tier.CPU, Tier.DISK):
            if node.held_in(tier):
                self.index.leave(node, tier)

    def pages(
        self, page: Callable[[str], tuple[str, list[dict[str, Any]]]], between: Any = lambda found: None
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        after = ""
        for _ in range(1000):
            after, part = page(after)
            found += part
            if not after:
                return found
            between(found)
        raise AssertionError("it never ends")

    def objects(
        self, selector: Selector | None = None, tier: Tier | None = None, scope: str = "", size: int = 3, **more: Any
    ) -> list[str]:
        selected = whole(select(selector or Selector(), self.namespaces, scope)) if selector or scope else None
        found = self.pages(lambda after: self.objects_page(selected, tier, after, size, scope), **more)
        return [item["key"] for item in found]

    def tree(self, under: str = "", scope: str = "", size: int = 3, **more: Any) -> list[str]:
        return [item["id"] for item in self.pages(lambda after: self.tree_page(under, after, size, scope), **more)]

    def objects_page(self, *asked: Any) -> tuple[str, list[dict[str, Any]]]:
        return whole(self.listing.objects(*asked))

    def tree_page(self, *asked: Any) -> tuple[str, list[dict[str, Any]]]:
        return whole(self.listing.tree(*asked))


@pytest.fixture
def held() -> Held:
    made = Held()
    for adapter in ("", FIRST, SECOND):
        if adapter:
            made.index.adapters.add(bytes.fromhex(adapter))
        for salt in ("", OURS, THEIRS):
            space = made.space(adapter=adapter, salt=salt)
            parent = bytes.fromhex(adapter)
            for number in range(4):
                made.put(space, parent, Tier.DISK if number % 2 else Tier.CPU)
    made.put(LORA_NAMESPACE, key=bytes.fromhex(FIRST))
    return made


def in_order(held: Held, keys: Any) -> list[str]:
    nodes = [held.index.get(key) for key in keys]
    return [node.key.hex() for node in sorted(nodes, key=lambda node: (node.namespace, node.key))]  # type: ignore[union-attr]


def all_keys(held: Held, wanted: Callable[[Any], bool] = lambda node: True) -> list[str]:
    return in_order(held, [node.key for node in held.index if node.present and wanted(node)])


# -- objects -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 36, 37, 38, 100])
def test_every_object_is_listed_once_in_order(held: Held, size: int) -> None:
    assert held.objects(size=size) == all_keys(held)
    assert len(all_keys(held)) == 37


def test_filters_leave_out_what_does_not_match(held: Held) -> None:
    assert held.objects(tier=Tier.DISK) == all_keys(held, lambda node: node.held_in(Tier.DISK))
    ours = {space for space in held.index.spaces if (found := held.namespaces.get(space)) and found.salt == OURS}
    assert held.objects(Selector(salt=OURS)) == all_keys(held, lambda node: node.namespace in ours)
    assert held.objects(scope=OURS) == all_keys(held, lambda node: node.namespace in ours)
    one = Selector(model="m-name", adapter=FIRST, salt="")
    space = held.space(adapter=FIRST)
    assert held.objects(one) == all_keys(held, lambda node: node.namespace == space)


def test_objects_by_key_come_as_they_are_named_and_a_tenant_sees_its_own(held: Held) -> None:
    keys = [node.key for node in held.index if node.present][::-1]
    named = Selector(keys=b"".join([*keys, b"?" * 32]))
    assert held.objects(named) == [key.hex() for key in keys]
    nodes = [held.index.get(key) for key in keys]
    ours = {held.space(adapter=adapter, salt=OURS) for adapter in ("", FIRST, SECOND)}
    assert held.objects(named, scope=OURS) == [node.key.hex() for node in nodes if node and node.namespace in ours]


def test_what_comes_and_goes_between_two_pages_neither_hides_nor_repeats_the_rest(held: Held) -> None:
    before = all_keys(held)

    def churn(found: list[dict[str, Any]]) -> None:
        """The object listed last goes, and one comes somewhere."""
        held.drop(bytes.fromhex(found[-1]["key"]))
        if held.made < 80:
            held.put(held.space(), key=bytes([held.made]) * 32)

    found = held.objects(size=1, between=churn)
    assert len(found) == len(set(found))
    assert set(before) <= set(found)


def test_the_page_goes_on_where_a_whole_namespace_has_gone(held: Held) -> None:
    first = held.objects()
    page = held.objects_page(None, None, "", 2, "")
    space = page[0][:64]
    for key in first:
        if page[0].startswith(space) and held.index.get(bytes.fromhex(key)).namespace.hex() == space:  # type: ignore[union-attr]
            held.drop(bytes.fromhex(key))
    rest = held.pages(lambda after: held.objects_page(None, None, after or page[0], 5, ""))
    assert [item["key"] for item in rest] == all_keys(held)


@pytest.mark.parametrize("after", ["x", "00", "zz" * 64, "00" * 63, "00" * 65, "é" * 64, "1"])
def test_a_place_that_no_page_gave_is_refused(held: Held, after: str) -> None:
    with pytest.raises(UsageError, match="is not a place in this list"):
        held.objects_page(None, None, after, 3, "")


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "²", "00" * 64 + "x"])
def test_so_is_a_place_that_no_page_of_named_objects_gave(held: Held, after: str) -> None:
    with pytest.raises(UsageError, match="is not a place in this list"):
        held.objects_page(Selected(bytes(32)), None, after, 3, "")


class Counted(dict):  # type: ignore[type-arg]
    """Counts how often something is looked for in it."""

    looked = 0

    def get(self, *arguments: Any) -> Any:
        self.looked += 1
        return super().get(*arguments)


@pytest.mark.parametrize("matching", [0, 1])
@pytest.mark.parametrize("how", ["all", "spaces", "keys", "tenant's keys"])
def test_a_page_looks_at_no_more_than_so_many_objects_however_few_match(
    held: Held, matching: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_LOOKED_AT", 10)
    space = held.space("other")
    keys = [held.put(space, key=b"\xee" * 30 + number.to_bytes(2)) for number in range(100)]
    if matching:
        keys.append(held.put(space, tier=Tier.DISK, key=b"\xff" * 32))
    scope = THEIRS if how == "tenant's keys" else ""
    named, spaces = Selected(b"".join(keys), scope=scope), Selected(spaces=[space])
    selected = {"all": None, "spaces": spaces}.get(how, named)
    counted = held.index._nodes = Counted(held.index._nodes)
    pages: list[int] = []

    def page(after: str) -> Any:
        counted.looked = 0
        answer = held.objects_page(selected, Tier.DISK, after, 1000, scope)
        pages.append(counted.looked)
        return answer

    found = held.pages(page)
    assert len(found) == {"all": 18 + matching, "tenant's keys": 0}.get(how, matching)
    assert max(pages) <= 2 * 10
    assert len(pages) >= 10


# -- the tree ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_the_tree_is_walked_from_its_top_to_the_last_chunk(held: Held, size: int) -> None:
    space = held.space(salt=OURS)
    root = held.put(space)
    middle = [held.put(space, root, Tier.DISK if number % 2 else Tier.CPU) for number in range(5)]
    leaf = held.put(space, middle[2])
    assert held.tree(size=size) == ["base", f"adapter:{FIRST}", f"adapter:{SECOND}"]
    spaces = sorted(held.space(salt=salt) for salt in ("", OURS, THEIRS))
    assert held.tree("base", size=size) == [f"space:{each.hex()}" for each in spaces]
    assert held.tree(f"space:{space.hex()}", size=size) == [key.hex() for key in held.index.spaces[space].roots]
    assert sorted(held.tree(root.hex(), size=size)) == sorted(key.hex() for key in middle)
    assert held.tree(middle[2].hex(), size=size) == [leaf.hex()]
    assert held.tree(leaf.hex(), size=size) == []

    def count(under: str) -> int:
        below = held.tree(under, size=size)
        return len(below) + sum(count(each) for each in below)

    assert count("") == 3 + 9 + 36 + 7


def test_a_node_says_what_is_below_it(held: Held) -> None:
    _, (base, first, second) = held.tree_page("", "", 10, "")
    assert base | {"hits": 0} == {
        "id": "base", "kind": "base", "digest": "", "size": 0, "tiers": [], "pinned": [], "children": 3,
        "objects": {"cpu": 6, "disk": 6}, "bytes": {"cpu": 600, "disk": 600}, "hits": 0,
    }  # fmt: skip
    assert (first["tiers"], first["size"], second["tiers"], second["size"]) == (["cpu"], 100, [], 0)
    (space, *_) = held.tree_page(f"adapter:{FIRST}", "", 10, "")[1]
    assert (space["model"], space["names"], space["children"]) == ("m", ["m-name"], 4)
    (chunk, *_) = held.tree_page(space["id"], "", 1, "")[1]
    assert (chunk["kind"], chunk["parent"], chunk["children"]) == ("chunk", FIRST, 0)


def test_a_tenant_walks_its_own_tree(held: Held) -> None:
    held.space(adapter=UNHELD, salt=THEIRS)
    held.index.adapters.add(bytes.fromhex(UNHELD))
    assert held.tree(scope=OURS) == ["base", f"adapter:{FIRST}", f"adapter:{SECOND}"]
    assert held.tree(scope="70" * 32) == ["base"]
    top = held.tree_page("", "", 10, OURS)[1]
    assert [node["objects"]["cpu"] for node in top] == [2, 2, 2]
    assert [node["tiers"] for node in top] == [[], [], []]  # others share the adapter's bytes
    assert held.tree("base", scope=OURS) == [f"space:{held.space(salt=OURS).hex()}"]
    theirs = held.space(salt=THEIRS)
    for under in (
        f"space:{theirs.hex()}", held.index.spaces[theirs].roots[0].hex(), FIRST, f"adapter:{UNHELD}", "ff" * 32,
        f"adapter:{'00' * 32}",
    ):  # fmt: skip
        with pytest.raises(Unknown):
            held.tree_page(under, "", 10, OURS)


@pytest.mark.parametrize("under", ["x", "base:", "space:", "space:zz", "adapter:", "adapter:base", "00", "gpu:0"])
def test_what_is_no_node_is_refused(held: Held, under: str) -> None:
    with pytest.raises(UsageError, match="is not a node of the tree"):
        held.tree_page(under, "", 10, "")


@pytest.mark.parametrize("under", ["space:" + "00" * 32, "adapter:" + "00" * 32, "00" * 32])
def test_what_is_not_there_any_more_is_unknown(held: Held, under: str) -> None:
    with pytest.raises(Unknown):
        held.tree_page(under, "", 10, "")


@pytest.mark.parametrize("after", ["x", "adapter:zz", "adapter:", "space:00", "00" * 31])
def test_a_place_in_the_tree_that_no_page_gave_is_refused(held: Held, after: str) -> None:
    space = held.space()
    root = held.index.spaces[space].roots[0].hex()
    for under in ("", "base", f"space:{space.hex()}", root):
        with pytest.raises(UsageError, match="is not a place in this list"):
            held.tree_page(under, after, 10, "")


def test_children_that_come_and_go_between_two_pages(held: Held) -> None:
    space = held.space()
    root = held.put(space)
    before = {held.put(space, root).hex() for _ in range(9)}
    found = held.tree(root.hex(), size=2, between=lambda found: held.put(space, root))
    assert len(found) == len(set(found))
    assert before <= set(found)
    after, _ = held.tree_page(root.hex(), "", 2, "")
    held.drop(bytes.fromhex(after))
    with pytest.raises(Unknown, match="ask for the first page again"):
        held.tree_page(root.hex(), after, 2, "")


def test_a_page_of_many_namespaces_looks_at_no_more_than_so_many(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_LOOKED_AT", 10)
    for number in range(100):
        held.space(f"model {number}")
    after, found = held.tree_page("base", "", 50, "")
    assert after
    assert len(found) <= 3
    assert len(held.tree("base", size=50)) == 3
