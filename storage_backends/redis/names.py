# SPDX-License-Identifier: Apache-2.0
"""Names of adapters in the Redis, where all machines that share it look them up: one hash, <prefix>:adapters.

Threading: any number of threads.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from loracache.adapters.names import SharedNames
from loracache.storage_backends.redis.hashes import RedisHash
from loracache.storage_backends.redis.urls import parse_target

__all__ = ["RedisNames"]


class RedisNames(SharedNames):
    """The hash at `url` (urls.py). A server that is silent is given up after `timeout_s`."""

    def __init__(
        self, url: str, *, prefix: str = "loracache", password_file: Path | None = None, timeout_s: float = 1.0
    ) -> None:
        self._hash = RedisHash(parse_target(url, timeout_s, password_file), f"{prefix}:adapters")

    def get(self, name: str) -> bytes | None:
        return cast("bytes | None", self._hash.ask(lambda server: server.hget(self._hash.key, name)))

    def all(self) -> list[bytes]:
        return list(self._hash.all().values())

    def put(self, name: str, record: bytes, *, only_new: bool = False) -> None:
        self._hash.ask(lambda server: (server.hsetnx if only_new else server.hset)(self._hash.key, name, record))

    def close(self) -> None:
        self._hash.close()
