# SPDX-License-Identifier: Apache-2.0
"""Which adapter content a `lora_int_id` stands for, as the scheduler knows it.

vLLM keeps the weights first loaded under an id, whatever path or files a later request names. So KV is keyed by what
the engine serves for the id: an id is bound to the digest of the files first seen for it; a worker hashes what it
really loads (worker/adapters.py), and its word wins.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from loracache.connectors.vllm.common.recent import Recent

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

__all__ = ["ServedAdapters"]

_log = logging.getLogger(__name__)


class ServedAdapters:
    """The scheduler's bindings, of the ids that were used last. `ask(path)` sends the daemon a question,
    `answer(number)` is (done, digest or None), `abandon(number)` says that nobody wants the answer any more."""

    def __init__(
        self,
        ask: Callable[[str], int | None],
        answer: Callable[[int], tuple[bool, str | None]],
        abandon: Callable[[int], None],
    ) -> None:
        self._ask = ask
        self._answer = answer
        self._abandon = abandon
        self._digests: Recent[int, str | None] = Recent()
        self._asked: Recent[int, int] = Recent()

    def digest(self, request: LoRARequest) -> tuple[bool, str | None]:
        """(known by now, the digest; None where its content cannot be known). Asks the daemon at the first sight of
        an id.
        """
        adapter = request.lora_int_id
        if adapter in self._digests and adapter not in self._asked:
            return self._bind(request, self._digests[adapter])
        number = self._asked.get(adapter)
        if number is None:
            if not os.path.isdir(request.lora_path):
                return self._bind(request, None)
            number = self._ask(request.lora_path)
            if number is None:
                return False, None
            self._asked[adapter] = number
            for abandoned in self._asked.drop_oldest().values():
                self._abandon(abandoned)
        done, digest = self._answer(number)
        if not done:
            return False, None
        del self._asked[adapter]
        return self._bind(request, digest) if digest is not None else (False, None)

    def asked(self, adapter: int) -> bool:
        """Whether an answer about an id is on its way."""
        return adapter in self._asked

    def renew(self, request: LoRARequest) -> None:
        """The engine was told to load this id anew: what it serves must be asked for again."""
        self._digests.pop(request.lora_int_id, None)

    def correct(self, adapter: int, digest: str) -> None:
        """A worker says what it loaded under an id ("": it does not know)."""
        old = self._digests.get(adapter)
        self._asked.pop(adapter, None)
        self._remember(adapter, digest or None)
        if old is not None and old != digest:
            _log.info("adapter id %d now serves content %s", adapter, digest[:12] or "unknown")

    def serves(self, adapter: int, digest: str) -> bool:
        """Whether the id still stands for this content."""
        return self._digests.used(adapter) == digest

    def _bind(self, request: LoRARequest, digest: str | None) -> tuple[bool, str | None]:
        first = request.lora_int_id not in self._digests
        self._remember(request.lora_int_id, digest)
        if digest is None and first:
            _log.warning("adapter %s has no local folder; its KV is not cached", request.lora_name)
        return True, digest

    def _remember(self, adapter: int, digest: str | None) -> None:
        self._digests[adapter] = digest
        self._digests.drop_oldest()
