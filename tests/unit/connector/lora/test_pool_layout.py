# SPDX-License-Identifier: Apache-2.0
"""Where an adapter's matrices stand: apart from each other, found again by the kernels, and hardly any page wasted."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracache.connectors.vllm.lora.layout import ModuleShape, PoolShape, choose_chunk, choose_page
from loracache.errors import UsageError
from loracache.kernels.tables import A_ADDRESS, A_FLAT, B_ADDRESS, B_FLAT, RANK

MOST_RANK = 5


@st.composite
def shapes(draw: Any) -> PoolShape:
    width = st.integers(1, 40)
    modules = []
    for number in range(draw(st.integers(1, 4))):
        widths = draw(st.lists(width, min_size=1, max_size=3))
        parts = tuple(f"{number}.{part}" for part in range(len(widths)))
        modules.append(ModuleShape(f"module {number}", parts, draw(width), tuple(widths)))
    chunk = draw(st.sampled_from([1, 2, 8, 16]))
    return PoolShape(tuple(modules), 4000, chunk * draw(st.integers(1, 5)), chunk, 4, MOST_RANK)


def ranks_of(draw: Any, shape: PoolShape) -> dict[str, int]:
    """Of some of the parts."""
    parts = [part for module in shape.modules for part in module.parts]
    return {part: draw(st.integers(1, MOST_RANK)) for part in parts if draw(st.booleans())}


def matrices(shape: PoolShape, ranks: dict[str, int]) -> list[tuple[int, int, int, int, int]]:
    """(row of the places, address field, flat field, rank, width) of every matrix that an adapter has."""
    found, row = [], 0
    for module in shape.modules:
        for part, width in zip(module.parts, module.widths, strict=True):
            rank = ranks.get(part, 0)
            if rank:
                found += [(row, A_ADDRESS, A_FLAT, rank, module.width), (row, B_ADDRESS, B_FLAT, rank, width)]
            row += 1
    return found


def pages_in_runs(draw: Any, count: int, pages: int) -> list[int]:
    """Different pages, some of which follow each other."""
    free = list(range(pages))
    rng = draw(st.randoms(use_true_random=False))
    found: list[int] = []
    while len(found) < count:
        first = rng.choice(free)
        run = [page for page in range(first, first + rng.choice((1, 2, 3, 9))) if page in free]
        run = run[: count - len(found)]
        found += run
        free = [page for page in free if page not in run]
    return found


@given(st.data())
def test_every_matrix_has_elements_of_its_own_in_whole_chunks(data: Any) -> None:
    shape = data.draw(shapes())
    ranks = ranks_of(data.draw, shape)
    placement = shape.place(ranks)
    owner: dict[int, tuple[int, int]] = {}
    for row, field, _, rank, width in matrices(shape, ranks):
        address, length = int(placement.places[row, field]), -(-width // shape.chunk) * shape.chunk
        assert placement.places[row, RANK] == rank
        assert address % shape.chunk == 0
        for element in range(address, address + rank * length):
            assert owner.setdefault(element, (row, field)) == (row, field)
    assert sorted(owner) == list(range(placement.elements))  # nothing between them, and nothing outside
    assert np.count_nonzero(placement.places[:, RANK]) == len(ranks)
    pages = {element // shape.page for element in owner}
    assert shape.cost(placement.elements) == len(pages)


@given(st.data())
def test_a_matrix_is_flat_exactly_when_its_pages_follow_each_other(data: Any) -> None:
    shape = data.draw(shapes())
    ranks = ranks_of(data.draw, shape)
    placement = shape.place(ranks)
    count = shape.cost(placement.elements)
    page_ids = pages_in_runs(data.draw, count, count * 2 + 1)
    before = placement.places.copy()
    flat = shape.flatten(placement, np.array(page_ids, dtype=np.int32))
    assert np.array_equal(placement.places, before)
    assert np.array_equal(flat[:, : B_ADDRESS + 1], before[:, : B_ADDRESS + 1])
    found = {(row, field): (rank, width) for row, _, field, rank, width in matrices(shape, ranks)}
    for row in range(shape.slices):
        for address_field, field in ((A_ADDRESS, A_FLAT), (B_ADDRESS, B_FLAT)):
            rank, width = found.get((row, field), (0, 0))
            first = int(before[row, address_field])
            end = first + rank * -(-width // shape.chunk) * shape.chunk
            where = [page_ids[at // shape.page] * shape.page + at % shape.page for at in range(first, end)]
            together = where == list(range(where[0], where[0] + len(where))) if where else False
            assert flat[row, field] == (where[0] if together else -1)


def test_an_adapter_of_nothing_takes_nothing() -> None:
    shape = PoolShape((ModuleShape("m", ("p",), 8, (8,)),), 4, 8, 8, 4, MOST_RANK)
    placement = shape.place({})
    assert (placement.elements, shape.cost(placement.elements)) == (0, 0)
    assert shape.flatten(placement, np.empty(0, np.int32)).tolist() == [[0, 0, 0, -1, -1]]


def test_what_the_model_has_not_and_too_high_ranks_are_refused_by_name(make_shape: Callable[..., Any]) -> None:
    shape = make_shape(most_rank=16)
    with pytest.raises(UsageError, match=r"module 'lm_head' of the adapter is none that this model can adapt"):
        shape.place({"lm_head": 4, "model.layers.0.self_attn.q_proj": 4})
    with pytest.raises(UsageError, match=r"'model.layers.1.mlp.down_proj' is over max_lora_rank=16"):
        shape.place({"model.layers.0.self_attn.q_proj": 16, "model.layers.1.mlp.down_proj": 17})
    assert shape.place({"model.layers.1.mlp.down_proj": 16}).elements == 16 * (40 + 24)


def test_layers_beyond_the_model_s_go_nowhere(make_shape: Callable[..., Any]) -> None:
    """As vLLM has it; an adapter of nothing else is another model's, and so are modules that no layer has."""
    shape = make_shape()
    own, beyond = "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"
    assert shape.surplus([own, beyond]) == [beyond]
    assert shape.place({own: 4, beyond: 4}).elements == shape.place({own: 4}).elements
    for parts in ([beyond], [own, "model.layers.2.mlp.experts"], [own, "visual.layers.2.mlp.down_proj"], [own, "2"]):
        with pytest.raises(UsageError, match=rf"module '{parts[-1]}' of the adapter is none that this model can adapt"):
            shape.place(dict.fromkeys(parts, 4))


