# SPDX-License-Identifier: Apache-2.0
"""What a worker makes of the KV caches that it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loracache.connectors.vllm.worker import side as side_module
from loracache.kernels.page_copy import CopyError

BLOCKS = 8


def test_a_device_that_cannot_be_copied_from_turns_the_cache_off(
    make_side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(layers: Any) -> Any:
        raise CopyError("the Python package cuda-bindings is missing")

    monkeypatch.setattr(side_module, "GatedCopier", refused)
    assert "cuda-bindings is missing" in make_side("unix:///nowhere.sock").facts.problem


def test_a_layer_that_shares_anothers_kv_is_no_layer_of_the_shard(
    daemon: Any, make_side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_module, "shard_name", lambda config, layers: "+".join(layers))
    own = torch.zeros(BLOCKS, 2, 16, 16)
    side = make_side(daemon().url, tensors={"first": own, "second": torch.zeros_like(own), "shares": own[:]})
    assert side.facts.shard == "first+second"
    assert side.facts.block_bytes == 2 * own[0].numel() * 4
