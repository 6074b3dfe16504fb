# SPDX-License-Identifier: Apache-2.0
"""The front end's side: `model=NAME` finds an adapter that only the cache knows.

vLLM remembers for ever what a name stands for. Names of the cache may be re-pointed at any time, so each request asks
the daemon anew (a fraction of a millisecond), and another content becomes another adapter for the engine: another id,
and a path that holds the digest, so that vLLM's prefix cache tells the two apart. Requests under way keep the old one.
While no daemon answers a name stands for what it stood for last, and nobody waits (questions.py).

Threading: the front end's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from contextvars import ContextVar
from typing import Any

from vllm.lora.request import LoRARequest

from loracache.connectors.vllm.common.options import own_options
from loracache.connectors.vllm.common.private import private_server
from loracache.connectors.vllm.common.recent import Recent
from loracache.connectors.vllm.frontend.questions import NameQuestions
from loracache.connectors.vllm.lora.paths import digest_in, path_of
from loracache.errors import LoRACacheError, Unavailable

__all__ = ["resolve_names_through_the_cache"]

_log = logging.getLogger(__name__)
_asked: ContextVar[str] = ContextVar("asked", default="")


def resolve_names_through_the_cache(models: Any) -> NameQuestions:
    """Give an OpenAIServingModels the cache's names beside its own. vLLM asks it for names it does not know where
    VLLM_ALLOW_RUNTIME_LORA_UPDATING is set. Answers what asks the daemon, for whoever wants to close it."""
    config = models.engine_client.vllm_config
    options = own_options(config)
    questions = NameQuestions(options.server or private_server(config.kv_transfer_config.engine_id, options.disk_path))
    stock = models.resolve_lora
    models.lora_requests = requests = _Requests(models.lora_requests)
    models.lora_resolver_lock = _Locks()

    async def resolve(lora_name: str) -> Any:
        known = requests.used(lora_name)
        if known is not None and digest_in(known.lora_path) is None:
            return known  # given to vLLM by path
        try:
            digest = await questions.digest(lora_name)
        except LoRACacheError as error:
            known = requests.get(lora_name)
            digest = digest_in(known.lora_path) if known is not None else None
            if digest is None:  # vLLM answers as for any name it does not know: it may be one, or not
                _log.warning("the name %.200r is not known here, and cannot be asked for: %s", lora_name, error)
            elif not isinstance(error, Unavailable):
                _log.warning("the name %s is taken for what it was: %s", lora_name, error)
        if digest is None:
            requests.pop(lora_name, None)
            return await stock(lora_name)
        async with models.lora_resolver_lock[lora_name]:
            known = requests.get(lora_name)
            if known is None or digest_in(known.lora_path) != digest:
                known = LoRARequest(lora_name, models.lora_id_counter.inc(1), path_of(digest))
                await models.engine_client.add_lora(known)
                requests.remember(lora_name, known)
        _asked.set(lora_name)
        return known

    models.resolve_lora = resolve
    return questions


class _Requests(dict[str, LoRARequest]):
    """vLLM's names. One of the cache's is in here only for the task that has just asked what it stands for, so that the
    next one asks again; and of those only the ones that were asked for last."""

    def __init__(self, given: dict[str, LoRARequest]) -> None:
        super().__init__(given)
        self._resolved: Recent[str, None] = Recent()

    def remember(self, name: str, request: LoRARequest) -> None:
        """What a name of the cache stands for."""
        self[name] = request
        self._resolved[name] = None
        for dropped in self._resolved.drop_oldest():
            known = self.get(dropped)
            if known is not None and digest_in(known.lora_path) is not None:
                del self[dropped]

    def used(self, name: str) -> LoRARequest | None:
        """What it stood for last."""
        self._resolved.used(name)
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        known = self.get(name)  # type: ignore[call-overload]
        return known is not None and (digest_in(known.lora_path) is None or _asked.get() == name)


class _Locks:
    """A lock for each name, as long as somebody waits for it or has it: anybody may ask for any name."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock
