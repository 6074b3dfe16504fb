# SPDX-License-Identifier: Apache-2.0
"""Copies between blocks and payloads, on every device there is here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from loracache.kernels.page_copy import Move, PageCopier

BLOCKS, LAYERS, WORDS = 8, 3, 6
ROW = WORDS * 8

on_every_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
    ],
)
cuts = pytest.mark.parametrize(
    "cut", [(), (ROW,), (ROW, 2 * ROW), (16, 40, 200)], ids=["whole", "rows", "some rows", "inside rows"]
)


def rows(device: str, seed: int) -> list[torch.Tensor]:
    """Layers of a KV cache: views whose blocks do not lie side by side, as vLLM's are."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-(1 << 62), 1 << 62, (BLOCKS, LAYERS, WORDS), generator=generator).to(device)
    return [whole[:, layer] for layer in range(LAYERS)]


def cut_up(payload: bytearray, at: Sequence[int]) -> list[memoryview]:
    """The payload in parts that end at multiples of 8, as extents do."""
    edges = [0, *at, len(payload)]
    return [memoryview(payload)[start:end] for start, end in itertools.pairwise(edges)]


@on_every_device
@cuts
def test_a_payload_holds_the_rows_of_its_blocks_layer_after_layer(device: str, cut: tuple[int, ...]) -> None:
    layers = rows(device, 1)
    payload = bytearray(LAYERS * 2 * ROW)
    PageCopier(layers).gather([Move([5, 2], cut_up(payload, cut), 0, 2)]).wait()
    assert bytes(payload) == b"".join(layer[block].cpu().numpy().tobytes() for layer in layers for block in (5, 2))


@on_every_device
@cuts
def test_blocks_get_back_what_was_gathered_and_others_keep_theirs(device: str, cut: tuple[int, ...]) -> None:
    source, target, before = rows(device, 1), rows(device, 2), rows(device, 2)
    payload = bytearray(LAYERS * 3 * ROW)
    PageCopier(source).gather([Move([0, 7, 3], cut_up(payload, cut), 0, 3)]).wait()
    PageCopier(target).scatter([Move([6, 1], cut_up(payload, cut), 1, 3)]).wait()
    for there, here, untouched in zip(source, target, before, strict=True):
        assert torch.equal(here[[6, 1]], there[[7, 3]])
        others = [0, 2, 3, 4, 5, 7]
        assert torch.equal(here[others], untouched[others])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_copy_waits_for_what_was_computed_before() -> None:
    layers = rows("cuda", 1)
    scattered = torch.full((LAYERS, WORDS), 7)
    payload = bytearray(LAYERS * ROW)
    torch.cuda._sleep(1 << 28)  # a tenth of a second at least
    for layer in layers:
        layer[4] = 3
    computed = torch.cuda.current_stream().record_event()
    copier = PageCopier(layers)
    copier.gather([Move([4], [memoryview(payload)], 0, 1)], computed).wait()
    assert bytes(payload) == torch.full((LAYERS, WORDS), 3).numpy().tobytes()
    torch.cuda._sleep(1 << 28)
    for layer in layers:
        layer[4] = 5
    overwritten = torch.cuda.current_stream().record_event()
    payload[:] = scattered.numpy().tobytes()
    copier.scatter([Move([4], [memoryview(payload)], 0, 1)], overwritten)
    torch.cuda.synchronize()
    assert all(torch.equal(layer[4].cpu(), scattered[0]) for layer in layers)
