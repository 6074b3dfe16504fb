# SPDX-License-Identifier: Apache-2.0
"""Replaces weights as users' own code does: vLLM's `worker_extension_cls` mixes it into the worker class."""

from __future__ import annotations

from typing import Any

import torch


class WeightsExtension:
    """Methods for `collective_rpc`."""

    def scale_embedding(self: Any, by: float) -> None:
        """Copy into a parameter, past everything that vLLM has for that."""
        with torch.no_grad():
            self.model_runner.get_model().model.embed_tokens.weight.data.mul_(by)

    def fingerprint_seconds(self: Any) -> float:
        """How long a look at the weights takes."""
        import time

        from loracache.connectors.vllm.worker.fingerprint import weights_fingerprint

        started = time.perf_counter()
        weights_fingerprint([self.model_runner.get_model()])
        return time.perf_counter() - started
