# SPDX-License-Identifier: Apache-2.0
"""With 50,000 namespaces, and with very many keys, nothing that an operator asks for keeps the event loop."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loracache.adapters.names import AdapterNames, NameRecord
from loracache.cache.state.arena import Arena
from loracache.cache.tiered import TieredCache
from loracache.control.adapters import Adapters
from loracache.control.audit import Audit
from loracache.control.lookup import Finder
from loracache.control.service import Control
from loracache.keys import LORA_NAMESPACE, Namespace
from loracache.namespaces import Namespaces
from loracache.storage_backends.base import Kind, ObjectInfo
from loracache.storage_backends.memory import MemoryBackend
from loracache.tiers import Tier
from loracache.wire import control_messages as messages

COUNT, NAMES, KEYS = 50_000, 20_000, 200_000
ADAPTER, OTHERS = "a1" * 32, 2_000
TENANT = "50" * 32
MOST_S = 0.020

Ask = Callable[[Any], tuple[list[Any], float]]


class Probed:
    """The control path of a cache whose objects are in very many namespaces: a quarter of one model's tenants', of one
    adapter's, of one tenant's with OTHERS adapters, and of very many models'."""

    def __init__(self) -> None:
        posted: list[Callable[[], None]] = []
        self.cache = TieredCache(
            Arena(1 << 20, 4096), posted.append, disk=MemoryBackend(), disk_limit=1 << 40, redis=None
        )
        self.namespaces = Namespaces(None)
        index = self.cache.index
        names = AdapterNames(None, None)
        for number in range(NAMES):
            names._known[f"name {number}"] = NameRecord(f"name {number}", f"{number % OTHERS:064x}", "{}", 0.0, 1)
        self.adapters = Adapters(self.cache, self.namespaces, names, posted.append)
        assert index.insert(ObjectInfo(bytes.fromhex(ADAPTER), b"", Kind.LORA, LORA_NAMESPACE, 100, 0))
        index.enter(index.get(bytes.fromhex(ADAPTER)), Tier.DISK)  # type: ignore[arg-type]
        self.keys = [number.to_bytes(32, "big") for number in range(COUNT)]
        for number, key in enumerate(self.keys):
            fields: dict[str, Any] = (
                {"salt": f"{number:064x}"},
                {"adapter": ADAPTER, "salt": f"{number:064x}"},
                {"salt": TENANT, "adapter": f"{number // 4 % OTHERS:064x}" if number // 4 % 4 else ""},
                {},
            )[number % 4]
            model = "0" * 64 if number % 4 == 0 else f"{number:08x}model"
            space = Namespace(model, "float32", "x", 16, **fields)
            self.namespaces.learn([(space, ["served"])])
            digest = space.digest()
            parent = bytes.fromhex(space.adapter)
            index.adapters.add(parent)
            node = index.insert(ObjectInfo(key, parent, Kind.KV, digest, 100, 0))
            assert node is not None
            index.enter(node, Tier.DISK)
        finder = Finder(self.cache, 0.02)
        self.control = Control(self.cache, self.namespaces, self.adapters, finder, Audit(None), dict)

    def ask(self, request: Any) -> tuple[list[Any], float]:
        """The answer, and for how long at most nobody else was served: in seconds of this thread, for what others take
        of the machine is not ours."""
        longest = 0.0

        async def watch() -> None:
            nonlocal longest
            before = time.thread_time()
            while True:
                await asyncio.sleep(0)
                now = time.thread_time()
                longest = max(longest, now - before)
                before = now

        async def run() -> list[Any]:
            watching = asyncio.create_task(watch())
            await asyncio.sleep(0)
            answer = await self.control.serve(request, "test")
            await asyncio.sleep(0)
            watching.cancel()
            return answer

        gc.disable()  # as the daemon does
        try:
            return asyncio.run(run()), longest
        finally:
            gc.enable()


def _digest(space: Namespace) -> bytes:
    return hashlib.sha256(f"{space.model}/{space.adapter}/{space.salt}".encode()).digest()


@pytest.fixture(scope="module")
def probed() -> Iterator[Probed]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Namespace, "digest", _digest)  # a tenth of what the real one takes, and as good here
        yield Probed()


