# SPDX-License-Identifier: Apache-2.0
"""The worker's side where its KV is registered: what is a layer, and what turns the cache off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loracache.connectors.vllm.common.messages import ChunkBlocks, Load, StepPlan, Store
from loracache.connectors.vllm.worker import objects as objects_module
from loracache.connectors.vllm.worker import side as side_module
from loracache.kernels.page_copy import CopyError
from loracache.keys import Namespace

BLOCKS = 8


def test_a_device_that_cannot_be_copied_from_turns_the_cache_off(
    make_side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(layers: Any, bounce_below: Any) -> Any:
        raise CopyError("the Python package cuda-bindings is missing")

    monkeypatch.setattr(side_module, "GatedCopier", refused)
    assert "cuda-bindings is missing" in make_side("unix:///nowhere.sock").facts.problem


def test_a_layer_that_shares_anothers_kv_is_no_layer_of_the_shard(
    daemon: Any, make_side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects_module, "shard_name", lambda config, layers, group, replicated: "+".join(layers))
    own = torch.zeros(BLOCKS, 2, 16, 16)
    side = make_side(daemon().url, tensors={"first": own, "second": torch.zeros_like(own), "shares": own[:]})
    (facts,) = side.facts.groups
    assert facts.shard == "first+second"
    assert facts.block_bytes == (2 * own[0].numel() * 4,)


@pytest.mark.parametrize(
    "tensors",
    [
        {"layer": torch.zeros(2, BLOCKS, 16)[:, :, ::2]},
        {"layer": [torch.zeros(4)]},
        {"layer": torch.zeros(BLOCKS, 2, 16, 16, device="meta")},  # as on an XPU: a device that nothing copies from
    ],
)
def test_kv_that_cannot_be_moved_turns_the_cache_off(make_side: Any, tensors: Any) -> None:
    side = make_side("unix:///nowhere.sock", tensors=tensors)
    assert side.facts.problem
    stored = Store("a", Namespace("m" * 64, "float32", "cpu/H.N.C", 16), b"", (ChunkBlocks(bytes(32), (0,)),), None, 1)
    loaded = Load("b", (ChunkBlocks(bytes(32), (1,)),), None, 16)
    plan = StepPlan(step=1, stores=[stored], loads=[loaded], await_stores={"a"})
    side.handle_preemptions(plan)
    side.start_loads(plan)
    side.take_stores(plan)
    assert side.take_finished()[0] == {"a"}
