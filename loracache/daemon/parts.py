# SPDX-License-Identifier: Apache-2.0
"""Makes the daemon's parts from its configuration."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping

from loracache.adapters.names import AdapterNames, SharedNames
from loracache.cache.tiered import TieredCache
from loracache.config import Config
from loracache.control.adapters import Adapters
from loracache.control.audit import Audit
from loracache.control.quotas import QuotaKeeper
from loracache.daemon.rest_process import RestProcess
from loracache.errors import ConfigError, UsageError
from loracache.namespaces import Namespaces
from loracache.storage_backends.base import StorageBackend

__all__ = ["books", "disk_backend", "quotas", "redis_backend", "rest_process"]

_PRIVATE = "private "  # what the owner of a folder begins with that is an engine's own daemon
_PATIENCE_S = 10.0  # how long a private daemon waits for another engine's to leave the folder


def disk_backend(config: Config) -> StorageBackend | None:
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


def redis_backend(config: Config, describe: Callable[[bytes], Mapping[bytes, bytes]]) -> StorageBackend | None:
    """The Redis tier, where there is one; describe(namespace): see Namespaces.record. Raises ConfigError."""
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


def _shared_names(config: Config) -> SharedNames | None:
    if config.redis is None:
        return None
    from loracache.storage_backends.redis.names import RedisNames

    return RedisNames(config.redis, prefix=config.redis_prefix, password_file=config.redis_password_file)


def _secret(config: Config) -> bytes | None:
    return config.integrity_key.get_secret_value().encode() if config.integrity_key is not None else None
