# SPDX-License-Identifier: Apache-2.0
"""Whatever an adapter's files claim, and whatever a caller believes, only the adapter's own pages change."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.lora.layers import MergedColumnParallelLinearWithLoRA, RowParallelLinearWithLoRA

from loracache.adapters.payload import ModuleSize, Packed
from loracache.connectors.vllm.lora.layout import ModuleShape, PoolShape
from loracache.connectors.vllm.worker.lora import filling
from loracache.connectors.vllm.worker.lora.filling import fill_pages
from loracache.connectors.vllm.worker.lora.pool import PagedAdapter, PagePool
from loracache.connectors.vllm.worker.lora.recipe import Recipes, copy_plain
from loracache.errors import UsageError

ITEM = {"F32": 4, "F16": 2, "BF16": 2}
PARTS = {"m.gate": (24, 16), "m.up": (24, 16), "m.down": (16, 24)}
WIDTHS = [1, 7, 8, 12, 16, 17, 24, 32, 48]
COPIES = ["_copy_in_host_memory", "_copy_to_device"]


def shape_of(ranks_of_workers: int = 1, **changes: Any) -> PoolShape:
    """Two modules of three parts. ranks_of_workers: of tensor parallelism."""
    cut = ranks_of_workers
    whole = [(24, (16, 16)), (16, (24,))] if cut > 1 else [(0, ()), (0, ())]
    modules = (
        ModuleShape("m.gate_up", ("m.gate", "m.up"), 24, (16 // cut, 16 // cut), *whole[0]),
        ModuleShape("m.down", ("m.down",), 16 // cut, (24,), *whole[1]),
    )
    return PoolShape(modules, **({"pages": 160, "page": 16, "chunk": 8, "element_bytes": 4, "most_rank": 16} | changes))


def layers_of(worker: int, workers: int) -> list[Any]:
    """vLLM's layers, without the process group that their constructors want."""
    made = []
    for kind, fields in (
        (MergedColumnParallelLinearWithLoRA, {"n_slices": 2, "output_ids": (worker,) * 2, "output_slices": (8, 8)}),
        (RowParallelLinearWithLoRA, {"n_slices": 1, "input_size": 8}),
    ):
        layer: Any = kind.__new__(kind)
        torch.nn.Module.__init__(layer)
        for name, value in ({"tp_size": workers, "tp_rank": worker} | fields).items():
            setattr(layer, name, value)
        made.append(layer)
    return made


