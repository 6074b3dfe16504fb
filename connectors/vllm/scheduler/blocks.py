# SPDX-License-Identifier: Apache-2.0
"""What vLLM keys its own blocks by, where a request has an adapter.

vLLM's prefix cache knows an adapter by its name (and, since 0.31, its path), so it would serve KV of weights that were
replaced: by `load_inplace`, by files overwritten before they are loaded again, by unloading a name and loading it anew.
We know when that happens: workers number the contents that an adapter's id has served (worker/adapters.py). A request
whose adapter is not the first content of the first id of its name has the id and that number in the hashes of its
blocks. An engine in which nothing is replaced has vLLM's own hashes.

Numbers are never used twice: blocks that a request computed partly before and partly after a replacement are under a
number that nobody asks for any more. A request that was hashed before the scheduler learnt of a replacement is hashed
anew while it waits; one that was scheduled by then is told by its `Prefix`, which the worker compares with what it
serves. Threading: the scheduler's loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loracache.connectors.vllm.common.recent import Recent
from loracache.connectors.vllm.lora.paths import digest_in

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

__all__ = ["BlockKeys"]


class BlockKeys:
    """The keys of one engine's requests. towers: adapters change what the encoders of images and the like compute, so
    that vLLM has the adapter's name in the identifiers of media.
    """

    def __init__(self, towers: bool = False) -> None:
        self._towers = towers
        self._first: Recent[str, int] = Recent()  # name -> the id it was first seen with
        self._forgot = False  # names: one that is not known may have been, so no id is its first
        self._contents: Recent[int, int] = Recent()

    def learn(self, contents: dict[int, int]) -> set[int]:
        """Take the numbers of the contents that ids serve now; answers the ids that serve another one than before."""
        changed = {each for each, number in contents.items() if number > max(self._contents.get(each, 0), 1)}
        for adapter, number in contents.items():
            self._contents[adapter] = max(number, self._contents.get(adapter, 0))
        self._contents.drop_oldest()  # a worker finds out who is hashed without the number then
        return changed

    def key(self, request: Request) -> int:
        """Hash a request that waits for its adapter's content of now; answers that content's number."""
        adapter = request.lora_request
        if adapter is None:
            return 0
        hasher: Any = getattr(request, "_block_hasher", None)
        mark = self._mark(adapter)
        if hasher is not None and mark != getattr(hasher, "mark", ""):
            stock = hasher.stock if isinstance(hasher, _Hasher) else hasher
            request._block_hasher = _Hasher(stock, mark) if mark else stock
            if self._towers:
                before = f"{adapter.lora_name}{getattr(hasher, 'mark', '')}:"
                for feature in request.mm_features or ():
                    if feature.identifier.startswith(before):
                        feature.identifier = f"{adapter.lora_name}{mark}:{feature.identifier[len(before) :]}"
            request.block_hashes.clear()
            request.update_block_hashes()
        return self._contents.used(adapter.lora_int_id) or 0

    def _mark(self, adapter: LoRARequest) -> str:
        digest = digest_in(adapter.lora_path)
        if digest is not None:
            return f"#{digest}"
        number = self._contents.get(adapter.lora_int_id, 0)
        first = self._first.used(adapter.lora_name)
        if first is None:
            first = self._first[adapter.lora_name] = 0 if self._forgot else adapter.lora_int_id
            self._forgot = bool(self._first.drop_oldest()) or self._forgot
        if first == adapter.lora_int_id and number <= 1:
            return ""
        return f"#{adapter.lora_int_id}.{max(number, 1)}"


class _Hasher:
    """vLLM's hasher of one request, which reads its adapter's name with the mark behind it."""

    __slots__ = ("mark", "stock")

    def __init__(self, stock: Any, mark: str) -> None:
        self.stock = stock
        self.mark = mark

    def __call__(self, request: Request) -> Any:
        adapter = request.lora_request
        assert adapter is not None
        request.lora_request = type(adapter)(
            adapter.lora_name + self.mark, adapter.lora_int_id, adapter.lora_path + self.mark
        )
        try:
            return self.stock(request)
        finally:
            request.lora_request = adapter
