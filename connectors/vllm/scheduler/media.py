# SPDX-License-Identifier: Apache-2.0
"""What the images and the like in a prompt are: a hash of what the model is given of them.

vLLM's own identifiers are not content: where its processor cache and its prefix cache are both off they are a counter,
a caller may give any text (`uuid`), and with LoRA on the vision tower they hold an adapter's name. So each item's
processed tensors are hashed, with names, dtypes and shapes; that covers every processor setting, the engine's and the
request's. What cannot be hashed makes its request not cacheable: an item whose tensors are not in this process (vLLM's
shared-memory processor cache, encoder outputs of another engine) or not in its memory.

vLLM keeps encoder outputs by identifier. An identifier seen with two contents may bring either's KV, so requests with
any of the two are not cacheable from then on.

Threading: asked by the scheduler's loop; hashes (2 GB/s) on one thread of its own, while the request goes without.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from loracache.connectors.vllm.common.recent import Recent
from loracache.keys import Media

__all__ = ["MediaContents", "item_content"]

_log = logging.getLogger(__name__)
_KNOWN = 1 << 16  # identifiers and doubts remembered: more than any engine's encoder cache holds


class _NoContentError(Exception):
    """It holds something whose bytes are not at hand."""


class MediaContents:
    """The contents of one engine's media."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "media")
        self._lock = threading.Lock()
        self._hashed: dict[int, tuple[weakref.ref[Any], str | None]] = {}  # items that vLLM's cache gives again
        self._seen: Recent[str, str] = Recent()  # identifier -> content
        self._doubted: Recent[str, None] = Recent()  # contents that shared an identifier

    def ask(self, features: Sequence[Any]) -> Future[tuple[Media, ...] | None]:
        """The contents and places of a request's media (MultiModalFeatureSpec); None where one cannot be known."""
        items = [
            (each.identifier, each.modality, each.data, each.mm_position.offset, each.mm_position.length)
            for each in features
        ]
        return self._thread.submit(self._answer, items)

    def doubted(self, media: Sequence[Media]) -> bool:
        """Whether the engine may compute one of these with another's encoder output."""
        with self._lock:
            return any(item.identifier in self._doubted for item in media)

    def _answer(self, items: Sequence[tuple[str, str, Any, int, int]]) -> tuple[Media, ...] | None:
        try:
            return self._contents(items)
        except Exception:  # noqa: BLE001 - top of the thread
            _log.exception("media of a request cannot be hashed; its KV is not cached")
            return None

    def _contents(self, items: Sequence[tuple[str, str, Any, int, int]]) -> tuple[Media, ...] | None:
        media = []
        for identifier, modality, data, offset, length in items:
            content = self._content(modality, data)
            self._learn(identifier, content or "")
            media.append(Media(content or "", offset, length))
        return tuple(media) if all(item.identifier for item in media) else None

    def _content(self, modality: str, data: Any) -> str | None:
        known = self._hashed.get(id(data))
        if known is not None and known[0]() is data:
            return known[1]
        content = item_content(modality, data)
        if content is not None:
            key = id(data)
            self._hashed[key] = (weakref.ref(data, lambda _: self._hashed.pop(key, None)), content)
        return content

    def _learn(self, identifier: str, content: str) -> None:
        with self._lock:
            before = self._seen.get(identifier, content)
            self._seen[identifier] = content
            if before != content:
                self._doubted.update({before: None, content: None})
            self._seen.drop_oldest(most=_KNOWN)
            self._doubted.drop_oldest(most=_KNOWN)


def item_content(modality: str, data: Any) -> str | None:
    """Hex digest of a processed item (MultiModalKwargsItem); None where it has no tensors of its own in host memory."""
    if not isinstance(data, Mapping):
        return None
    state = hashlib.sha256(b"loracache/media\0")
    try:
        _feed(state, modality)
        tensors = 0
        for name in sorted(data):
            _feed(state, name)
            tensors += _feed(state, data[name].data)
    except _NoContentError:
        return None
    return state.hexdigest() if tensors else None  # the shared-memory cache sends numbers: where the tensors are


def _feed(state: Any, value: Any) -> int:
    """Hash a value, framed so that two never run into each other; answers how many tensors it holds."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu" or value.layout is not torch.strided:
            raise _NoContentError
        state.update(f"t{value.dtype}{tuple(value.shape)};".encode())
        if value.numel():
            state.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return 1
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise _NoContentError
        state.update(f"n{value.dtype.str}{value.shape};".encode())
        state.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b"")
        return 1
    if isinstance(value, list | tuple):
        state.update(f"l{len(value)};".encode())
        return sum(_feed(state, each) for each in value)
    if isinstance(value, str | bool | int | float):
        text = repr(value).encode()
        state.update(f"{type(value).__name__}{len(text)};".encode() + text)
        return 0
    raise _NoContentError
