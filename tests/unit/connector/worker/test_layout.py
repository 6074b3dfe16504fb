# SPDX-License-Identifier: Apache-2.0
"""Layouts as vLLM 0.26 to 0.32 register them: bytes move whole and right, and different physical orders never meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loracache.connectors.vllm.common.geometry import payload_layout
from loracache.connectors.vllm.worker.layout import read_layout
from loracache.errors import UsageError
from loracache.kernels.page_copy import Move, PageCopier

LAYERS, HEADS, TOKENS, CONTENT = 3, 2, 4, 16
PAGE = 4096
Caches = dict[str, torch.Tensor]


def named(tensors: Sequence[torch.Tensor]) -> Caches:
    return {f"model.layers.{number}.attn": tensor for number, tensor in enumerate(tensors)}


def heads_first(blocks: int, dtype: torch.dtype = torch.bfloat16) -> Caches:
    """CPU: (B, H, N, C), one storage a layer."""
    return named([torch.zeros(blocks, HEADS, TOKENS, CONTENT, dtype=dtype) for _ in range(LAYERS)])


def tokens_first(blocks: int, dtype: torch.dtype = torch.bfloat16) -> Caches:
    """GPU's default: physically (B, N, H, C), seen as (B, H, N, C)."""
    return named([torch.zeros(blocks, TOKENS, HEADS, CONTENT, dtype=dtype).permute(0, 2, 1, 3) for _ in range(LAYERS)])


def with_offset(blocks: int) -> Caches:
    """0.26: a storage a layer, the cache not at its beginning."""
    size = blocks * HEADS * TOKENS * CONTENT
    return named(
        [torch.zeros(size + 64, dtype=torch.bfloat16)[64:].view(blocks, HEADS, TOKENS, CONTENT) for _ in range(LAYERS)]
    )


def one_buffer(blocks: int) -> Caches:
    """0.29 on, LBNHC: one int8 buffer, a layer after the other."""
    nbytes = LAYERS * blocks * TOKENS * HEADS * CONTENT * 2
    whole = torch.zeros(nbytes, dtype=torch.int8).view(torch.bfloat16).view(LAYERS, blocks, TOKENS, HEADS, CONTENT)
    return named([whole[layer].permute(0, 2, 1, 3) for layer in range(LAYERS)])


def block_outermost(blocks: int) -> Caches:
    """BLHNC: a block of all layers lies together, so stride(0) spans them all."""
    nbytes = blocks * LAYERS * HEADS * TOKENS * CONTENT * 2
    whole = torch.zeros(nbytes, dtype=torch.int8).view(torch.bfloat16).view(blocks, LAYERS, HEADS, TOKENS, CONTENT)
    return named([whole[:, layer] for layer in range(LAYERS)])


def heads_outermost(blocks: int) -> Caches:
    """LHBNC: the blocks of one head lie together, those of a block do not."""
    return named([torch.zeros(HEADS, blocks, TOKENS, CONTENT).permute(1, 0, 2, 3) for _ in range(LAYERS)])


def layers_inside_heads(blocks: int) -> Caches:
    """BHLNC: a head of all layers lies together."""
    whole = torch.zeros(blocks, HEADS, LAYERS, TOKENS, CONTENT, dtype=torch.bfloat16)
    return named([whole[:, :, layer] for layer in range(LAYERS)])


def block_outermost_with_a_gap(blocks: int) -> Caches:
    """Something behind the layers of each block, as padding."""
    whole = torch.zeros(blocks, LAYERS + 1, HEADS, TOKENS, CONTENT, dtype=torch.bfloat16)
    return named([whole[:, layer] for layer in range(LAYERS)])


def layers_apart_in_a_block(blocks: int) -> Caches:
    """Something between them."""
    whole = torch.zeros(blocks, 2 * LAYERS, HEADS, TOKENS, CONTENT, dtype=torch.bfloat16)
    return named([whole[:, 2 * layer] for layer in range(LAYERS)])


def latent(blocks: int) -> Caches:
    """MLA: (B, N, C)."""
    return named([torch.zeros(blocks, TOKENS, 24, dtype=torch.bfloat16) for _ in range(LAYERS)])


def kernel_blocks(blocks: int) -> Caches:
    """The attention kernel's blocks are half of the manager's."""
    return heads_first(2 * blocks)


def mixed(blocks: int) -> Caches:
    """Layers of two shapes."""
    return heads_first(blocks) | {"indexer": torch.zeros(blocks, TOKENS, 8, dtype=torch.uint8)}


MAKERS: list[Callable[[int], Caches]] = [
    heads_first, tokens_first, with_offset, one_buffer, block_outermost, latent, kernel_blocks, mixed, heads_outermost,
    layers_inside_heads, block_outermost_with_a_gap, layers_apart_in_a_block,
    lambda blocks: heads_first(blocks, torch.float32),
    lambda blocks: tokens_first(blocks, torch.uint8),
]  # fmt: skip


