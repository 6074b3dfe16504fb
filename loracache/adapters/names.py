# SPDX-License-Identifier: Apache-2.0
"""Names of adapters: which content a name points to. Kept beside the disk tier and, where there is one, in the Redis.

A record is replaced whole: whoever asks gets the old content's digest or the new one's. With a Redis all machines that
share it agree, for it is asked every time; while it cannot be, what was last known here is answered. What the Redis
lost, or never had, it is given again when it is asked for.

Threading: `put`, `find` and `remove` block and are called on threads of their own, any number at a time; what is
known here may be looked at from any thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from loracache.errors import Unavailable, UsageError
from loracache.folder import make_folder, make_folders, sync_folder, write_file
from loracache.keys import is_digest

__all__ = ["AdapterNames", "NameRecord", "SharedNames", "check_name"]

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][\w.:@+/-]{0,199}", re.ASCII)
_END_OF_TIME = 2.0**36  # seconds; a clock that shows more is none
_NORMAL = "normal"
_PRIORITIES = ("low", _NORMAL, "high")
_TYPES = (str, str, str, float, int, str)  # of a record's fields
_PAUSE_S = 1.0  # a Redis that failed is not asked again before that


def check_name(name: str) -> None:
    """Raises UsageError where `name` cannot be an adapter's."""
    if not _NAME.fullmatch(name) or is_digest(name) or ".." in name:
        raise UsageError(
            f"{name[:210]!a} cannot be an adapter's name: 1 to 200 of letters, digits and _ . : @ + / -, beginning "
            f"with a letter or digit, without '..', and not a digest"
        )


@dataclass(frozen=True, slots=True)
class NameRecord:
    """digest: hex, or "" for a name that was removed. config: the adapter_config.json it was added with. added: Unix
    seconds. version: grows with every change of the name, so that the later of two records is known. priority: of what
    is of the adapter, low, normal or high."""

    name: str
    digest: str
    config: str
    added: float
    version: int
    priority: str = _NORMAL

    def encode(self, key: bytes | None) -> bytes:
        """As JSON, under a MAC where there is a key."""
        fields = asdict(self)
        if self.priority == _NORMAL:
            del fields["priority"]  # as before there were any
        body = json.dumps(fields, sort_keys=True)
        return json.dumps([body, _mac(body, key)]).encode()

    @classmethod
    def decode(cls, data: bytes, key: bytes | None) -> NameRecord:
        """Raises ValueError where it is none, or where its MAC is not ours."""
        try:
            body, mac = json.loads(data)
            if not hmac.compare_digest(mac, _mac(body, key)):
                raise ValueError("its MAC does not match integrity_key")
            record = cls(**json.loads(body))
            check_name(record.name)
            if tuple(map(type, astuple(record))) != _TYPES or not 0 <= record.added < _END_OF_TIME:
                raise ValueError("its fields are not those of a record")
            if record.digest and not is_digest(record.digest):
                raise ValueError("its digest is none")
            if record.priority not in _PRIORITIES:
                raise ValueError(f"its priority is {record.priority:.20}")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no record of a name: {error}") from None
        return record


class SharedNames(ABC):
    """Where all machines look. Every method raises Unavailable where that cannot be reached in bounded time."""

    @abstractmethod
    def get(self, name: str) -> bytes | None:
        """The record of a name."""

    @abstractmethod
    def all(self) -> list[bytes]:
        """All records."""

    @abstractmethod
    def put(self, name: str, record: bytes, *, only_new: bool = False) -> None:
        """Set a name's record (only_new: where it has none)."""

    @abstractmethod
    def close(self) -> None:
        """The last call."""


