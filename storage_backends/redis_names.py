"""Names of adapters in the Redis, where all machines that share it look them up: one hash, <prefix>:adapters.

Threading: any number of threads; redis-py keeps a pool of connections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from loracache.adapter_names import SharedNames
from loracache.errors import Unavailable
from loracache.storage_backends.redis_connections import without_secrets

__all__ = ["RedisNames"]

_T = TypeVar("_T")


class RedisNames(SharedNames):
    """The hash at `url`. A server that is silent is given up after `timeout_s`."""

    def __init__(self, url: str, *, prefix: str = "loracache", timeout_s: float = 1.0) -> None:
        self._key = f"{prefix}:adapters"
        self._place = without_secrets(url)
        from_url: Callable[..., Any] = redis.Redis.from_url
        self._redis: Any = from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), protocol=2
        )

    def get(self, name: str) -> bytes | None:
        return cast("bytes | None", self._ask(lambda: self._redis.hget(self._key, name)))

    def all(self) -> list[bytes]:
        return list(self._ask(lambda: self._redis.hgetall(self._key)).values())

    def put(self, name: str, record: bytes, *, only_new: bool = False) -> None:
        self._ask(lambda: (self._redis.hsetnx if only_new else self._redis.hset)(self._key, name, record))

    def close(self) -> None:
        self._redis.close()

    def _ask(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        except (redis.RedisError, OSError) as error:
            raise Unavailable(f"redis {self._place}: {type(error).__name__}: {error}") from None