def payload_of(tensors: list[tuple[str, str, tuple[int, ...]]], ranks: Mapping[str, int], seed: int = 0) -> bytearray:
    """What the cache would hold of an adapter of these tensors (name, dtype, shape), of small integers. Not checked."""
    canonical = {
        "alpha_pattern": {}, "bias": "none", "lora_alpha": 8, "modules_to_save": None, "r": 1,
        "rank_pattern": dict(ranks), "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    text = json.dumps({"settings": canonical, "tensors": tensors}, separators=(",", ":")).encode()
    payload = bytearray(b"LoRA\0\0\0\1" + len(text).to_bytes(8, "little") + text)
    rng = np.random.default_rng(seed)
    for _, dtype, shape in tensors:
        payload += bytes(-len(payload) % 64)
        numbers = torch.from_numpy(rng.integers(1, 9, math.prod(shape))).to(filling.DTYPES[dtype])
        payload += numbers.view(torch.uint8).numpy().tobytes()
    return payload


def adapter_of(sizes: Mapping[str, tuple[int, int, int]], dtype: str = "F32", seed: int = 0) -> bytearray:
    """A payload; sizes: (rank, in, out) by part."""
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for part, (rank, inputs, out) in sorted(sizes.items()):
        tensors.append((f"base_model.model.{part}.lora_A.weight", dtype, (rank, inputs)))
        tensors.append((f"base_model.model.{part}.lora_B.weight", dtype, (out, rank)))
    return payload_of(tensors, {part: rank for part, (rank, _, _) in sizes.items()}, seed)


class Worker:
    """A pool whose every other page is free, all bytes of it known, and the code that copies adapters in."""

    def __init__(self, manager: Any, *, scattered: bool = True) -> None:
        self.manager = manager
        self.pool: PagePool = manager.pool
        self.pool.bytes[:] = np.random.default_rng(7).integers(0, 256, len(self.pool.bytes), dtype=np.uint8)
        self.before = self.pool.bytes.copy()
        if scattered:
            self.pool._free.allocate(self.pool.shape.pages)
            for page in range(0, self.pool.shape.pages, 2):
                self.pool._free.release(page, 1)
        self.free = self.pool.free_pages
        self.recipes = Recipes(manager)

    def load(self, payload: bytearray, *, plain: bool) -> PagedAdapter | None:
        """As the activator does: None where the adapter is refused, and then has no pages."""
        buffers = [memoryview(payload)]
        try:
            recipe = self.recipes.of(buffers)
        except UsageError:
            return None
        resident = self.pool.reserve(recipe.placement, recipe.scales)
        if resident is None:
            return None
        if plain and recipe.plain is not None:
            copy_plain(self.pool, resident, recipe, buffers[0])
        else:
            fill_pages(self.pool, resident, Packed(buffers), recipe.parts, self.manager.layers)
        return resident

    def changed_beside(self, resident: PagedAdapter | None) -> int:
        """Bytes that are not as they were, off the adapter's pages."""
        pages = np.setdiff1d(np.arange(self.pool.shape.pages), [] if resident is None else resident.page_ids.numpy())
        now, before = (each.reshape(self.pool.shape.pages, -1)[pages] for each in (self.pool.bytes, self.before))
        return int((now != before).sum())

    def matrix(self, resident: PagedAdapter, row: int, matrix: int, width: int) -> torch.Tensor:
        data = torch.cat([piece.clone() for piece in self.pool.matrix(resident, row, matrix)])
        return data.view(-1, -(-width // self.pool.shape.chunk) * self.pool.shape.chunk)[:, :width]


@pytest.fixture
def make_worker(make_manager: Callable[..., Any]) -> Callable[..., Worker]:
    def make(
        workers: int = 1, worker: int = 0, dtype: str = "F32", *, scattered: bool = True, **changes: Any
    ) -> Worker:
        manager = make_manager(shape_of(workers, element_bytes=ITEM[dtype], **changes), filling.DTYPES[dtype])
        if workers > 1:
            manager.layers = layers_of(worker, workers)
        return Worker(manager, scattered=scattered)

    return make


@st.composite
def claims(draw: Any) -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, int]]:
    """Tensors and ranks, mostly almost right."""
    tensors, ranks = [], {}
    for part in draw(st.lists(st.sampled_from([*PARTS, "m.other", "n"]), min_size=1, max_size=4, unique=True)):
        rank = ranks[part] = draw(st.sampled_from([1, 2, 3, 8, 16, 17]))
        inputs, out = PARTS.get(part, (8, 8))
        for letter, right in (("A", (rank, inputs)), ("B", (out, rank))):
            shape = draw(
                st.just(right) | st.tuples(*[st.sampled_from([each, *WIDTHS]) for each in right]) | st.just(right[:1])
            )
            tensors.append((f"base_model.model.{part}.lora_{letter}.weight", draw(st.sampled_from([*ITEM])), shape))
    return sorted(tensors), ranks


@pytest.mark.parametrize("copy", COPIES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    claim=claims(),
    dtype=st.sampled_from([*ITEM]),
    place=st.sampled_from([(1, 0), (2, 0), (2, 1)]),
    scattered=st.booleans(),
    plain=st.booleans(),
)
def test_no_claim_of_a_file_changes_a_byte_beside_its_own_pages(
    make_worker: Any,
    monkeypatch: pytest.MonkeyPatch,
    copy: str,
    claim: Any,
    dtype: str,
    place: tuple[int, int],
    scattered: bool,
    plain: bool,
) -> None:
    """In host memory, and with what copies to a GPU."""
    monkeypatch.setattr(filling, "_copy", getattr(filling, copy))
    tensors, ranks = claim
    worker = make_worker(*place, dtype, scattered=scattered)
    payload = payload_of(tensors, ranks)
    resident = worker.load(payload, plain=plain)
    assert worker.changed_beside(resident) == 0
    if resident is None:
        assert worker.pool.free_pages == worker.free
        return
    packed = Packed([memoryview(payload)]).modules()
    assert {part: (each.size.inputs, each.size.outputs) for part, each in packed.items()} == {
        part: PARTS[part] for part in packed
    }
    row, own = 0, place[1]
    for module in worker.pool.shape.modules:
        for part, width in zip(module.parts, module.widths, strict=True):
            if part in packed:
                _check_values(worker, resident, payload, packed[part], row, (module.width, width), own)
            row += 1


def _check_values(
    worker: Worker, resident: PagedAdapter, payload: bytearray, found: Any, row: int, widths: tuple[int, int], own: int
) -> None:
    for matrix, (tensor, width) in enumerate(zip((found.a, found.b), widths, strict=True)):
        data = torch.frombuffer(
            payload, dtype=filling.DTYPES[tensor.dtype], offset=tensor.offset, count=math.prod(tensor.shape)
        ).view(found.rank, -1)
        wanted = data[:, own * width : (own + 1) * width] if data.shape[1] != width else data
        assert torch.equal(worker.matrix(resident, row, matrix, width).float(), wanted.float())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("part", "size", "claimed", "needed"),
    [
        ("m.gate", (4, 48, 16), r"lora_A \(4, 48\) and lora_B \(16, 4\)", r"\(4, 24\) and \(16, 4\)"),
        ("m.up", (4, 12, 16), r"lora_A \(4, 12\)", r"\(4, 24\)"),
        ("m.down", (2, 16, 32), r"lora_B \(32, 2\)", r"\(24, 2\)"),
        ("m.down", (2, 8, 24), r"lora_A \(2, 8\)", r"\(2, 16\)"),  # as wide as one of two workers' shards
    ],
)
def test_another_width_is_refused_with_module_and_both_shapes(
    workers: int, part: str, size: tuple[int, int, int], claimed: str, needed: str
) -> None:
    sizes = {part: ModuleSize(*size), "m.gate": ModuleSize(4, 24, 16)} | {part: ModuleSize(*size)}
    with pytest.raises(UsageError, match=rf"'{part}'.*{claimed}.*{needed}"):
        shape_of(workers).fit(sizes)


