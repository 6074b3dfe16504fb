"""The registered namespaces, kept beside the disk tier so that an operator can name a model and not a digest.

Threading: the cache's thread; a descriptor is a few hundred bytes, written once per namespace.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from loracache.errors import UsageError
from loracache.keys import Namespace

__all__ = ["Namespaces"]

_log = logging.getLogger(__name__)
_MOST = 1 << 20


class Namespaces:
    """Digest -> Namespace. With a folder, what is registered survives a restart."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[bytes, Namespace] = {}
        self._by_adapter: dict[str, list[bytes]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.json"):
                try:
                    self._remember(Namespace.parse(path.read_text()))
                except (OSError, UsageError, UnicodeDecodeError) as error:
                    _log.warning("%s is no namespace descriptor and is ignored: %s", path, error)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, digest: bytes) -> Namespace | None:
        """The namespace of a digest."""
        return self._known.get(digest)

    def adapters(self) -> list[str]:
        """Hex digests of the adapters that any namespace is of."""
        return [adapter for adapter in self._by_adapter if adapter]

    def of_adapter(self, adapter: str) -> list[bytes]:
        """Digests of the namespaces of one adapter (hex digest)."""
        return self._by_adapter.get(adapter, [])

    def register(self, descriptor: str) -> Namespace:
        """Make a namespace known. Raises UsageError where `descriptor` is not one."""
        namespace = Namespace.parse(descriptor)
        digest = namespace.digest()
        if digest in self._known:
            return namespace
        if len(self._known) >= _MOST:
            raise UsageError(f"{_MOST} namespaces are registered already; restart with an empty namespaces folder")
        if self._folder is not None:
            path = self._folder / f"{digest.hex()}.json"
            temporary = path.with_suffix(".tmp")
            try:
                temporary.write_text(namespace.descriptor())
                os.replace(temporary, path)
            except OSError as error:  # a full disk must not stop the cache; the name is lost at the next start
                _log.warning("namespace %s is not kept: %s", path.name, error)
        self._remember(namespace)
        return namespace

    def _remember(self, namespace: Namespace) -> None:
        digest = namespace.digest()
        if digest not in self._known:
            self._known[digest] = namespace
            self._by_adapter.setdefault(namespace.adapter, []).append(digest)