def fill(caches: Caches, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in caches.values():
        values = torch.randint(0, 100, tensor.shape, generator=generator)
        tensor.copy_(values.to(tensor.dtype))


def extents(size: int, cuts: list[int]) -> list[memoryview]:
    """Buffers of whole pages that together hold `size` bytes, the last cut short: as the client maps an object."""
    pieces = []
    while size > 0:
        take = min(size, PAGE // 16 * (cuts.pop() if cuts else 4))
        pieces.append(memoryview(bytearray(take)))
        size -= take
    return pieces


def block_of(tensor: torch.Tensor, block: int, blocks: int) -> torch.Tensor:
    rows = tensor.shape[0] // blocks
    return tensor[block * rows : (block + 1) * rows]


@given(st.sampled_from(MAKERS), st.data())
def test_what_is_gathered_is_what_is_scattered(make: Callable[[int], Caches], data: Any) -> None:
    total, other = data.draw(st.integers(4, 9)), data.draw(st.integers(4, 9))
    width = data.draw(st.integers(1, 4))
    first = data.draw(st.integers(0, width - 1))
    count = data.draw(st.integers(1, width - first))
    source = data.draw(st.permutations(range(total)))[:width]
    target = data.draw(st.permutations(range(other)))[:count]
    here, there = make(total), make(other)
    fill(here, 1), fill(there, 2)
    before = {name: tensor.clone() for name, tensor in there.items()}
    layout, second = read_layout(here, total), read_layout(there, other)
    assert (layout.order, layout.block_bytes) == (second.order, second.block_bytes)
    payload = extents(layout.block_bytes * width, data.draw(st.lists(st.integers(1, 9), max_size=20)))
    PageCopier(layout.rows).gather([Move(source, payload, 0, width)]).wait()
    PageCopier(second.rows).scatter([Move(target, payload, first, width)]).wait()
    for name, tensor in there.items():
        for block in range(other):
            found = block_of(tensor, block, other)
            if block in target:
                expected = block_of(here[name], source[first + target.index(block)], total)
            else:
                expected = block_of(before[name], block, other)
            assert torch.equal(found, expected), (name, block)


@pytest.mark.parametrize("make", MAKERS)
def test_a_block_has_the_bytes_of_all_its_layers(make: Callable[[int], Caches]) -> None:
    caches = make(5)
    expected = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in caches.values()) // 5
    assert read_layout(caches, 5).block_bytes == expected


def test_the_order_tells_physical_orders_apart_and_nothing_else() -> None:
    orders = {make.__name__: read_layout(make(4), 4).order for make in MAKERS[:6]}
    assert orders["heads_first"] == orders["with_offset"] == "H.N4.C16:bfloat16"
    assert orders["block_outermost"] == "H.N4.C16:bfloat16@blocks"
    assert orders["tokens_first"] == orders["one_buffer"] == "N4.H.C16:bfloat16"
    assert orders["latent"] == "N4.C24:bfloat16"
    assert read_layout(heads_first(9), 9).order == orders["heads_first"]
    assert "+" in read_layout(mixed(4), 4).order


def test_dtypes_of_layers_and_which_layer_has_which_are_part_of_the_order() -> None:
    """As with --kv-cache-dtype-skip-layers: the same sizes and counts, other layers quantised."""

    def order(*dtypes: torch.dtype) -> str:
        return read_layout(named([torch.zeros(8, HEADS, TOKENS, CONTENT, dtype=dtype) for dtype in dtypes]), 8).order

    wide, narrow = torch.bfloat16, torch.uint8
    found = {
        order(wide, narrow), order(narrow, wide), order(wide, wide), order(narrow, narrow),
        order(wide, wide, narrow), order(torch.float16, torch.float16),
    }  # fmt: skip
    assert len(found) == 6
    assert order(wide, wide) == order(wide, wide, wide)  # how many layers there are is in a shard's name


def test_the_number_of_heads_is_a_shards_own_affair() -> None:
    few, many = (named([torch.zeros(3, heads, 4, 16)]) for heads in (2, 8))
    assert read_layout(few, 3).order == read_layout(many, 3).order


@pytest.mark.parametrize("shape", [(3, 2, 8, 16), (3, 2, 4, 32)])
def test_other_sizes_inside_a_block_are_another_order(shape: tuple[int, ...]) -> None:
    assert read_layout(named([torch.zeros(shape)]), 3).order != read_layout(named([torch.zeros(3, 2, 4, 16)]), 3).order


@pytest.mark.parametrize(
    ("tensor", "blocks"),
    [
        (torch.zeros(HEADS, 4, TOKENS, 2 * CONTENT).permute(1, 0, 2, 3)[..., ::2], 4),  # heads apart, and in pieces
        (torch.zeros(TOKENS, 4, HEADS, CONTENT).permute(1, 2, 0, 3), 4),  # tokens apart
        (torch.zeros(4, HEADS, TOKENS, 2 * CONTENT)[..., :CONTENT], 4),  # every other piece
        (torch.zeros(1, HEADS, TOKENS, CONTENT).expand(4, -1, -1, -1)[:, :, :, ::2], 4),
        (torch.zeros(4, 2, HEADS, TOKENS, CONTENT)[:, 0].repeat(1, 1, 1, 1)[::2], 1),  # kernel blocks apart
        (torch.zeros(5, HEADS, TOKENS, CONTENT), 4),  # no whole number of rows a block
        (torch.zeros(0, HEADS, TOKENS, CONTENT), 4),
        (torch.zeros(4, HEADS, TOKENS, CONTENT), 0),
        (torch.zeros(4, HEADS, 0, CONTENT), 4),
        (torch.zeros(4), 4),
        ([torch.zeros(4, 8), torch.zeros(4, 8)], 4),
        (torch.zeros(4, 3, dtype=torch.uint8), 4),  # no multiple of a word
    ],
)
def test_what_does_not_lie_in_blocks_is_refused_by_name(tensor: Any, blocks: int) -> None:
    good = torch.zeros(max(blocks, 1), HEADS, TOKENS, CONTENT)
    with pytest.raises(UsageError, match="odd one"):
        read_layout({"odd one": tensor, "good": good}, blocks)


def test_no_layers_are_no_cache() -> None:
    with pytest.raises(UsageError, match="no KV cache"):
        read_layout({}, 4)


def test_rows_share_the_engines_memory() -> None:
    caches = tokens_first(4)
    layout = read_layout(caches, 4)
    next(iter(caches.values()))[2] = 1
    rows = layout.rows[0]
    assert rows[2].ne(0).all()
    assert not rows[[0, 1, 3]].any()


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (heads_first, LAYERS),
        (one_buffer, LAYERS),
        (block_outermost, 1),
        (block_outermost_with_a_gap, 1),
        (layers_apart_in_a_block, LAYERS),
        (heads_outermost, LAYERS * HEADS),
        (layers_inside_heads, 1),
        (kernel_blocks, LAYERS),
    ],
)
def test_what_lies_side_by_side_is_one_row(make: Callable[[int], Caches], rows: int) -> None:
    assert len(read_layout(make(4), 4).rows) == rows