def tree(name: str, scope: str = "", after: str = "") -> messages.Tree:
    return messages.Tree("", scope, name, after, 1000)


def objects(selector: dict[str, Any], scope: str = "", after: str = "") -> messages.ObjectList:
    return messages.ObjectList("", scope, selector, "", after, 1000)


ASKED: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "top": (tree(""), lambda found: found[1]["children"] > COUNT / 4),
    "top of a tenant": (tree("", TENANT), lambda found: len(found) == 1001),
    "base models": (tree("base"), lambda found: len(found) == 1001),
    "base models of a tenant": (tree("base", TENANT), lambda found: len(found) == 1001),
    "namespaces of an adapter": (tree(f"adapter:{ADAPTER}"), lambda found: len(found) == 1001),
    "an adapter of which a tenant has nothing": (tree(f"adapter:{ADAPTER}", "60" * 32), lambda found: False),
    "objects": (objects({}), lambda found: len(found) == 1001),
    "objects of all": (objects({"model": "*"}), lambda found: len(found) == 1001),
    "objects of a name": (objects({"model": "served"}), lambda found: len(found) == 1001),
    "objects of a tenant": (objects({}, TENANT), lambda found: len(found) == 1001),
    "objects of a tenant that are nowhere": (objects({"adapter": ADAPTER}, TENANT), lambda found: found == [""]),
    "objects of keys": (objects({"keys": b"".join(map(int.to_bytes, range(KEYS), [32] * KEYS))}), lambda found: True),
    "objects of a prompt": (
        objects({"model": "0" * 64, "tokens": bytes(4_000_000), "salt": f"{3:064x}"}, after="62000"),
        lambda found: found == [""],
    ),
    "namespaces": (messages.SpaceList("", "", {"model": "*"}, 1000), lambda found: len(found) == 1000),
    "what is held": (messages.Locate("", "", {"model": "*"}), lambda found: found[0]["held"]["disk"][0] == COUNT),
    "keys": (
        messages.Locate("", "", {"keys": b"".join(int.to_bytes(number % COUNT, 32) for number in range(KEYS))}),
        lambda found: found[0]["hits"] == KEYS,
    ),
    "a prompt of all": (
        messages.Locate("", "", {"model": "*", "tokens": bytes(64), "adapter": ADAPTER, "salt": f"{1:064x}"}),
        lambda found: found[0]["hits"] == 0,
    ),
    "prompts of all models": (
        messages.Pin("", "", {"model": "*", "tokens": bytes(64)}, "disk", 1.0, 600.0),
        lambda found: found[0]["causes"] == {"absent": COUNT / 4},
    ),
    "pins": (
        messages.Pin("", "", {"model": "*"}, "disk", 1.0, 600.0),
        lambda found: found[0]["objects"] == COUNT,
    ),
    "unpins": (messages.Unpin("", "", {"model": "*"}, "disk", 600.0), lambda found: found[0]["objects"] == COUNT),
    "a count of the index": (messages.IndexCheck(), lambda found: found[0]["checked"] > COUNT),
}


@pytest.mark.parametrize("what", ASKED)
def test_nobody_waits_long_beside(what: str, probed: Probed, quickest: Callable[..., float]) -> None:
    request, holds = ASKED[what]
    if what.startswith("an adapter of which"):
        with pytest.raises(Exception, match="nothing is known"):
            probed.ask(request)
        return
    if what == "objects of a prompt":
        probed.namespaces.register(Namespace("0" * 64, "float32", "x", 16, salt=f"{3:064x}").descriptor())

    def longest() -> float:
        answer, longest = probed.ask(request)
        assert holds(answer), answer[:2]
        return longest

    assert quickest(longest, MOST_S) < MOST_S
