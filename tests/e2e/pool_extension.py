# SPDX-License-Identifier: Apache-2.0
"""What the tests look up in a worker: vLLM's `worker_extension_cls` mixes it into the worker class."""

from __future__ import annotations

from typing import Any


class PoolExtension:
    """Methods for `collective_rpc`."""

    def lora_manager(self: Any) -> str:
        """The class that manages adapters here."""
        return type(self.model_runner.lora_manager).__name__

    def pool_state(self: Any) -> dict[str, Any]:
        """The pool's books."""
        manager = self.model_runner.lora_manager._adapter_manager
        pool = manager.pool
        return {
            "problems": pool.audit(),
            "pages": pool.shape.pages,
            "free": pool.free_pages,
            "page_bytes": pool.shape.page * pool.shape.element_bytes,
            "resident": sorted(pool.digests()),
            "dense_bytes": _dense_bytes(manager),
        }


def _dense_bytes(manager: Any) -> int:
    """Bytes of what vLLM would have made for its slots: none, where the pool stands in their place."""
    total = 0
    for layer in manager.modules.values():
        for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
            tensors = stacked if isinstance(stacked, tuple) else [stacked]
            total += sum(tensor.nbytes for tensor in tensors if hasattr(tensor, "nbytes"))
    return total