class AdapterNames:
    """Name -> record. `changed(before, after)` is called, on the calling thread, when what is known here changes; it
    asks nothing here. sync: what `put` and `remove` did survives a crash of the machine."""

    def __init__(
        self, folder: Path | None, shared: SharedNames | None, integrity_key: bytes | None = None, *, sync: bool = False
    ) -> None:
        self._folder = folder
        self.sync = sync
        self._shared = shared
        self._key = integrity_key
        self.changed: Callable[[NameRecord | None, NameRecord], None] = lambda before, after: None
        self._lock = threading.Lock()
        self._known: dict[str, NameRecord] = {}
        self._left_alone_until = 0.0
        self._unmade = False  # the folder, so far
        self.read()

    def read(self) -> None:
        """Learn what the folder holds and is not known better. One that cannot be reached now holds nothing. Raises
        OSError for what is not a folder of ours.
        """
        if self._folder is None:
            return
        problem = make_folder(self._folder, sync=self.sync)
        self._unmade = bool(problem)
        if problem:
            _log.warning("names are not kept in %s for now: %s", self._folder, problem)
        for path in self._folder.glob("*.json"):
            try:
                record = NameRecord.decode(path.read_bytes(), self._key)
                if path != self._path(record.name):
                    raise ValueError(f"it is the record of {record.name} in another's place")
                self._remember(record, None)
            except (OSError, ValueError) as error:
                _log.warning("%s is ignored: %s", path, error)

    @property
    def waits(self) -> bool:
        """Whether `find` may have to wait for somebody."""
        return self._shared is not None

    def known(self) -> dict[str, NameRecord]:
        """What this machine knows, without asking anybody."""
        with self._lock:
            return {name: record for name, record in self._known.items() if record.digest}

    def find(self, name: str) -> NameRecord | None:
        """What the name points to now."""
        record = self._known.get(name)
        if self._shared is not None and time.monotonic() >= self._left_alone_until:
            try:
                record = self._agree(name, record, self._shared.get(name))
            except ValueError as error:  # of this name only: the others are asked for all the same
                _log.warning("what the Redis has of the name %.210s is ignored: %s", name, error)
            except Unavailable as error:
                self._leave_alone(error)
        return record if record is not None and record.digest else None

    def refresh(self) -> None:
        """Learn the names that other machines gave."""
        if self._shared is None or time.monotonic() < self._left_alone_until:
            return
        with self._lock:
            ours = dict(self._known)
        try:
            for data in self._shared.all():
                with contextlib.suppress(ValueError):
                    name = NameRecord.decode(data, self._key).name
                    self._agree(name, ours.get(name), data)
        except Unavailable as error:
            self._leave_alone(error)

    def put(self, name: str, digest: str, config: str, priority: str = "") -> None:
        """Point a name at a digest, here and everywhere, with a priority ("": the one that it has). Raises UsageError
        for a name that cannot be, Unavailable (and nothing changed) where the Redis cannot be told or the folder not
        written."""
        check_name(name)
        self._set(name, digest, config, priority)

    def prioritize(self, name: str, priority: str) -> NameRecord | None:
        """Give a name another priority; answers its record, or None where nobody knows it. Raises Unavailable as
        `put`."""
        before = self._latest(name)
        if before is None or not before.digest:
            return None
        return self._set(name, before.digest, before.config, priority, before.added)

    def remove(self, name: str) -> NameRecord | None:
        """Forget a name, here and everywhere; answers what it pointed to. Raises Unavailable as `put`."""
        before = self._latest(name)
        if before is None or not before.digest:
            return None
        self._set(name, "", "", _NORMAL)  # a record too: a machine that knows the name still must not bring it back
        return before

    def close(self) -> None:
        """The last call."""
        if self._shared is not None:
            self._shared.close()

    def _set(self, name: str, digest: str, config: str, priority: str, added: float | None = None) -> NameRecord:
        before, now = self._latest(name), time.time()
        priority = priority or (before.priority if before is not None else _NORMAL)
        # A time, so that it is the later one, too, than what another machine gave to a Redis that has lost it since.
        version = max(int(now * 1e6), before.version + 1 if before is not None else 1)
        record = NameRecord(name, digest, config, now if added is None else added, version, priority)
        file = self._write(record)  # may fail: before the Redis is told, which cannot be untold
        if self._shared is not None:
            self._shared.put(name, record.encode(self._key))
        self._remember(record, file)
        if self.sync and self._folder is not None:
            try:
                sync_folder(self._folder)
            except OSError as error:
                raise Unavailable(f"the name {name} may not outlive a crash of the machine: {error}") from None
        return record

    def _latest(self, name: str) -> NameRecord | None:
        """The newest record there is; raises Unavailable where that cannot be known."""
        ours = self._known.get(name)
        if self._shared is None:
            return ours
        try:
            return self._agree(name, ours, self._shared.get(name))
        except ValueError as error:
            raise Unavailable(str(error)) from None

    def _agree(self, name: str, ours: NameRecord | None, data: bytes | None) -> NameRecord | None:
        """Take the Redis's record, or give it ours where it has none or an older one. ours: as known before the Redis
        was asked, so that it has an older one only where it lost ours."""
        assert self._shared is not None
        theirs = NameRecord.decode(data, self._key) if data is not None else None
        if theirs is not None and theirs.name != name:
            raise ValueError(f"it is the record of {theirs.name}")
        if ours is not None and (theirs is None or theirs.version < ours.version):
            self._shared.put(name, ours.encode(self._key), only_new=theirs is None)
            return ours
        if theirs is not None and theirs != ours:
            file = None
            try:
                file = self._write(theirs)
            except Unavailable as error:  # it is true all the same
                _log.warning("%s", error)
            self._remember(theirs, file)
        return theirs

    def _leave_alone(self, error: Exception) -> None:
        _log.warning("names are looked up on this machine only for %g s: %s", _PAUSE_S, error)
        self._left_alone_until = time.monotonic() + _PAUSE_S

    def _write(self, record: NameRecord) -> Path | None:
        """The record in a file that is not in its place yet. Raises Unavailable."""
        if self._folder is None:
            return None
        path = self._path(record.name).with_suffix(f".{threading.get_ident()}.tmp")
        try:
            if self._unmade:
                make_folders(self._folder, sync=self.sync)
                self._unmade = False
            write_file(path, record.encode(self._key), sync=self.sync)
        except OSError as error:
            raise Unavailable(f"the name {record.name} cannot be kept in {self._folder}: {error}") from None
        return path

    def _remember(self, record: NameRecord, file: Path | None) -> None:
        with self._lock:
            before = self._known.get(record.name)
            if before is not None and before.version > record.version:
                return  # another thread knows more by now
            if file is not None:
                os.replace(file, self._path(record.name))
            self._known[record.name] = record
            self.changed(before, record)  # in here, so that changes are told in their order

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()}.json"


def _mac(body: str, key: bytes | None) -> str:
    return hashlib.blake2b(body.encode(), key=hashlib.sha256(key).digest(), digest_size=32).hexdigest() if key else ""
