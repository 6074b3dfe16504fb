# SPDX-License-Identifier: Apache-2.0
"""The registered namespaces, kept beside the disk tier so that an operator can name a model and not a digest.

Threading: the cache's thread, but for `files`, which any thread may run, and `keep`, which blocks and has a thread of
its own; a descriptor is a few hundred bytes, written once per namespace.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sortedcontainers import SortedDict, SortedList

from loracache.errors import UsageError
from loracache.folder import make_folder, make_folders, replace_file, sync_folder
from loracache.keys import Namespace

__all__ = ["Namespaces"]

_log = logging.getLogger(__name__)
_MOST = 1 << 20
_MOST_NAMES = 16
_FILES = 100  # read between two looks at the socket
_LOOKED_AT, _FORGOTTEN = 500, 20  # in one call of `collect`: a millisecond
_PART = 1000  # looked at in one part of an answer: half a millisecond
_SHORTEST = 8  # digits of an identity that stand for it


Found = tuple[Namespace, list[str]]
"""A namespace that a file told of, and what engines call its model."""


class Namespaces:
    """Digest -> Namespace, and what engines call its model. With a folder, what is registered survives a restart once
    it was kept; with `sync` a crash of the machine, too.

    read: whether to read the folder at once; else somebody feeds what `files` finds to `learn`, and `reading` is set
    while there is more to come. Until then one that is asked for by its digest is looked for in its file.
    """

    def __init__(self, folder: Path | None, *, sync: bool = False, read: bool = True) -> None:
        """Raises OSError for what is no folder of ours; one that cannot be reached now holds nothing."""
        self._folder = folder
        self._sync = sync
        self._unkept: dict[bytes, str] = {}  # of each descriptor that is to be written, the file's content
        self._lock = threading.Lock()  # around changes of `_unkept`
        self.reading = False
        self._known: dict[bytes, Namespace] = {}
        self._used: dict[bytes, float] = {}  # when each was registered, or seen to hold something
        self._by_model: SortedDict[str, dict[bytes, None]] = SortedDict()
        self._by_adapter: SortedDict[str, SortedList[bytes]] = SortedDict()
        self._by_salt: dict[str, dict[bytes, None]] = {}
        self._names: dict[str, list[str]] = {}  # of each model identity
        self._called: dict[str, dict[str, None]] = {}  # the identities behind each name
        self._next: list[bytes] = []  # to be looked at by `collect`
        if self._folder is not None and (problem := make_folder(self._folder, sync=self._sync)):
            _log.warning("namespaces are not kept in %s for now: %s", self._folder, problem)
        if read:
            for found in self.files():
                self.learn(found)

    def files(self) -> Iterator[list[Found]]:
        """What the folder holds, a few files at a time. Raises OSError."""
        if self._folder is None:
            return
        make_folder(self._folder, sync=self._sync)
        paths = (path for path in self._folder.iterdir() if path.suffix == ".json")
        while part := list(itertools.islice(paths, _FILES)):
            yield [found for path in part if (found := _content(path)) is not None]

    def learn(self, found: Iterable[Found]) -> None:
        """Take note of what files told."""
        for namespace, names in found:
            if namespace.digest() not in self._known:
                self._remember(namespace)
            self._name(namespace.model, names)

    def collect(self, holds: Callable[[bytes], bool], unused_s: float, now: float) -> list[str]:
        """Look at the next few; forget those that were not registered, and held nothing, for so many seconds. Answers
        the adapters (hex digests) that none is of any more. holds(digest): whether it is in use now."""
        if not self._next:
            self._next = list(self._known)
        gone = []
        forgotten = 0
        for _ in range(min(_LOOKED_AT, len(self._next))):
            digest = self._next.pop()
            if digest not in self._known:
                continue
            if holds(digest):
                self._used[digest] = now
            elif now - self._used[digest] > unused_s:
                gone += self._forget(digest)
                forgotten += 1
                if forgotten == _FORGOTTEN:
                    break
        return gone

    def _forget(self, digest: bytes) -> list[str]:
        namespace = self._known.pop(digest)
        del self._used[digest], self._by_model[namespace.model][digest], self._by_salt[namespace.salt][digest]
        self._by_adapter[namespace.adapter].remove(digest)
        if not self._by_salt[namespace.salt]:
            del self._by_salt[namespace.salt]
        if not self._by_model[namespace.model]:
            del self._by_model[namespace.model]
            for name in self._names.pop(namespace.model, ()):
                del self._called[name][namespace.model]
                if not self._called[name]:
                    del self._called[name]
        if self._folder is not None:
            with self._lock:
                self._unkept.pop(digest, None)
            with contextlib.suppress(OSError):
                os.unlink(self._folder / f"{digest.hex()}.json")
        if self._by_adapter[namespace.adapter]:
            return []
        del self._by_adapter[namespace.adapter]
        return [namespace.adapter] if namespace.adapter else []

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._known)

    def get(self, digest: bytes) -> Namespace | None:
        """The namespace of a digest."""
        found = self._known.get(digest)
        if found is None and self.reading and self._folder is not None:
            content = _content(self._folder / f"{digest.hex()}.json", missing=True)
            if content is not None:
                self.learn([content])
                found = self._known.get(digest)
        return found

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

    def learn_fields(self, fields: Mapping[bytes, bytes]) -> None:
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
        return [digest for part in self.matching_parts(model, adapter, salt) for digest in part]

    def matching_parts(self, model: str, adapter: str | None, salt: str | None) -> Iterator[list[bytes]]:
        """The same, as they are found among a few at a time: there may be very many to look at, and between two parts
        others may be served. What is registered meanwhile may be missing."""
        models: set[str] | None = None
        among: Collection[bytes] = self._known
        if model:
            models, named = set(), []
            for part in self._model_parts(model):
                fresh = [each for each in dict.fromkeys(part) if each not in models]
                models.update(fresh)
                named += [digest for each in fresh for digest in self._by_model.get(each, ())]
                yield []
            among = named
        if adapter is not None:  # the fewest are looked at
            among = min(among, self.of_adapter(adapter), key=len)
        if salt is not None:  # what a tenant's question takes says nothing of other tenants
            own: Collection[bytes] = self._by_salt.get(salt, ())
            among = own if salt else min(among, own, key=len)
        among = list(among)
        for at in range(0, len(among), _PART):
            spaces = [(digest, self._known.get(digest)) for digest in among[at : at + _PART]]
            yield [digest for digest, space in spaces if space is not None and _matches(space, models, adapter, salt)]

    def knows(self, model: str) -> bool:
        """Whether any registered identity is meant by that."""
        return any(map(any, self._model_parts(model)))

    def _model_parts(self, model: str) -> Iterator[list[str]]:
        """The registered identities that `model` stands for, a few at a time; one may be among them twice."""
        called = [model, *self._called.get(model, ())]
        for at in range(0, len(called), _PART):
            yield [each for each in called[at : at + _PART] if each in self._by_model]
        after = model
        while len(model) >= _SHORTEST:
            part = list(itertools.islice(self._by_model.irange(after, inclusive=(False, True)), _PART))
            found = list(itertools.takewhile(lambda each: each.startswith(model), part))
            yield found
            if len(found) < _PART:
                return
            after = part[-1]

    def register(self, descriptor: str, names: Sequence[str] = ()) -> Namespace:
        """Make a namespace known, and `names` as what its model is called. Raises UsageError where `descriptor` is not
        one."""
        namespace = Namespace.parse(descriptor)
        digest = namespace.digest()
        fresh = self.get(digest) is None
        self._used[digest] = time.monotonic()
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
                replace_file(self._folder / f"{digest.hex()}.json", text.encode(), sync=self._sync)
                written.append(digest)
            if self._sync:
                sync_folder(self._folder)
        except OSError as error:
            _log.warning("%d namespaces are not kept for now: %s", len(going) - len(written), error)
            if self._sync:  # of none it is known whether its name is durable
                return
        with self._lock:
            for digest in written:
                if self._unkept.get(digest) is going[digest]:
                    del self._unkept[digest]

    def _name(self, model: str, names: Sequence[str]) -> bool:
        known = self._names.setdefault(model, []) if names else []
        new = [name for name in dict.fromkeys(names) if name and name not in known][: _MOST_NAMES - len(known)]
        known += new
        for name in new:
            self._called.setdefault(name, {})[model] = None
        return bool(new)

    def _remember(self, namespace: Namespace) -> None:
        digest = namespace.digest()
        self._known[digest] = namespace
        self._used[digest] = time.monotonic()
        self._by_model.setdefault(namespace.model, {})[digest] = None
        self._by_adapter.setdefault(namespace.adapter, SortedList()).add(digest)
        self._by_salt.setdefault(namespace.salt, {})[digest] = None


def _name_field(model: str, name: str) -> bytes:
    return json.dumps([model, name]).encode()


def _matches(namespace: Namespace, models: set[str] | None, adapter: str | None, salt: str | None) -> bool:
    return (
        (models is None or namespace.model in models)
        and (adapter is None or namespace.adapter == adapter)
        and (salt is None or namespace.salt == salt)
    )


def _content(path: Path, *, missing: bool = False) -> Found | None:
    """What a file tells: a descriptor, and the model's names behind it. None where it is none of ours. missing: it may
    well not be there."""
    try:
        descriptor, _, names = path.read_text().partition("\n")
        namespace = Namespace.parse(descriptor)
    except (OSError, UsageError, UnicodeDecodeError) as error:
        if not (missing and isinstance(error, FileNotFoundError)):
            _log.warning("%s is not a namespace descriptor and is ignored: %s", path, error)
        return None
    try:
        found = json.loads(names) if names.strip() else []
    except (ValueError, RecursionError):
        found = []
    known = isinstance(found, list) and all(isinstance(name, str) for name in found)
    return namespace, found if known else []
