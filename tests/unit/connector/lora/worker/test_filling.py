# SPDX-License-Identifier: Apache-2.0
"""From a payload onto pages: what the kernels read there is what PEFT's tensors say, wherever the bytes lay."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.layers import (
    LogitsProcessorWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)

from loracache.adapters.payload import Packing
from loracache.adapters.peft import WEIGHTS, PeftFolder
from loracache.connectors.vllm.lora.layout import ModuleShape, PoolShape
from loracache.connectors.vllm.worker.lora.pool import PagePool, SlotTables
from loracache.errors import UsageError
from loracache.kernels.sgmv import lora_embedding
from loracache.kernels.tables import A_FLAT, RANK, plan_tiles

CPU = torch.device("cpu")
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pieces(payload: bytes, *, seed: int | None = None) -> list[memoryview]:
    """The payload in buffers of its own: one, or some cut at any byte as the arena cuts it at pages."""
    cuts = [0, len(payload)]
    if seed is not None:
        rng = random.Random(seed)
        cuts += [rng.randrange(len(payload)) for _ in range(rng.randint(1, 12))]
    cuts.sort()
    return [memoryview(bytearray(payload[first:end])) for first, end in itertools.pairwise(cuts) if end > first]


def make_pool(shape: PoolShape, dtype: str = "float32", *, scattered: bool = False) -> PagePool:
    """A pool of NaN; scattered: only every other page of it is free."""
    pool = PagePool(shape, TORCH[dtype], CPU)
    pool.pages.fill_(float("nan"))
    if scattered:
        pool._free.allocate(shape.pages)
        for page in range(1, shape.pages, 2):
            pool._free.release(page, 1)
    return pool


def layers_of(shape: PoolShape) -> list[Any]:
    return [SimpleNamespace() for _ in shape.modules]


def output(pool: PagePool, resident: Any, compute: Any, number: int, x: torch.Tensor) -> torch.Tensor:
    tables = SlotTables(2, pool.shape, CPU)
    tables.fill(1, resident)
    return compute(pool, tables, number, x, [1] * len(x)).double()


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_on_pages_computes_what_peft_does(
    make_shape: Callable[..., Any],
    make_adapter: Any,
    fill: Any,
    compute: Any,
    dtype: str,
    pool_dtype: str,
    scattered: bool,
) -> None:
    shape = make_shape(pages=600, page=32, element_bytes=TORCH[pool_dtype].itemsize)
    pool = make_pool(shape, pool_dtype, scattered=scattered)
    missing = {"model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj"}
    parts = [part for module in shape.modules for part in module.parts if part not in missing]
    adapter = make_adapter("a", {part: 1 + number for number, part in enumerate(parts)}, dtype)
    resident = fill(pool, pieces(adapter.payload()), layers_of(shape))
    flat = resident.places[resident.places[:, RANK] > 0, A_FLAT] >= 0
    assert flat.all() == (not scattered)
    for number, module in enumerate(shape.modules):
        x = torch.randn(4, module.width)
        wanted = torch.cat([adapter.delta(part, x, TORCH[pool_dtype]) for part in module.parts], dim=1)
        torch.testing.assert_close(output(pool, resident, compute, number, x), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "value", "pool_dtype"), [("float64", 1e300, "float32"), ("float32", 1e5, "float16")])
def test_numbers_that_the_engine_s_dtype_cannot_hold_are_refused(
    make_shape: Callable[..., Any], make_adapter: Any, fill: Any, dtype: str, value: float, pool_dtype: str
) -> None:
    shape = make_shape(pages=600, page=32, element_bytes=TORCH[pool_dtype].itemsize)
    adapter = make_adapter("a", 2, dtype)
    weights = load_file(f"{adapter.path}/{WEIGHTS}")
    next(iter(weights.values()))[0, 1] = value
    save_file(weights, f"{adapter.path}/{WEIGHTS}")
    with PeftFolder(adapter.path) as folder:
        packing = Packing(folder)
        payload = bytearray(packing.size)
        packing.write([memoryview(payload)])
    with pytest.raises(UsageError, match=f"too large for torch.{pool_dtype}"):
        fill(make_pool(shape, pool_dtype), [memoryview(payload)], layers_of(shape))


@pytest.mark.parametrize("seed", range(8))
def test_a_payload_may_be_cut_anywhere(make_shape: Callable[..., Any], make_adapter: Any, fill: Any, seed: int) -> None:
    shape = make_shape(pages=600, page=40)
    adapter = make_adapter("a", 3, ("float32", "bfloat16")[seed % 2])
    payload = adapter.payload()
    whole, cut = make_pool(shape), make_pool(shape)
    one, other = (
        fill(whole, pieces(payload), layers_of(shape)),
        fill(cut, pieces(payload, seed=seed), layers_of(shape)),
    )
    assert torch.equal(one.page_ids, other.page_ids)
    assert torch.equal(whole.pages.nan_to_num(123.0), cut.pages.nan_to_num(123.0))


def test_nothing_is_written_beside_an_adapter_s_pages(
    make_shape: Callable[..., Any], make_adapter: Any, fill: Any, serves: Any
) -> None:
    shape = make_shape(pages=300, page=32)
    pool = make_pool(shape, scattered=True)
    first, second = make_adapter("first", 3), make_adapter("second", 2)
    residents = [fill(pool, pieces(each.payload()), layers_of(shape)) for each in (first, second)]
    assert set(residents[0].page_ids.tolist()).isdisjoint(residents[1].page_ids.tolist())
    assert serves(pool, residents[0], first)
    assert serves(pool, residents[1], second)
    held = torch.cat([each.page_ids for each in residents]).tolist()
    beside = [page for page in range(shape.pages) if page not in held]
    assert pool.pages[beside].isnan().all()


# -- tensor parallelism ------------------------------------------------------------------------------------------------


def layer(kind: Any, **fields: Any) -> Any:
    """One of vLLM's layers without the process group that its constructor wants."""
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def second_half(rank: int, width: int) -> slice:
    return slice(rank * width // 2, (rank + 1) * width // 2)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("missing", ["", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.gate_proj"])
def test_a_worker_holds_its_own_columns(
    make_adapter: Any, fill: Any, compute: Any, kv_heads: int, missing: str
) -> None:
    """Two workers. A key-value head that both have is whole on both."""
    names = ("model.layers.0.self_attn.", "model.layers.0.mlp.")
    qkv = tuple(f"{names[0]}{part}" for part in ("q_proj", "k_proj", "v_proj"))
    gate_up, down = (f"{names[1]}gate_proj", f"{names[1]}up_proj"), f"{names[1]}down_proj"
    adapter = make_adapter("a", {part: 3 for part in (*qkv, *gate_up, down) if part != missing})
    x, wide = torch.randn(5, 24), torch.randn(5, 40)
    kv = 12 // kv_heads
    summed = torch.zeros(5, 24).double()
    for rank in range(2):
        modules = (
            ModuleShape("qkv_proj", qkv, 24, (16, kv, kv)),
            ModuleShape("gate_up_proj", gate_up, 24, (20, 20)),
            ModuleShape("down_proj", (down,), 20, (24,)),
        )
        ids = (rank, rank * (kv_heads - 1), rank * (kv_heads - 1))
        layers = [
            layer(
                MergedQKVParallelLinearWithLoRA,
                tp_size=2,
                tp_rank=rank,
                n_slices=3,
                output_ids=ids,
                output_slices=(16, kv, kv),
            ),
            layer(
                MergedColumnParallelLinearWithLoRA,
                tp_size=2,
                tp_rank=rank,
                n_slices=2,
                output_ids=(rank, rank),
                output_slices=(20, 20),
            ),
            layer(RowParallelLinearWithLoRA, tp_size=2, tp_rank=rank, n_slices=1, input_size=20),
        ]
        pool = make_pool(PoolShape(modules, 100, 32, 8, 4, 8))
        resident = fill(pool, pieces(adapter.payload()), layers)
        own = [second_half(rank, 32), *[second_half(rank, 12) if kv_heads == 2 else slice(None)] * 2]
        for number, parts, columns in ((0, qkv, own), (1, gate_up, [second_half(rank, 40)] * 2)):
            wanted = [adapter.delta(part, x, torch.float32)[:, its] for part, its in zip(parts, columns, strict=True)]
            found = output(pool, resident, compute, number, x)
            torch.testing.assert_close(found, torch.cat(wanted, dim=1), rtol=1e-5, atol=1e-5)
        summed += output(pool, resident, compute, 2, wide[:, second_half(rank, 40)].contiguous())
    torch.testing.assert_close(summed, adapter.delta(down, wide, torch.float32), rtol=1e-5, atol=1e-5)


def test_every_worker_holds_the_whole_of_embeddings_and_heads(make_adapter: Any, fill: Any, compute: Any) -> None:
    """vLLM's layers for these gather before they add, and know no shards."""
    sizes = {"model.embed_tokens": (50, 24), "lm_head": (24, 50)}
    adapter = make_adapter("a", {"model.embed_tokens": 3, "lm_head": 2}, sizes=sizes)
    modules = (
        ModuleShape("model.embed_tokens", ("model.embed_tokens",), 50, (24,)),
        ModuleShape("lm_head", ("lm_head",), 24, (50,)),
    )
    base = torch.nn.Module()
    base.tp_size = 2
    layers = [layer(VocabParallelEmbeddingWithLoRA, base_layer=base), layer(LogitsProcessorWithLoRA, tp_size=2)]
    pool = make_pool(PoolShape(modules, 100, 32, 8, 4, 8))
    resident = fill(pool, pieces(adapter.payload()), layers)
    x = torch.randn(4, 24)
    a, b = (each.double() for each in adapter.matrices["lm_head"])
    wanted = x.double() @ a.T @ b.T * 6
    torch.testing.assert_close(output(pool, resident, compute, 1, x), wanted, rtol=1e-5, atol=1e-5)
    tables, tokens = SlotTables(1, pool.shape, CPU), torch.tensor([3, 49, 0])
    tables.fill(0, resident)
    order, tiles = (torch.from_numpy(each) for each in plan_tiles(torch.zeros(3, dtype=torch.int64).numpy()))
    y = torch.zeros(3, 24)
    lora_embedding(
        y, tokens, order, tiles, pool.pages, tables.page_ids, tables.places[:, :1], tables.scales[:, :1], 50, 8, 8
    )
    a, b = (each.double() for each in adapter.matrices["model.embed_tokens"])
    torch.testing.assert_close(y.double(), a[:, tokens].T @ b.T * 4, rtol=1e-5, atol=1e-5)
