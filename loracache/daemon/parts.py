# SPDX-License-Identifier: Apache-2.0
"""Makes the daemon's parts from its configuration."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping

from loracache.adapters.names import AdapterNames, SharedNames
from loracache.cache.state.arena import Arena
from loracache.cache.state.counters import Counters
from loracache.cache.tiered import TieredCache
from loracache.config import Config
from loracache.control.adapters import Adapters
from loracache.control.audit import Audit
from loracache.control.quotas import QuotaKeeper
from loracache.daemon.recorder import Recorder
from loracache.daemon.rest_process import RestProcess
from loracache.errors import ConfigError, UsageError
from loracache.namespaces import Namespaces
from loracache.storage_backends.base import StorageBackend

__all__ = ["books", "quotas", "recorder", "rest_process", "tiers"]

_log = logging.getLogger(__name__)
_PRIVATE = "private "  # what the owner of a folder begins with that is an engine's own daemon
_PATIENCE_S = 10.0  # how long a private daemon waits for another engine's to leave the folder, or its trace


def tiers(config: Config, describe: Callable[[bytes], Mapping[bytes, bytes]], post: Callable[..., None]) -> TieredCache:
    """The cache, with its arena and the tiers below; describe(namespace): see Namespaces.record; post: of the loop.
    Raises ConfigError."""
    disk, redis = _disk_backend(config), _redis_backend(config, describe)
    return TieredCache(
        Arena(config.memory, config.page_size, config.hugepages),
        post,
        disk=disk,
        disk_limit=config.disk,
        redis=redis,
        **config.model_dump(include={"policy", "disk_policy", "admission", "keep_share"}),
    )


def _disk_backend(config: Config) -> StorageBackend | None:
    """The disk tier, where there is one. Raises ConfigError."""
    if config.disk_path is None:
        return None
    from loracache.storage_backends.disk.backend import DiskBackend
    from loracache.storage_backends.disk.lock import DiskInUse

    owner = f"{_PRIVATE if config.private else ''}daemon at unix://{config.socket}"
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return DiskBackend(config.disk_path, sync=config.disk_sync, integrity_key=_secret(config), owner=owner)
        except DiskInUse as error:
            if not config.private or not error.owner.startswith(_PRIVATE) or time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def _redis_backend(config: Config, describe: Callable[[bytes], Mapping[bytes, bytes]]) -> StorageBackend | None:
    """The Redis tier, where there is one. Raises ConfigError."""
    if config.redis is None:
        return None
    from loracache.storage_backends.redis.backend import RedisBackend

    return RedisBackend(
        config.redis,
        prefix=config.redis_prefix,
        password_file=config.redis_password_file,
        integrity_key=_secret(config),
        ttl_s=config.redis_ttl or 0,
        max_bytes=config.redis_max_bytes or 0,
        describe=describe,
    )


def books(config: Config) -> tuple[Namespaces, AdapterNames]:
    """What is kept beside the disk tier, where there is one. Raises ConfigError."""
    folders = [config.disk_path / name if config.disk_path else None for name in ("namespaces", "adapters")]
    try:
        namespaces = Namespaces(folders[0], sync=config.disk_sync, read=False)
        return namespaces, AdapterNames(folders[1], _shared_names(config), _secret(config), sync=config.disk_sync)
    except OSError as error:
        raise ConfigError(
            f"disk_path: {error.filename!r} cannot be used: {error.strerror}; remove what stands there, or give "
            "another folder"
        ) from None


def quotas(
    config: Config,
    cache: TieredCache,
    namespaces: Namespaces,
    adapters: Adapters,
    audit: Audit,
    stack: contextlib.ExitStack,
) -> QuotaKeeper:
    """Quotas as they are configured, and were given since. Raises ConfigError, with `stack` closed, for one that cannot
    be kept."""
    folder = config.disk_path / "quotas" if config.disk_path is not None else None
    keeper = QuotaKeeper(cache, namespaces, adapters, audit, folder, sync=config.disk_sync)
    try:
        keeper.begin((*each.subject, each.tier, each.soft, each.hard) for each in config.quotas)
    except UsageError as error:
        stack.close()
        raise ConfigError(f"quotas: {error}") from None
    return keeper


def rest_process(config: Config, stack: contextlib.ExitStack) -> RestProcess | None:
    """The REST process, not started yet, where there is one; `stack` ends it. Raises ConfigError."""
    if config.http is None:
        return None
    process = RestProcess(config)
    stack.callback(process.close)
    return process


def recorder(
    config: Config, counters: Counters, post: Callable[[Callable[[], None]], None], stack: contextlib.ExitStack
) -> Recorder | None:
    """What records the daemon's requests, where they are to be recorded; `stack` ends it. post: calls on the event
    loop. Raises ConfigError."""
    if config.record is None:
        return None
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            recording = Recorder(config.record, config.page_size, lambda name: post(lambda: counters.add(name)))
        except BlockingIOError:
            if not config.private or time.monotonic() >= deadline:  # of the engine before, which is ending
                raise ConfigError(
                    f"record={str(config.record)!r} is written by another daemon; give each one of its own"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            _log.warning("nothing is recorded to %s: %s", config.record, error.strerror)
            counters.add("record.failed")
            return None
        else:
            stack.callback(recording.close)
            return recording


def _shared_names(config: Config) -> SharedNames | None:
    if config.redis is None:
        return None
    from loracache.storage_backends.redis.names import RedisNames

    return RedisNames(config.redis, prefix=config.redis_prefix, password_file=config.redis_password_file)


def _secret(config: Config) -> bytes | None:
    return config.integrity_key.get_secret_value().encode() if config.integrity_key is not None else None
