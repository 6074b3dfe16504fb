# SPDX-License-Identifier: Apache-2.0
"""What a worker makes of groups of layers that vLLM lays over one another: which bytes of a block are whose, what is in
an object of each group, and what engines have to agree on."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from loracache.connectors.vllm.common.messages import ChunkBlocks
from loracache.connectors.vllm.worker.layout import read_layout
from loracache.errors import UsageError
from loracache.kernels.page_copy import PageCopier

LAYOUTS = ["LBNHC", "LBHNC", "BLNHC", "BLHNC"]
PAGE, STATE = 2 * 16 * 64 * 2, 3 * 48 * 4 + 5 * 5 * 2  # bytes of 16 tokens, and of a state
ROUNDED = -(-STATE // 8) * 8


def payload(mixed: Any, group: int, *blocks: int) -> bytes:
    """Of an object of these blocks, cut in two as extents may be."""
    registered = mixed.read()
    objects = registered.objects[group]
    found = bytearray(objects.nbytes(len(blocks)))
    half = len(found) // 3 // 8 * 8
    parts = [memoryview(found)[:half], memoryview(found)[half:]]
    PageCopier(registered.rows).gather(objects.whole(ChunkBlocks(b"", blocks, 0, group), parts)).wait()
    return bytes(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_one_need_are_one_and_a_block_has_the_bytes_of_each_members_layers(
    make_mixed: Any, layout: str
) -> None:
    facts = make_mixed("window", layout=layout).read().facts
    assert [fact.block_bytes for fact in facts] == [(2 * PAGE,), (2 * PAGE, 2 * PAGE)]
    facts = make_mixed("state", layout=layout).read().facts
    assert [fact.block_bytes for fact in facts] == [(4 * PAGE,), (2 * ROUNDED, 2 * ROUNDED)]


@pytest.mark.parametrize("kind", ["window", "state"])
def test_an_object_holds_one_members_rows_behind_the_others(make_mixed: Any, kind: str) -> None:
    mixed = make_mixed(kind, layout="LBHNC")
    expected = [mixed.content(0, 5), mixed.content(0, 7)]
    assert payload(mixed, 0, 5, 7) == b"".join(page for layer in zip(*expected, strict=True) for page in layer)
    rows = mixed.content(1, 3) + mixed.content(2, 9)
    wide = PAGE if kind == "window" else ROUNDED
    found = payload(mixed, 1, 3, 9)
    assert [found[at : at + len(rows[0])] for at in range(0, len(found), wide)] == rows


def test_a_state_is_moved_whole_and_what_fills_its_page_stays(make_mixed: Any) -> None:
    """Registered as one page of bytes, or as views of it, which may come in any order."""
    source = make_mixed("state")
    for name in (name for names in source.names[1:] for name in names):
        page = source.caches[name].squeeze((1, 2))
        conv = page[:, : 3 * 48 * 4].view(torch.float32).view(-1, 3, 48)
        ssm = page[:, 3 * 48 * 4 : STATE].view(torch.bfloat16).view(-1, 5, 5)
        source.caches[name] = [ssm, conv] if name.endswith("1") else [conv, ssm]
    raw = make_mixed("state")
    assert payload(source, 1, 2, 4) == payload(raw, 1, 2, 4)
    assert source.read().facts[1].block_bytes == raw.read().facts[1].block_bytes
    before = raw.memory.clone()
    registered = raw.read()
    filled = bytearray(b"\x11" * registered.objects[1].nbytes(2))
    moves = registered.objects[1].whole(ChunkBlocks(b"", (2, 4), 0, 1), [memoryview(filled)])
    PageCopier(registered.rows).scatter(moves).wait()
    expected = before.view(2, -1, 2 * PAGE)  # two layers of each member, one behind the other
    expected[:, [2, 4], :ROUNDED] = 0x11
    assert torch.equal(raw.memory, before)


def test_parts_of_a_state_that_lie_apart_are_rows_of_their_own() -> None:
    spec = type("Spec", (), {"shapes": ((2, 4), (4,)), "dtypes": (torch.float32,) * 2, "mamba_type": "MAMBA1"})
    together = torch.zeros(6, 64, dtype=torch.float32)
    apart = [together[:, 32:40].view(6, 2, 4), together[:, :4]]
    layout = read_layout({"layer": apart}, 6, {"layer": spec})
    assert [tuple(row.shape) for row in layout.rows] == [(6, 2), (6, 4)]
    tiled = read_layout({"layer": [together[:, 4:12].view(6, 2, 4), together[:, :4]]}, 6, {"layer": spec})
    assert [tuple(row.shape) for row in tiled.rows] == [(6, 6)]
    assert layout.order != tiled.order


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(12, 1, 1, 16, dtype=torch.int8), "state of layer"),  # two pages a block
        (torch.zeros(6, 2, 4, 3)[..., :2], "in one piece"),
        (torch.zeros(6, 5, dtype=torch.int8), "state of layer"),  # what fills it up is another page's
        (torch.zeros(64, dtype=torch.int8)[4:58].view(6, 9)[:, :8], "multiple of 8"),
        (torch.zeros(90, dtype=torch.int8)[:90].as_strided((6, 10), (16, 1)), "state of layer"),  # no room behind
    ],
)
def test_states_that_cannot_be_moved_are_refused(tensor: Any, said: str) -> None:
    spec = type("Spec", (), {"shapes": ((2,),), "dtypes": (torch.float32,), "mamba_type": "MAMBA1"})
    with pytest.raises(UsageError, match=said):
        read_layout({"layer": tensor}, 6, {"layer": spec})


def test_engines_have_to_agree_on_dtypes_shapes_and_the_order_of_a_state(
    make_mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.mamba import mamba_utils

    def layout(**options: Any) -> str:
        return str(make_mixed("state", **options).read().facts[1].layout)

    told = layout()
    assert "state.MAMBA2.SD.3x48:float32,5x5:bfloat16" in told
    others = {
        layout(shapes=((48, 3), (5, 5))),
        layout(dtypes=(torch.float32, torch.float16)),
        layout(shapes=((3, 48), (25, 1))),
    }
    monkeypatch.setattr(mamba_utils, "get_conv_state_layout", lambda: "DS")
    assert len(others | {layout(), told}) == 5


def test_shards_name_ranks_heads_layers_and_groups(make_mixed: Any) -> None:
    full, window = (fact.shard for fact in make_mixed("window", rank=1, ranks=2).read().facts)
    assert full.startswith("pp0of1/2layers/heads1-2of2/all-")
    assert window.startswith("pp0of1/4layers/heads1-2of2/window16-")
    assert make_mixed("window", rank=3, ranks=4).read().facts[0].shard.startswith("pp0of1/2layers/heads1-2of2/all-")
    states = {make_mixed("state", rank=rank, ranks=4).read().facts[1].shard for rank in range(4)}
    assert len(states) == 4
    assert all(f"/4layers/tp{rank}of4/state-" in "".join(states) for rank in range(4))
    same = {make_mixed("state", rank=rank, ranks=4, tp_replicated=True).read().facts[1].shard for rank in range(4)}
    (shard,) = same
    assert shard.startswith("pp0of1/4layers/all/state-")


def test_a_group_that_is_all_there_is_has_the_name_it_always_had(make_mixed: Any) -> None:
    mixed = make_mixed("window", rank=1, ranks=2)
    mixed.kv_cache_config.kv_cache_groups = mixed.kv_cache_config.kv_cache_groups[:1]
    own = {name: mixed.caches[name] for name in mixed.names[0]}
    mixed.caches = own
    registered = mixed.read()
    (facts,) = registered.facts
    assert facts.shard == "pp0of1/2layers/heads1-2of2"
    assert facts.layout.endswith("/N16.H.C64:bfloat16")
    layout = read_layout(own, mixed.kv_cache_config.num_blocks)
    assert (facts.block_bytes, len(registered.rows)) == ((layout.block_bytes,), len(layout.rows))
    (move,) = registered.objects[0].whole(ChunkBlocks(b"", (1, 2)), [memoryview(bytearray(4 * PAGE))])
    assert (move.first, move.of, move.rows) == (0, 2, None)


def test_layers_of_another_stage_are_members_without_rows(make_mixed: Any) -> None:
    mixed = make_mixed("window", layout="LBHNC")
    mixed.config.parallel_config.pipeline_parallel_size = 2
    for name in mixed.names[2]:
        del mixed.caches[name]
    registered = mixed.read()
    assert registered.facts[1].block_bytes == (2 * PAGE, 0)
    expected = b"".join(mixed.content(1, 3))
    assert payload(mixed, 1, 3, 9) == expected
    for name in mixed.names[1]:
        del mixed.caches[name]
    registered = mixed.read()
    assert (registered.facts[1].shard, registered.facts[1].layout, registered.facts[1].block_bytes) == ("", "", (0, 0))
    assert registered.objects[1].nbytes(2) == 0


def test_layers_that_are_in_no_group_or_missing_are_refused(make_mixed: Any) -> None:
    mixed = make_mixed("window")
    mixed.caches["shares"] = mixed.caches["window.3"]
    expected = [fact.block_bytes for fact in mixed.read().facts]
    assert expected == [(2 * PAGE,), (2 * PAGE, 2 * PAGE)]
    mixed.caches["stray"] = torch.zeros_like(mixed.caches["full.0"])
    with pytest.raises(UsageError, match="stray is in no group"):
        mixed.read()
    mixed = make_mixed("window")
    del mixed.caches["window.2"]
    with pytest.raises(UsageError, match=r"no KV cache for window\.2"):
        mixed.read()


def test_blocks_that_are_no_part_of_an_object_are_refused(make_mixed: Any) -> None:
    objects = make_mixed("window").read().objects
    whole = [memoryview(bytearray(prod((2, 2, PAGE, 2))))]
    for chunk in (
        ChunkBlocks(b"", (1,), 16, 1),  # of one member
        ChunkBlocks(b"", (1, 2), 0, 1),  # before what is held of the chunk
        ChunkBlocks(b"", (1, 2, 3, 4), 16, 1),  # behind it
        ChunkBlocks(b"", (1, 2), 24, 1),  # within a block
    ):
        with pytest.raises(ValueError, match=r"no part|begins no block"):
            objects[1].part(chunk, whole, 32)
    assert [move.first for move in objects[0].part(ChunkBlocks(b"", (1,), 16), whole, 32)] == [1]