# -- what pages cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "chunk"),
    [
        ({4096, 14336, 1024}, 1024),  # Llama 3.1 8B
        ({1024, 512, 2816}, 256),  # the 190m model of examples/
        ({3584, 18944, 512}, 512),  # Qwen 2.5 7B
        ({4096, 11008}, 256),  # Llama 2 7B
        ({128256, 4096}, 1024),  # a vocabulary: 0.6 percent more
        ({64, 128}, 64),
        ({100}, 64),  # never less, whatever it costs
        ({101_000, 1024}, 1024),  # 101,376 elements are within a percent
    ],
)
def test_a_chunk_is_as_long_as_the_rows_allow(widths: set[int], chunk: int) -> None:
    assert choose_chunk(widths) == chunk


@pytest.mark.parametrize(
    ("chunk", "rank_elements", "element_bytes", "page"),
    [
        (1024, 1 << 22, 2, 32768),  # 64 KiB
        (1024, 1 << 22, 4, 16384),
        (256, 1 << 17, 2, 16384),  # an adapter of rank 8 has 2 MiB: 32 KiB, a 64th of it
        (256, (1 << 17) - 1, 2, 8192),
        (64, 100, 4, 1024),  # 4 KiB at the least
        (1024, 100, 2, 2048),
        (3000, 100, 2, 3000),  # a page holds a chunk
        (1000, 1 << 22, 2, 32000),  # and only whole ones
    ],
)
def test_a_page_is_as_large_as_small_adapters_allow(
    chunk: int, rank_elements: int, element_bytes: int, page: int
) -> None:
    assert choose_page(chunk, rank_elements, element_bytes) == page


def llama(layers: int, hidden: int, query: int, kv: int, intermediate: int) -> list[ModuleShape]:
    """The modules of a Llama as vLLM fuses them."""
    kinds = [
        ("qkv_proj", ("q_proj", "k_proj", "v_proj"), hidden, (query, kv, kv)),
        ("o_proj", ("o_proj",), query, (hidden,)),
        ("gate_up_proj", ("gate_proj", "up_proj"), hidden, (intermediate, intermediate)),
        ("down_proj", ("down_proj",), intermediate, (hidden,)),
    ]
    return [
        ModuleShape(f"{layer}.{name}", tuple(f"{layer}.{part}" for part in parts), width, widths)
        for layer in range(layers)
        for name, parts, width, widths in kinds
    ]


def example_spec(name: str) -> Any:
    path = Path(__file__).parents[4] / "examples" / "make_model.py"
    found = importlib.util.spec_from_file_location("make_model", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "make_model", module)  # where its dataclasses look their types up
        found.loader.exec_module(module)
    return module.PRESETS[name]


def shape_of(modules: list[ModuleShape], element_bytes: int = 2) -> PoolShape:
    """As the manager of vLLM's adapters chooses it."""
    widths = {width for module in modules for width in (module.width, *module.widths)}
    chunk = choose_chunk(widths)
    rank_elements = sum(len(module.parts) * module.width + sum(module.widths) for module in modules)
    return PoolShape(
        tuple(modules), 1 << 20, choose_page(chunk, rank_elements, element_bytes), chunk, element_bytes, 64
    )


def overhead(modules: list[ModuleShape], targets: set[str]) -> float:
    """Bytes of pages that 64 adapters of ranks from 8 to 64 take, over the adapters' own."""
    shape, rng, pages, own = shape_of(modules), random.Random(0), 0, 0
    for _ in range(64):
        rank = rng.choice((8, 16, 32, 64))
        ranks = {part: rank for module in modules for part in module.parts if part.rpartition(".")[2] in targets}
        pages += shape.cost(shape.place(ranks).elements)
        own += sum(
            rank * (module.width + width) * shape.element_bytes
            for module in modules
            for part, width in zip(module.parts, module.widths, strict=True)
            if part in ranks
        )
    return pages * shape.page * shape.element_bytes / own


ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("targets", [ALL, {"q_proj", "v_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}])
def test_pages_take_hardly_more_memory_than_the_adapters_themselves(targets: set[str]) -> None:
    large = llama(32, 4096, 4096, 1024, 14336)
    assert overhead(large, targets) <= 1.05
    spec = example_spec("190m")
    kv, query = spec.kv_heads * spec.head_dim, spec.heads * spec.head_dim
    assert overhead(llama(spec.layers, spec.hidden, query, kv, spec.intermediate), targets) <= 1.05
