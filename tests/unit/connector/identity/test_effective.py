# SPDX-License-Identifier: Apache-2.0
"""Every option of vLLM is in the identity, or in the list of what is known not to change KV; the docs say which."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from vllm.config import (
    AttentionConfig,
    CacheConfig,
    CompilationConfig,
    KernelConfig,
    LoadConfig,
    LoRAConfig,
    ModelConfig,
    MultiModalConfig,
    ParallelConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.config.utils import config

from loracache.connectors.vllm.identity.effective import config_classes, counted_fields, default_of, options_table
from loracache.connectors.vllm.identity.not_counted import NOT_COUNTED

DOCS = Path(__file__).parents[4] / "docs" / "vllm.md"
# Of releases other than the one that the tests run on.
OTHER_RELEASES = {
    "VllmConfig": "watchdog_config",
    "ModelConfig": "enable_return_routed_experts",
    "CacheConfig": "cpu_kvcache_space_bytes swap_space cpu_offload_gb simple_cpu_offload_num_blocks",
    "AttentionConfig": "trtllm_ragged_backend indexer_tp_shard_min_rows minimax_m3_indexer_cp",
    "KernelConfig": "monokernel",
    "SpeculativeConfig": "fly_window_size fly_entropy_threshold fly_entropy_top_k",
    "CompilationConfig": "bs_to_padded_graph_size",
}


def test_the_docs_list_every_option_of_this_vllm() -> None:
    """A field that a new release brings fails here: it counts until somebody has looked at it."""
    assert options_table() in DOCS.read_text(), "docs/vllm.md needs the table that options_table() gives"


def test_the_list_names_no_field_that_is_gone() -> None:
    classes = config_classes()
    for name, reasons in NOT_COUNTED.items():
        listed = [field for names in reasons.values() for field in names.split()]
        assert len(listed) == len(set(listed)), name
        assert set(listed) - set(classes[name]) == set(OTHER_RELEASES.get(name, "").split()), name


def test_all_configuration_that_an_engine_is_made_of_is_known() -> None:
    classes = config_classes()
    assert {"VllmConfig", "ModelConfig", "CacheConfig", "LoadConfig", "SpeculativeConfig", "MultiModalConfig"} <= set(
        classes
    )
    assert sum(map(len, classes.values())) > 400


@config
class NextCacheConfig(CacheConfig):  # type: ignore[misc]
    """A class of the next release, with an option that nobody has seen."""

    kv_magic: str = "none"


def test_a_field_that_nobody_has_heard_of_counts_unless_it_is_its_default() -> None:
    assert "kv_magic" not in counted_fields(NextCacheConfig())
    changed = NextCacheConfig()
    changed.kv_magic = "more"
    assert counted_fields(changed)["kv_magic"] == "more"


OWNERS = [
    VllmConfig, ModelConfig, MultiModalConfig, CacheConfig, ParallelConfig, LoadConfig, AttentionConfig, KernelConfig,
    LoRAConfig, SpeculativeConfig, CompilationConfig,
]  # fmt: skip


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_each_plain_field_counts_or_is_listed(owner: type) -> None:
    """Change one field after the other: the counted ones change what comes out, the listed ones do not."""
    changed: Any = object.__new__(owner)
    for field in dataclasses.fields(owner):
        object.__setattr__(changed, field.name, default_of(field))
    listed = {field for names in NOT_COUNTED[owner.__name__].values() for field in names.split()}
    for field in dataclasses.fields(owner):
        object.__setattr__(changed, field.name, "another value")
        assert (field.name in counted_fields(changed)) == (field.name not in listed), field.name
        object.__setattr__(changed, field.name, default_of(field))