def test_a_resized_vocabulary_is_refused() -> None:
    modules = (
        ModuleShape("model.embed_tokens", ("model.embed_tokens",), 50, (24,)),
        ModuleShape("lm_head", ("lm_head",), 24, (50,)),
    )
    shape = PoolShape(modules, 8, 32, 8, 4, 8)
    assert shape.fit({"model.embed_tokens": ModuleSize(2, 50, 24), "lm_head": ModuleSize(2, 24, 50)}).elements
    for sizes in ({"model.embed_tokens": ModuleSize(2, 58, 24)}, {"lm_head": ModuleSize(2, 24, 49)}):
        with pytest.raises(UsageError, match=r"(58|49).*this model needs.*50"):
            shape.fit(sizes)


# -- a pipeline --------------------------------------------------------------------------------------------------------


def stage(number: int) -> PoolShape:
    """One of two layers each, and what the model has besides."""
    name = f"model.layers.{number}.o_proj"
    modules = (ModuleShape(name, (name,), 24, (24,)), *([ModuleShape("lm_head", ("lm_head",), 24, (50,))] * number))
    elsewhere = ("model.layers.1", "lm_head") if number == 0 else ("model.embed_tokens", "model.layers.0")
    return PoolShape(modules, 64, 8, 8, 4, 8, elsewhere)


