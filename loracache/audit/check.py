# SPDX-License-Identifier: Apache-2.0
"""The check of all that a configuration names, without a daemon."""

from __future__ import annotations

import os
from pathlib import Path

from loracache.audit.books import check_names, read_namespaces
from loracache.audit.disk import DiskCheck
from loracache.audit.faults import Fault, Report
from loracache.audit.redis import RedisCheck
from loracache.config import Config
from loracache.errors import ConfigError, Unavailable
from loracache.keys import LORA_NAMESPACE
from loracache.storage_backends.base import ObjectInfo
from loracache.storage_backends.disk.lock import DiskInUse, lock_folder
from loracache.storage_backends.header import check_integrity_key
from loracache.storage_backends.redis.hashes import RedisHash
from loracache.storage_backends.redis.names import RedisNames
from loracache.storage_backends.redis.urls import Target, parse_target

__all__ = ["check"]

_TIMEOUT_S = 5.0


def check(config: Config, *, fix: bool) -> Report:
    """Look at the disk folder and the Redis of `config`, and mend what is safe to where `fix` says so.

    Raises ConfigError where there is nothing to look at or a daemon uses the folder, Unavailable without the Redis.
    """
    if config.disk_path is None and config.redis is None:
        raise ConfigError("there is nothing to check; give --disk-path, --redis, or --config with either")
    key = config.integrity_key.get_secret_value().encode() if config.integrity_key is not None else None
    check_integrity_key(key)
    if config.disk_path is None:
        return _check(config, key, fix)
    if not (config.disk_path / "objects").is_dir():
        raise ConfigError(f"disk_path {str(config.disk_path)!r} is not a disk tier: it has no folder 'objects'")
    try:
        lock = lock_folder(config.disk_path, f"check of process {os.getpid()}")
    except DiskInUse as error:
        raise ConfigError(
            f"disk_path {str(config.disk_path)!r} is in use by the LoRACache {error.owner or 'daemon'}; a check needs "
            "the folder to itself: stop that one first"
        ) from None
    except OSError as error:
        raise ConfigError(f"disk_path {str(config.disk_path)!r} cannot be locked: {error.strerror}") from None
    try:
        return _check(config, key, fix)
    finally:
        if lock >= 0:
            os.close(lock)


def _check(config: Config, key: bytes | None, fix: bool) -> Report:
    report = Report()
    there: dict[bytes, ObjectInfo] = {}
    shared: list[bytes] = []
    if config.redis is not None:
        there, shared = _check_redis(config, key, report, fix)
    held = there
    if config.disk_path is not None:
        held = _check_disk(config.disk_path, key, report, fix)
        for name in held.keys() & there.keys():
            if _content(held[name]) != _content(there[name]):
                report.add("disk and redis", Fault.CONTRADICTION, name.hex(), nbytes=held[name].size)
    folder = config.disk_path / "adapters" if config.disk_path is not None else Path(os.devnull)
    check_names(folder, shared, lambda digest: digest in held or digest in there, key, report, fix=fix)
    return report


def _check_disk(path: Path, key: bytes | None, report: Report, fix: bool) -> dict[bytes, ObjectInfo]:
    namespaces = read_namespaces(path / "namespaces", report, fix=fix)
    work = DiskCheck(
        path,
        report,
        integrity_key=key,
        namespaces={each.digest() for each in namespaces},
        adapters={each.adapter_key() for each in namespaces if each.adapter},
        fix=fix,
    )
    try:
        work.run()
    except OSError as error:
        raise ConfigError(f"disk_path {str(path)!r} cannot be read: {error.strerror or error}") from None
    return work.objects


def _check_redis(
    config: Config, key: bytes | None, report: Report, fix: bool
) -> tuple[dict[bytes, ObjectInfo], list[bytes]]:
    """Its objects, and its records of names."""
    assert config.redis is not None
    target = parse_target(config.redis, _TIMEOUT_S, config.redis_password_file)
    work = RedisCheck(target, config.redis_prefix, report, integrity_key=key, fix=fix)
    work.run()
    try:
        told = _descriptors(target, config.redis_prefix)
        for key_, info in work.objects.items():
            if info.namespace not in told:
                report.add("redis", Fault.UNDESCRIBED, f"{key_.hex()} of {info.namespace.hex()}", nbytes=info.size)
    except Unavailable as error:
        report.add("redis", Fault.UNREADABLE, f"the hash of namespaces: {error}")
    names = RedisNames(config.redis, prefix=config.redis_prefix, password_file=config.redis_password_file)
    try:
        return work.objects, names.all()
    except Unavailable as error:
        report.add("redis", Fault.UNREADABLE, f"the hash of names: {error}")
        return work.objects, []
    finally:
        names.close()


def _descriptors(target: Target, prefix: str) -> set[bytes]:
    """The namespaces that the Redis has a word on."""
    fields = RedisHash(target, f"{prefix}:namespaces")
    try:
        return {LORA_NAMESPACE, *fields.all()}
    finally:
        fields.close()


def _content(info: ObjectInfo) -> tuple[object, ...]:
    return info.parent, info.kind, info.namespace, info.size, info.checksum
