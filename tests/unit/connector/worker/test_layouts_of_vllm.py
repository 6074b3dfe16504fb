# SPDX-License-Identifier: Apache-2.0
"""Every layout that vLLM allocates, by its own code: accepted, moved in as few runs as it allows, and moved right. And
which one vLLM takes when the connector asks for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from loracache.connectors.vllm.common import releases
from loracache.connectors.vllm.common.geometry import payload_layout
from loracache.connectors.vllm.connector import LoRACacheConnector
from loracache.connectors.vllm.worker.layout import KVLayout, read_layout
from loracache.errors import ConfigError
from loracache.kernels.page_copy import Move, PageCopier

BLOCKS, LAYERS, HEADS = 5, 3, 2
NAMES = [f"model.layers.{number}.attn" for number in range(LAYERS)]
FULL = FullAttentionSpec(block_size=16, num_kv_heads=HEADS, head_size=64, dtype=torch.bfloat16)
SPECS: dict[str, FullAttentionSpec] = {
    "bf16": FULL,
    "fp8": FullAttentionSpec(
        block_size=16, num_kv_heads=HEADS, head_size=64, dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR
    ),
    "fp8 with a scale a token and head": FullAttentionSpec(
        block_size=16,
        num_kv_heads=HEADS,
        head_size=64,
        dtype=torch.uint8,
        kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD,
        state_content_bytes=2 * (64 + 4),
    ),
    "one head": FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16),
    "MLA": MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16),
    "MLA fp8": MLAAttentionSpec(
        block_size=64, num_kv_heads=1, head_size=656, dtype=torch.uint8, cache_dtype_str="fp8_ds_mla"
    ),
}


def allocated(layout: KVCacheLayout, spec: KVCacheSpec, names: Sequence[str] = NAMES) -> dict[str, torch.Tensor]:
    """As a worker would allocate it: five blocks."""
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        num_gpu_blocks_override=BLOCKS,
        prefix_cache_retention_interval=None,
    )
    config: Any = SimpleNamespace(cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None))
    kv_config = get_kv_cache_config_from_groups(config, [KVCacheGroupSpec(list(names), spec)], 1 << 30)
    return dict(allocate_kv_cache(kv_config, torch.device("cpu"), layout))


def fill(caches: dict[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(caches):
        values = torch.randint(0, 100, caches[name].shape, generator=generator)
        caches[name].copy_(values.to(caches[name].dtype))


def gathered(caches: dict[str, torch.Tensor], layout: KVLayout, blocks: Sequence[int]) -> bytearray:
    payload = bytearray(layout.block_bytes * len(blocks))
    PageCopier(layout.rows).gather([Move(blocks, [memoryview(payload)], 0, len(blocks))]).wait()
    return payload


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("order", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_every_layout_is_moved_whole_and_in_as_few_runs_as_it_has(
    order: KVCacheLayout, spec: FullAttentionSpec
) -> None:
    here, there = allocated(order, spec), allocated(order, spec)
    fill(here, 1), fill(there, 2)
    before = {name: tensor.clone() for name, tensor in there.items()}
    layout, second = read_layout(here, BLOCKS), read_layout(there, BLOCKS)
    heads = spec.num_heads if order is KVCacheLayout.LHBNC else 1
    assert len(layout.rows) == (1 if order.is_block_outermost else LAYERS * heads)
    assert layout.block_bytes == LAYERS * spec.page_size_bytes
    payload = gathered(here, layout, [4, 1])
    PageCopier(second.rows).scatter([Move([2], [memoryview(payload)], 1, 2)]).wait()
    for name in NAMES:
        assert torch.equal(there[name][2], here[name][1])
        others = [0, 1, 3, 4]
        assert torch.equal(there[name][others], before[name][others])


@pytest.mark.parametrize("blocks", [[3], [3, 0]])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_layouts_with_other_payloads_have_other_names(spec: FullAttentionSpec, blocks: Sequence[int]) -> None:
    found: dict[str, set[bytes]] = {}
    names = {}
    for order in KVCacheLayout:
        caches = allocated(order, spec)
        fill(caches, 3)
        layout = read_layout(caches, BLOCKS)
        names[order] = payload_layout(layout.order, len(blocks))
        found.setdefault(names[order], set()).add(bytes(gathered(caches, layout, blocks)))
    assert all(len(payloads) == 1 for payloads in found.values())
    one_block = len(blocks) == 1
    assert (names[KVCacheLayout.BLNHC] == names[KVCacheLayout.LBNHC]) is one_block
    assert (names[KVCacheLayout.BLHNC] == names[KVCacheLayout.LBHNC]) is one_block
    assert (names[KVCacheLayout.LBHNC] == names[KVCacheLayout.LBNHC]) is (spec.num_heads == 1)


@pytest.mark.parametrize("order", [KVCacheLayout.LBNHC, KVCacheLayout.BLHNC], ids=lambda layout: layout.name)
def test_layers_of_two_kinds_in_one_block_are_moved_whole(order: KVCacheLayout) -> None:
    """As an indexer beside MLA, or layers that are not quantised."""
    narrow = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=132, dtype=torch.uint8)
    kinds = {name: SPECS["MLA"] if place != 1 else narrow for place, name in enumerate(NAMES)}
    spec = UniformTypeKVCacheSpecs(block_size=64, kv_cache_specs=kinds)
    here, there = allocated(order, spec), allocated(order, spec)
    fill(here, 1)
    layout, second = read_layout(here, BLOCKS), read_layout(there, BLOCKS)
    assert layout.block_bytes == sum(each.page_size_bytes for each in kinds.values())
    assert len(layout.rows) == (1 if order.is_block_outermost else LAYERS)
    payload = gathered(here, layout, [4, 1])
    PageCopier(second.rows).scatter([Move([2, 3], [memoryview(payload)], 0, 2)]).wait()
    for name in NAMES:
        assert torch.equal(there[name][[2, 3]], here[name][[4, 1]])


@pytest.mark.parametrize("order", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_blocks_that_the_kernel_splits_are_moved_whole_where_vllm_can_split_them(order: KVCacheLayout) -> None:
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: order, num_gpu_blocks_override=BLOCKS, prefix_cache_retention_interval=None
    )
    config: Any = SimpleNamespace(cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None))
    kv_config = get_kv_cache_config_from_groups(config, [KVCacheGroupSpec(NAMES, SPECS["MLA"])], 1 << 30)
    try:
        here = allocate_kv_cache(kv_config, torch.device("cpu"), order, [16])
    except ValueError:  # vLLM refuses it
        assert order.is_block_outermost
        return
    fill(here, 1)
    layout = read_layout(here, BLOCKS)
    assert here[NAMES[0]].shape[0] == 4 * BLOCKS
    first = gathered(here, layout, [1])
    assert bytes(first[: len(first) // LAYERS]) == here[NAMES[0]][4:8].contiguous().view(torch.uint8).numpy().tobytes()


def asking(layout: str, multi: bool = False) -> Any:
    """What vLLM resolves an engine's layout by."""
    from vllm.config import KVTransferConfig

    own = {
        "kv_connector": "LoRACacheConnector",
        "kv_connector_module_path": LoRACacheConnector.__module__,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kv_layout": layout} if layout else {},
    }
    several = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [own]},
    }
    cache = SimpleNamespace(kv_cache_layout=None)
    return SimpleNamespace(cache_config=cache, kv_transfer_config=KVTransferConfig(**(several if multi else own)))


ANY = [layout.name for layout in (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)]


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize(
    ("asked", "supported", "taken"),
    [
        ("", ANY, "LBNHC"),
        ("BLNHC", ANY, "BLNHC"),
        ("BLHNC", ["LBHNC", "BLHNC"], "BLHNC"),
        ("BLNHC", ["LBHNC", "BLHNC"], "LBHNC"),  # refused by the attention: vLLM's own
        ("BLNHC", [layout.name for layout in CPUAttentionBackend.supported_kv_cache_layouts()], "LBHNC"),
    ],
)
def test_vllm_takes_the_layout_that_is_asked_for_where_the_attention_can(
    monkeypatch: pytest.MonkeyPatch, asked: str, supported: list[str], taken: str, multi: bool
) -> None:
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    assert resolve_kv_cache_layout(asking(asked, multi), [supported]).name == taken


def test_a_release_without_these_layouts_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert releases.has_kv_layouts()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"kv_layout='BLNHC' needs vLLM 0\.29"):
        LoRACacheConnector.get_required_kvcache_layout(asking("BLNHC"))
    assert LoRACacheConnector.get_required_kvcache_layout(asking("")) is None
