# SPDX-License-Identifier: Apache-2.0
"""Names of adapters in the Redis, where all machines that share it look them up: one hash, <prefix>:adapters.

In a cluster the hash lies on one node, as its slot does. Threading: any number of threads; redis-py keeps a pool of
connections for each server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import redis

from loracache.adapters.names import SharedNames
from loracache.errors import Unavailable
from loracache.storage_backends.redis.sentinel import Sentinels
from loracache.storage_backends.redis.slots import SlotMap, slot_of
from loracache.storage_backends.redis.urls import Address, Target, parse_target

__all__ = ["RedisNames"]

_T = TypeVar("_T")


class RedisNames(SharedNames):
    """The hash at `url` (urls.py). A server that is silent is given up after `timeout_s`."""

    def __init__(
        self, url: str, *, prefix: str = "loracache", password_file: Path | None = None, timeout_s: float = 1.0
    ) -> None:
        self._key = f"{prefix}:adapters"
        self._target = parse_target(url, timeout_s, password_file)
        self._owner = _Node(self._target, self._key) if self._target.cluster else _Server(self._target)

    def get(self, name: str) -> bytes | None:
        return cast("bytes | None", self._ask(lambda server: server.hget(self._key, name)))

    def all(self) -> list[bytes]:
        return list(self._ask(lambda server: server.hgetall(self._key)).values())

    def put(self, name: str, record: bytes, *, only_new: bool = False) -> None:
        self._ask(lambda server: (server.hsetnx if only_new else server.hset)(self._key, name, record))

    def close(self) -> None:
        self._owner.close()

    def _ask(self, work: Callable[[Any], _T]) -> _T:
        for again in (True, False):
            try:
                return work(self._owner.client())
            except (redis.RedisError, OSError) as error:
                if self._owner.lost(error) and again:
                    continue
                said = self._target.said(error).text
            raise Unavailable(f"redis {self._target.place}: {said}")
        raise AssertionError


class _Server:
    """The one server, or the service's master, whom every new connection asks the sentinels for."""

    def __init__(self, target: Target) -> None:
        self._client = target.client_of_master(Sentinels(target)) if target.service else target.client()

    def client(self) -> Any:
        return self._client

    def lost(self, error: Exception) -> bool:
        """Takes note of how a question failed; whether it is worth asking again at once."""
        return False

    def close(self) -> None:
        self._client.close()


class _Node:
    """The node of a cluster that has the hash."""

    def __init__(self, target: Target, key: str) -> None:
        self._target = target
        self._slot = slot_of(key.encode())
        self._slots = SlotMap(target)
        self._clients: dict[Address, Any] = {}
        self._asked = target.hosts[0]

    def client(self) -> Any:
        (owner,) = self._slots.owners([self._slot])
        if owner is None:
            raise redis.ConnectionError(
                self._slots.lost.text if self._slots.lost else "no node has the slot of the names"
            )
        if owner not in self._clients:
            self._clients = {**self._clients, owner: self._target.client(owner)}
        self._asked = owner
        return self._clients[owner]

    def lost(self, error: Exception) -> bool:
        if isinstance(error, redis.exceptions.MovedError):
            self._slots.moved([f"MOVED {error.args[0]}"], by=self._asked)
        self._slots.doubt()
        return isinstance(error, redis.exceptions.MovedError)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
