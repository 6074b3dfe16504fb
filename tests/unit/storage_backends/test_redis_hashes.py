# SPDX-License-Identifier: Apache-2.0
"""One small hash in a Redis, where no server can be asked for it."""

from __future__ import annotations

import pytest

from loracache.errors import Unavailable
from loracache.storage_backends.redis.hashes import RedisHash
from loracache.storage_backends.redis.slots import SlotMap
from loracache.storage_backends.redis.urls import parse_target


def test_a_hash_whose_slot_no_node_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotMap, "owners", lambda self, slots: [None for _ in slots])
    owners = RedisHash(parse_target("redis+cluster://127.0.0.1:1", 1.0), "loracache:owners")
    with pytest.raises(Unavailable, match="no node has the slot of loracache:owners"):
        owners.ask(lambda server: server.hgetall("loracache:owners"))