def test_a_single_block_of_layers_one_behind_the_other_is_no_other_order() -> None:
    caches = one_buffer(1)
    assert read_layout(caches, 1).order == read_layout(one_buffer(4), 4).order


def payload_of(caches: Caches, blocks: Sequence[int]) -> bytes:
    layout = read_layout(caches, 4)
    payload = memoryview(bytearray(layout.block_bytes * len(blocks)))
    PageCopier(layout.rows).gather([Move(blocks, [payload], 0, len(blocks))], None).wait()
    return bytes(payload)


ORDERED = [heads_first, tokens_first, one_buffer, block_outermost, block_outermost_with_a_gap, layers_apart_in_a_block]


@pytest.mark.parametrize("blocks", [[2], [3, 1]])
def test_engines_whose_payloads_differ_are_told_apart_and_no_others(blocks: Sequence[int]) -> None:
    """Over the same content, in every order that holds it."""
    found: dict[str, set[bytes]] = {}
    for make in [*ORDERED, layers_inside_heads, heads_outermost]:
        caches = bfloat16(make(4)) if make is heads_outermost else make(4)
        fill(caches, 5)
        layout = payload_layout(read_layout(caches, 4).order, len(blocks))
        found.setdefault(layout, set()).add(payload_of(caches, blocks))
    assert all(len(payloads) == 1 for payloads in found.values()), "two payloads under one name"
    shared = {"H.N4.C16:bfloat16", "N4.H.C16:bfloat16"}
    assert len(found) == (4 if len(blocks) == 1 else 5)
    assert shared < found.keys()


def bfloat16(caches: Caches) -> Caches:
    return {name: tensor.to(torch.bfloat16) for name, tensor in caches.items()}


def test_layers_that_share_their_kv_are_moved_once() -> None:
    """As vLLM registers them (KV sharing): the same tensor under two names."""
    caches = tokens_first(4)
    shared = caches | {"shares": caches["model.layers.1.attn"]}
    layout = read_layout(shared, 4)
    assert layout.names == tuple(caches)
    assert (layout.block_bytes, layout.order) == (read_layout(caches, 4).block_bytes, read_layout(caches, 4).order)


def test_a_device_that_nobody_copies_from_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"layer 0 is on a device of type meta.*cpu and cuda"):
        read_layout({"layer 0": torch.zeros(4, HEADS, TOKENS, CONTENT, device="meta")}, 4)
