# SPDX-License-Identifier: Apache-2.0
"""One small hash in the Redis, by redis-py's own client.

In a cluster the hash lies on one node, as its slot does. Threading: any number of threads; redis-py keeps a pool of
connections for each server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import redis

from loracache.errors import Unavailable
from loracache.storage_backends.redis.sentinel import Sentinels
from loracache.storage_backends.redis.slots import SlotMap, slot_of
from loracache.storage_backends.redis.urls import Address, Target

__all__ = ["RedisHash"]

_T = TypeVar("_T")


class RedisHash:
    """The hash under `key` in the Redis at `target`, whose `timeout_s` a silent server is given up after."""

    def __init__(self, target: Target, key: str) -> None:
        self.key = key
        self._target = target
        self._owner = _Node(target, key) if target.cluster else _Server(target)

    def ask(self, work: Callable[[Any], _T]) -> _T:
        """What `work` makes of a client of the server that has the hash. Raises Unavailable."""
        for again in (True, False):
            try:
                return work(self._owner.client())
            except (redis.RedisError, OSError) as error:
                if self._owner.lost(error) and again:
                    continue
                said = self._target.said(error).text
            raise Unavailable(f"redis {self._target.place}: {said}")
        raise AssertionError

    def all(self) -> dict[bytes, bytes]:
        """All fields. Raises Unavailable."""
        return dict(self.ask(lambda server: server.hgetall(self.key)))

    def close(self) -> None:
        """Closes all connections. No call follows."""
        self._owner.close()


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
        self._key = key
        self._slot = slot_of(key.encode())
        self._slots = SlotMap(target)
        self._clients: dict[Address, Any] = {}
        self._asked = target.hosts[0]

    def client(self) -> Any:
        (owner,) = self._slots.owners([self._slot])
        if owner is None:
            lost = self._slots.lost
            raise redis.ConnectionError(lost.text if lost else f"no node has the slot of {self._key}")
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
