# SPDX-License-Identifier: Apache-2.0
"""The registered namespaces, kept beside the disk tier so that an operator can name a model and not a digest.

Threading: the cache's thread, but for `keep`, which blocks and has a thread of its own; a descriptor is a few hundred
bytes, written once per namespace.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from sortedcontainers import SortedDict, SortedList

from loracache.errors import UsageError
from loracache.folder import make_folder, make_folders, sync_folder, write_file
from loracache.keys import Namespace

__all__ = ["Namespaces"]

_log = logging.getLogger(__name__)
_MOST = 1 << 20
_MOST_NAMES = 16
_SHORTEST = 8  # digits of an identity that stand for it


class Namespaces:
    """Digest -> Namespace, and what engines call its model. With a folder, what is registered survives a restart once
    it was kept; with `sync` a crash of the machine, too.
    """

    def __init__(self, folder: Path | None, *, sync: bool = False) -> None:
        self._folder = folder
        self._sync = sync
        self._unkept: dict[bytes, str] = {}  # of each descriptor that is to be written, the file's content
        self._lock = threading.Lock()  # around changes of `_unkept`
        self._known: dict[bytes, Namespace] = {}
        self._by_model: SortedDict[str, list[bytes]] = SortedDict()
        self._by_adapter: SortedDict[str, SortedList[bytes]] = SortedDict()
        self._by_salt: dict[str, list[bytes]] = {}
        self._names: dict[str, list[str]] = {}  # of each model identity
        self._called: dict[str, list[str]] = {}  # the identities behind each name
        self.read()

    def read(self) -> None:
        """Learn what the folder holds. One that cannot be reached now holds nothing. Raises OSError for what is no
        folder of ours.
        """
        if self._folder is None:
            return
        problem = make_folder(self._folder, sync=self._sync)
        if problem:
            _log.warning("namespaces are not kept in %s for now: %s", self._folder, problem)
        for path in self._folder.glob("*.json"):
            try:
                self._read(path.read_text())
            except (OSError, UsageError, UnicodeDecodeError) as error:
                _log.warning("%s is not a namespace descriptor and is ignored: %s", path, error)

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._known)

    def get(self, digest: bytes) -> Namespace | None:
        """The namespace of a digest."""
        return self._known.get(digest)

    def names(self, model: str) -> Sequence[str]:
        """What engines call the model of an identity."""
        return self._names.get(model, ())

    def record(self, digest: bytes) -> dict[bytes, bytes]:
        """Fields that tell other machines of a namespace: its digest -> its descriptor, and of each of its model's
        names -> nothing. Any thread may ask."""
        namespace = self._known.get(digest)
        if namespace is None:
            return {}
        names = tuple(self._names.get(namespace.model, ()))
        return {digest: namespace.descriptor().encode()} | {_name_field(namespace.model, name): b"" for name in names}

    def learn(self, fields: Mapping[bytes, bytes]) -> None:
        """Know what such fields say, for as long as this lives. What is none of them is nobody's word."""
        for field, value in fields.items():
            with contextlib.suppress(UsageError, ValueError, RecursionError):
                if not value:
                    model, name = json.loads(field)
                    self._name(str(model), [str(name)])
                    continue
                namespace = Namespace.parse(value.decode())
                if namespace.digest() == field and field not in self._known:
                    self._remember(namespace)

    def name_fields(self, models: Collection[str]) -> list[bytes]:
        """The fields of the names that models (identities) have."""
        return [_name_field(model, name) for model in models for name in self._names.get(model, ())]

    def adapters(self) -> list[str]:
        """Hex digests of the adapters that any namespace is of."""
        return [adapter for adapter in self._by_adapter if adapter]

    def of_adapter(self, adapter: str) -> Sequence[bytes]:
        """Digests of the namespaces of one adapter (hex digest; "": of base models)."""
        found: Sequence[bytes] = self._by_adapter.get(adapter, ())
        return found

    def of_adapter_from(self, adapter: str, after: bytes) -> Iterator[bytes]:
        """The same in their order, from behind one on."""
        found: SortedList[bytes] | None = self._by_adapter.get(adapter)
        return iter(()) if found is None else found.irange(after, inclusive=(False, True))

    def adapters_from(self, after: str, count: int) -> list[str]:
        """The next `count` adapters (hex digests) behind `after` that any namespace is of."""
        return list(itertools.islice(self._by_adapter.irange(after, inclusive=(False, True)), count))

    def matching(self, model: str, adapter: str | None, salt: str | None) -> list[bytes]:
        """Digests of the namespaces of a model (an identity, its first 8 digits or more, or a name; "": any), an
        adapter ("": none, None: any) and a tenant's salt digest ("": none, None: any).
        """
        models = self._models(model) if model else None
        lists: list[Sequence[bytes]] = []  # there may be very many namespaces: begin with the fewest
        if models is not None:
            lists.append([digest for each in models for digest in self._by_model[each]])
        if adapter is not None:
            lists.append(self.of_adapter(adapter))
        if salt is not None:
            lists.append(self._by_salt.get(salt, ()))
        if not lists:
            return list(self._known)
        # What a tenant's question takes says nothing of other tenants.
        among = self._by_salt.get(salt, ()) if salt else min(lists, key=len)
        return [digest for digest in among if _matches(self._known[digest], models, adapter, salt)]

    def _models(self, model: str) -> set[str]:
        """The registered identities that `model` stands for."""
        found = {each for each in (model, *self._called.get(model, ())) if each in self._by_model}
        if len(model) >= _SHORTEST:
            found.update(itertools.takewhile(lambda each: each.startswith(model), self._by_model.irange(model)))
        return found

    def register(self, descriptor: str, names: Sequence[str] = ()) -> Namespace:
        """Make a namespace known, and `names` as what its model is called. Raises UsageError where `descriptor` is not
        one."""
        namespace = Namespace.parse(descriptor)
        digest = namespace.digest()
        fresh = digest not in self._known
        if fresh and len(self._known) >= _MOST:
            raise UsageError(f"{_MOST} namespaces are registered already; restart with an empty namespaces folder")
        if fresh:
            self._remember(namespace)
        if (self._name(namespace.model, names) or fresh) and self._folder is not None:
            with self._lock:
                self._unkept[digest] = f"{namespace.descriptor()}\n{json.dumps(self.names(namespace.model))}\n"
        return namespace

    @property
    def unkept(self) -> Sequence[bytes]:
        """Digests of those that are not written yet, or could not be."""
        with self._lock:
            return list(self._unkept)

    def keep(self) -> None:
        """Write what was registered and is not kept yet. What cannot be written now, on a full disk for example, is
        tried again at the next call. One call at a time.
        """
        with self._lock:
            going = dict(self._unkept)
        if self._folder is None or not going:
            return
        written = []
        try:
            make_folders(self._folder, sync=self._sync)
            for digest, text in going.items():
                path = self._folder / f"{digest.hex()}.json"
                fresh = path.with_suffix(".tmp")
                write_file(fresh, text.encode(), sync=self._sync)
                os.replace(fresh, path)
                written.append(digest)
            if self._sync:
                sync_folder(self._folder)
        except OSError as error:
            _log.warning("%d namespaces are not kept for now: %s", len(going) - len(written), error)
            if self._sync:  # of none it is known whether its name is durable
                return
        with self._lock:
            for digest in written:
                if self._unkept[digest] is going[digest]:
                    del self._unkept[digest]

    def _name(self, model: str, names: Sequence[str]) -> bool:
        known = self._names.setdefault(model, []) if names else []
        new = [name for name in dict.fromkeys(names) if name and name not in known][: _MOST_NAMES - len(known)]
        known += new
        for name in new:
            self._called.setdefault(name, []).append(model)
        return bool(new)

    def _remember(self, namespace: Namespace) -> None:
        digest = namespace.digest()
        self._known[digest] = namespace
        self._by_model.setdefault(namespace.model, []).append(digest)
        self._by_adapter.setdefault(namespace.adapter, SortedList()).add(digest)
        self._by_salt.setdefault(namespace.salt, []).append(digest)

    def _read(self, text: str) -> None:
        """A file's content: a descriptor, and the model's names behind it."""
        descriptor, _, names = text.partition("\n")
        namespace = Namespace.parse(descriptor)
        if namespace.digest() not in self._known:
            self._remember(namespace)
        try:
            found = json.loads(names) if names.strip() else []
        except (ValueError, RecursionError):
            found = []
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            self._name(namespace.model, found)


def _name_field(model: str, name: str) -> bytes:
    return json.dumps([model, name]).encode()


def _matches(namespace: Namespace, models: set[str] | None, adapter: str | None, salt: str | None) -> bool:
    return (
        (models is None or namespace.model in models)
        and (adapter is None or namespace.adapter == adapter)
        and (salt is None or namespace.salt == salt)
    )
