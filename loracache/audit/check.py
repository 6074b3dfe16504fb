# SPDX-License-Identifier: Apache-2.0
"""The check of all that a configuration names: a folder that nobody uses, or one in use, by asking its daemon."""

from __future__ import annotations

import os
from pathlib import Path

from loracache.audit.books import check_names, read_namespaces
from loracache.audit.disk import DiskCheck
from loracache.audit.faults import Fault, Report
from loracache.audit.redis import check_redis
from loracache.audit.running import check_running, content, key_of
from loracache.config import Config
from loracache.errors import ConfigError
from loracache.storage_backends.base import ObjectInfo
from loracache.storage_backends.disk.lock import DiskInUse, lock_folder

__all__ = ["check"]


def check(config: Config, *, fix: bool) -> Report:
    """Look at the disk folder and the Redis of `config`, and mend what is safe to where `fix` says so; of a folder that
    a daemon uses, ask that daemon too.

    Raises ConfigError where there is nothing to look at or somebody else uses the folder, Unavailable without the Redis
    or the daemon.
    """
    if config.disk_path is None and config.redis is None:
        raise ConfigError("there is nothing to check; give --disk-path, --redis, or --config with either")
    key = key_of(config)
    if config.disk_path is None:
        return _check(config, key, fix)
    if not (config.disk_path / "objects").is_dir():
        raise ConfigError(f"disk_path {str(config.disk_path)!r} is not a disk tier: it has no folder 'objects'")
    try:
        lock = lock_folder(config.disk_path, f"check of process {os.getpid()}")
    except DiskInUse as error:
        what, _, server = error.owner.partition(" at ")
        if what.endswith("daemon") and server:
            return check_running(server, config, fix=fix)
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
        there, shared = check_redis(config, key, report, fix=fix)
    held = there
    if config.disk_path is not None:
        held = _check_disk(config.disk_path, key, report, fix)
        for name in held.keys() & there.keys():
            if content(held[name]) != content(there[name]):
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
