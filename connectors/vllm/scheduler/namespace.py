# SPDX-License-Identifier: Apache-2.0
"""In which namespace a request's KV is: what this engine computes with, and for whom."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from loracache.connectors.vllm.common.messages import AdapterBinding
from loracache.connectors.vllm.scheduler.adapters import ServedAdapters
from loracache.connectors.vllm.scheduler.media import MediaContents
from loracache.connectors.vllm.scheduler.requests import RequestState
from loracache.groups import Group
from loracache.keys import Namespace, salt_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

__all__ = ["EngineNamespace"]


class EngineNamespace:
    """The namespaces of one engine. identity: tells its model's, None while it is not known. layout,
    chunk_tokens and groups are set once the workers' facts are known.
    """

    def __init__(self, vllm_config: VllmConfig, identity: Callable[[], str | None], adapters: ServedAdapters) -> None:
        self._config = vllm_config
        self._identity = identity
        self._adapters = adapters
        self._media = MediaContents()
        self._epoch = ""
        self.layout = ""
        self.chunk_tokens = 0
        self.groups: tuple[Group, ...] = ()

    @property
    def known(self) -> bool:
        """Whether the model's identity is known; until then no request is settled."""
        return self._identity() is not None

    def begin_epoch(self) -> None:
        """The weights changed in place: what is computed from now on is another model's, and nobody else's."""
        self._epoch = f"#{os.urandom(8).hex()}"

    def learn_media(self, request: Request) -> None:
        """A request that is not cached leaves encoder outputs in the engine all the same, under whatever names."""
        if request.mm_features:
            self._media.ask(request.mm_features)

    def settle(self, state: RequestState) -> bool:
        """Settle a request's media, namespace and adapter; False while the content of one, or of the model, is not
        known."""
        if not self._settle_media(state):
            return False
        if state.namespace is not None:
            return True
        identity = self._identity()
        if identity is None:
            return False
        request = state.request
        digest = ""
        if request.lora_request is not None:
            known, found = self._adapters.digest(request.lora_request)
            if not known:
                return False
            if found is None:
                state.cacheable = False
                return False
            digest = found
            state.adapter = AdapterBinding(request.lora_request.lora_int_id, digest)
        state.namespace = Namespace(
            model=identity + self._epoch,
            kv_dtype=_kv_dtype(self._config),
            layout=self.layout,
            chunk_tokens=self.chunk_tokens,
            adapter=digest,
            salt=salt_digest(request.cache_salt),
            groups=self.groups,
        )
        return True

    def _settle_media(self, state: RequestState) -> bool:
        features = state.request.mm_features
        if not features:
            return True
        if getattr(self._config, "ec_transfer_config", None) is not None:
            state.cacheable = False  # another engine's encoder outputs, found by whatever identifier
            return False
        if state.media is None:
            state.media = self._media.ask(features)
        if not state.media.done():
            return False
        media = state.media.result()
        if media is None or self._media.doubted(media):
            state.cacheable = False
            return False
        return True


def _kv_dtype(config: VllmConfig) -> str:
    """What the numbers in the KV cache are, one word for one kind: "fp8" is short for "fp8_e4m3", and where the
    platform's fp8 is FNUZ (MI300) the same bytes are other numbers, though the device's type is "cuda" there too."""
    name: str = config.cache_config.cache_dtype
    if name == "auto":
        return str(config.model_config.dtype).removeprefix("torch.")
    if not name.startswith("fp8"):
        return name
    from vllm.platforms import current_platform

    whole = "fp8_e4m3" if name == "fp8" else name
    return f"{whole}fnuz" if current_platform.is_fp8_fnuz() else whole
