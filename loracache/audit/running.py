# SPDX-License-Identifier: Apache-2.0
"""The check of all that a running daemon has: its index beside the files, manifest and books of its disk folder, and
beside the Redis. What seems wrong, while everything may change, is looked at again and counts if it still is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loracache.audit.books import check_names, read_namespaces
from loracache.audit.daemon import DaemonIndex
from loracache.audit.faults import Fault, Report
from loracache.audit.live import GRACE_S, LiveDiskCheck
from loracache.audit.redis import check_redis
from loracache.client.client import CacheClient
from loracache.config import Config
from loracache.errors import ConfigError
from loracache.keys import LORA_NAMESPACE
from loracache.storage_backends.base import ObjectInfo
from loracache.storage_backends.header import check_integrity_key
from loracache.storage_backends.redis.backend import RedisBackend

__all__ = ["check_running", "content", "key_of"]

_TIMEOUT_S = 30.0
_PART = 256


def check_running(server: str, config: Config, *, fix: bool) -> Report:
    """Look at what the daemon at `server` has, and at the Redis of `config`; have dropped from its index what has no
    file or a bad one where `fix` says so, and mend what is safe to in the Redis.

    Raises ConfigError where `config` is of something else, Unavailable without the daemon or the Redis.
    """
    key = key_of(config)
    report = Report()
    with CacheClient(server, timeout=_TIMEOUT_S, name="check") as client:
        settings = client.config()
        path = _folder(server, config, settings)
        index = DaemonIndex(client)
        index.wait_until_read()
        there: dict[bytes, ObjectInfo] = {}
        shared: list[bytes] = []
        if config.redis is not None:
            there, shared = check_redis(config, key, report, fix=fix)
            _compare(index, there, config, key, report)
        elif settings["redis"] is not None:
            report.notes.append("the daemon's Redis was not looked at; give --redis, or --config with it")
        if path is not None:
            disk = LiveDiskCheck(index, path, report, integrity_key=key, fix=fix)
            disk.run()
            _twice(report, disk.check_manifest)
        named = index.all()
        report.checked["index"] = len(named)
        _twice(report, index.recount)
        _twice(report, lambda seen: _check_books(index, path, there, shared, key, seen))
    return report


def key_of(config: Config) -> bytes | None:
    """The integrity_key of a configuration. Raises ConfigError for one that cannot be."""
    key = config.integrity_key.get_secret_value().encode() if config.integrity_key is not None else None
    check_integrity_key(key)
    return key


def content(info: ObjectInfo) -> tuple[object, ...]:
    """What is the same of an object wherever it is kept."""
    return info.parent, info.kind, info.namespace, info.size, info.checksum


def _folder(server: str, config: Config, settings: dict[str, Any]) -> Path | None:
    """The daemon's disk folder. Raises ConfigError where its settings do not go with ours."""
    if (settings["integrity_key"] is None) != (config.integrity_key is None):
        has, lacks = ("has no", "leave it out") if settings["integrity_key"] is None else ("has an", "give the same")
        raise ConfigError(f"the daemon at {server} {has} integrity_key; {lacks} (LORACACHE_INTEGRITY_KEY, --config)")
    theirs = Path(settings["disk_path"]) if settings["disk_path"] else None
    ours = config.disk_path or theirs
    if ours is None:
        return None
    if theirs is None or (theirs.is_absolute() and os.path.realpath(theirs) != os.path.realpath(ours)):
        raise ConfigError(f"disk_path {str(ours)!r} is not that of the daemon at {server}, which has {str(theirs)!r}")
    if config.disk_path is None and not theirs.is_absolute():
        raise ConfigError(f"the daemon's disk_path {str(theirs)!r} is relative to where it runs; give --disk-path")
    if not (ours / "objects").is_dir():
        raise ConfigError(f"disk_path {str(ours)!r} of the daemon at {server} cannot be seen from here")
    return ours


def _twice(report: Report, look: Callable[[Report], None]) -> None:
    """Count what `look` finds, where there is anything, only if a second look finds it too."""
    first, second = Report.of_all(), Report.of_all()
    look(first)
    if first.findings:
        time.sleep(GRACE_S)
        look(second)
        report.add_common(first, second)


def _compare(
    index: DaemonIndex, there: dict[bytes, ObjectInfo], config: Config, key: bytes | None, report: Report
) -> None:
    """Objects that the index and the Redis have, and have otherwise."""
    named = index.all()
    differ = {each for each in named.keys() & there.keys() if content(named[each]) != content(there[each])}
    if not differ:
        return
    assert config.redis is not None
    backend = RedisBackend(
        config.redis, prefix=config.redis_prefix, password_file=config.redis_password_file, integrity_key=key
    )
    try:
        keys = list(differ)
        for at in range(0, len(keys), _PART):
            part = keys[at : at + _PART]
            before = index.ask(part)
            held = {each: result.info for each, result in zip(part, backend.contains(part), strict=True)}
            after = index.ask(part)
            for each in part:
                ours, theirs = after.get(each), held[each]
                if ours is not None and before.get(each) == ours and theirs and content(ours) != content(theirs):
                    report.add("index and redis", Fault.CONTRADICTION, each.hex(), nbytes=ours.size)
    finally:
        backend.close()


def _check_books(
    index: DaemonIndex,
    path: Path | None,
    there: dict[bytes, ObjectInfo],
    shared: list[bytes],
    key: bytes | None,
    report: Report,
) -> None:
    """Descriptors of namespaces and names of adapters. What the daemon is writing now has names of its own."""
    if path is not None:
        held = index.all("disk")
        told = {LORA_NAMESPACE, *(each.digest() for each in read_namespaces(path / "namespaces", report, fix=False))}
        for info in held.values():
            if info.namespace not in told:
                report.add("disk", Fault.UNDESCRIBED, f"{info.key.hex()} of {info.namespace.hex()}", nbytes=info.size)
    folder = path / "adapters" if path is not None else Path(os.devnull)
    check_names(folder, shared, lambda digest: digest in there or bool(index.ask([digest])), key, report, fix=False)