def test_every_stage_has_pages_for_its_own_layers_only() -> None:
    sizes = {f"model.layers.{number}.o_proj": ModuleSize(2, 24, 24) for number in range(2)} | {
        "lm_head": ModuleSize(2, 24, 50)
    }
    costs = [stage(number).cost(stage(number).fit(sizes).elements) for number in range(2)]
    assert costs == [2 * 48 // 8, (2 * 48 + 2 * (24 + 56)) // 8]
    assert stage(1).fit({"model.layers.0.o_proj": ModuleSize(2, 24, 24)}).elements == 0


def test_what_no_stage_has_is_refused_by_one() -> None:
    for name in ("model.layers.1.bogus", "model.layers.10.o_proj", "bogus"):
        refused = 0
        for number in range(2):
            with contextlib.suppress(UsageError):
                stage(number).fit({name: ModuleSize(2, 24, 24)})
                continue
            refused += 1
        assert refused >= 1, name
    with pytest.raises(UsageError, match=r"model\.layers\.1\.o_proj.*\(2, 23\)"):
        stage(1).fit({"model.layers.1.o_proj": ModuleSize(2, 23, 24)})


# -- callers that are wrong --------------------------------------------------------------------------------------------


@pytest.fixture
def worker(make_worker: Any) -> Worker:
    made: Worker = make_worker(scattered=False)
    return made


def right(rank: int = 4) -> dict[str, tuple[int, int, int]]:
    return {part: (rank, *sizes) for part, sizes in PARTS.items()}


def loaded(worker: Worker, payload: bytearray) -> tuple[Any, PagedAdapter]:
    recipe = worker.recipes.of([memoryview(payload)])
    resident = worker.pool.reserve(recipe.placement, recipe.scales)
    assert resident is not None
    return recipe, resident


def test_a_recipe_that_lies_of_a_length_moves_nothing(worker: Worker) -> None:
    payload = adapter_of(right())
    recipe, resident = loaded(worker, payload)
    (offset, nbytes, row, matrix), *rest = recipe.plain
    for lie in ((offset, nbytes + 64, row, matrix), (offset, len(payload) - offset, row, matrix)):
        with pytest.raises(UsageError, match=r"have no place"):
            copy_plain(worker.pool, resident, replace(recipe, plain=(lie, *rest)), memoryview(payload))
        assert worker.changed_beside(resident) == 0


def test_a_module_that_lies_of_its_shape_moves_nothing(worker: Worker) -> None:
    payload = adapter_of(right())
    recipe, resident = loaded(worker, payload)
    packed = Packed([memoryview(payload)])
    part = recipe.parts["m.down"]
    for tensor in (
        replace(part.a, shape=(8, 16), nbytes=2 * part.a.nbytes),
        replace(part.a, shape=(4, 24), nbytes=part.a.nbytes * 3 // 2),
        replace(part.a, shape=(1, 16), nbytes=part.a.nbytes // 4),
    ):
        lie = dict(recipe.parts) | {"m.down": replace(part, a=tensor)}
        with pytest.raises(UsageError, match=r"has no place"):
            fill_pages(worker.pool, resident, packed, lie, worker.manager.layers)
        assert worker.changed_beside(resident) == 0


def test_pages_that_were_given_back_are_not_written(worker: Worker) -> None:
    payload = adapter_of(right())
    recipe, resident = loaded(worker, payload)
    worker.pool.give_back(resident)
    for copy in (
        lambda: copy_plain(worker.pool, resident, recipe, memoryview(payload)),
        lambda: fill_pages(worker.pool, resident, Packed([memoryview(payload)]), recipe.parts, worker.manager.layers),
        lambda: worker.pool.matrix(resident, 0, 0),
    ):
        with pytest.raises(UsageError, match=r"not its own"):
            copy()
    assert worker.changed_beside(None) == 0


def test_a_placement_larger_than_its_pages_is_not_copied_to(worker: Worker) -> None:
    payload = adapter_of(right())
    recipe = worker.recipes.of([memoryview(payload)])
    resident = worker.pool.reserve(replace(recipe.placement, elements=16), recipe.scales)
    assert resident is not None
    with pytest.raises(UsageError, match=r"own 1 pages"):
        fill_pages(worker.pool, resident, Packed([memoryview(payload)]), recipe.parts, worker.manager.layers)
    assert worker.changed_beside(resident) == 0


def test_an_adapter_of_a_wider_base_leaves_its_neighbour_alone(worker: Worker) -> None:
    """The neighbour stands right behind the pages that the wider one would get."""
    first = worker.load(adapter_of(right()), plain=True)
    neighbour = worker.load(adapter_of(right(), seed=1), plain=True)
    assert first is not None
    assert neighbour is not None
    worker.pool.give_back(first)
    worker.before = worker.pool.bytes.copy()
    wider = {part: (4, 2 * inputs, 2 * out) for part, (inputs, out) in PARTS.items()}
    assert worker.load(adapter_of(wider), plain=True) is None
    assert worker.changed_beside(None) == 0
