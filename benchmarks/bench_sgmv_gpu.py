# SPDX-License-Identifier: Apache-2.0
"""The LoRA kernels on a GPU: whether they are right there, and how long they take. Needs torch and triton only.

    python benchmarks/bench_sgmv_gpu.py > sgmv.json     everything (some minutes, up to 30 GB of GPU memory)
    python benchmarks/bench_sgmv_gpu.py --quick         few shapes
    python benchmarks/bench_sgmv_gpu.py --check-only    no timing

Stands beside run.py, which measures on the CPU. Times are microseconds a call, medians of timings by CUDA events:
`eager_us` with Python launching, `graph_us` in a CUDA graph of one call for each layer of a model, so that a call finds
other weights than the one before. Layers are 32, fewer where they would take more than 8 GB; for few adapters of low
rank all of them fit in L2, which nothing else empties here. `floor_us` is the time to move what a call has to read and
write once, at the speed of a large copy. Where vLLM is installed, its shrink and expand run on the same batches, every
weight padded to the highest rank: `vllm_us`, in a graph too.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

sys.path.append(str(Path(__file__).resolve().parents[1]))
from loracache.kernels import sgmv_triton
from loracache.kernels.tables import A_ADDRESS, B_ADDRESS, PLACE_FIELDS, RANK, plan_tiles, round_up, tile_rows

SHAPES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
RANKS = {"16": (16,), "64": (64,), "8..64": (8, 16, 32, 64)}
DECODE, PREFILL = (1, 8, 32, 64, 128, 256), 4096
MOST_ADAPTERS, MOST_LAYERS, POOL_BYTES = 256, 32, 8 << 30
LEAST_SLOTS = 8  # an engine has room for more adapters than a batch may have
CHUNK, PAGE_ELEMENTS = 256, 1 << 18
SAMPLES, WARM_UPS = 30, 3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # largest error over largest value


class Adapters:
    """Adapters of random weights in scattered pages, `layers` layers of one shape each. places[layer] is what a call
    takes; ranks: of the first, the second, ... adapter, and from the start again.
    """

    def __init__(
        self,
        count: int,
        ranks: Sequence[int],
        inputs: int,
        widths: Sequence[int],
        dtype: torch.dtype,
        chunk: int = CHUNK,
        page_elements: int = PAGE_ELEMENTS,
        most_layers: int = MOST_LAYERS,
    ) -> None:
        self.inputs, self.widths, self.chunk, self.most_rank = inputs, tuple(widths), chunk, max(ranks)
        self.ranks = [ranks[slot % len(ranks)] for slot in range(count)]
        row = len(widths) * round_up(inputs, chunk) + sum(round_up(width, chunk) for width in widths)
        self.layers = max(1, min(most_layers, POOL_BYTES // (sum(self.ranks) * row * dtype.itemsize)))
        places = np.zeros((self.layers, count, len(widths), PLACE_FIELDS), np.int64)
        places[..., [3, 4]] = -1
        needed = []
        for slot, rank in enumerate(self.ranks):
            address = 0
            for layer in range(self.layers):
                for field, lengths in ((A_ADDRESS, [inputs] * len(widths)), (B_ADDRESS, widths)):
                    for number, length in enumerate(lengths):
                        places[layer, slot, number, [RANK, field]] = rank, address
                        address += rank * round_up(length, chunk)
            needed.append(-(-address // page_elements))
        numbers = torch.randperm(sum(needed), device="cuda", dtype=torch.int32)
        self.page_ids = torch.zeros(count, max(needed), dtype=torch.int32, device="cuda")
        for slot, (end, pages) in enumerate(zip(itertools.accumulate(needed), needed, strict=True)):
            self.page_ids[slot, :pages] = numbers[end - pages : end]
        self.pages = torch.empty(sum(needed), page_elements, dtype=dtype, device="cuda").normal_(std=inputs**-0.5)
        self.places = torch.from_numpy(places).cuda()
        self.scales = torch.rand(count, len(widths), device="cuda") + 0.5

    def matrix(self, layer: int, slot: int, number: int, field: int) -> torch.Tensor:
        """A or B of a slice, (rank, width), copied."""
        width = self.inputs if field == A_ADDRESS else self.widths[number]
        address, row, size = (
            int(self.places[layer, slot, number, field]),
            round_up(width, self.chunk),
            self.pages.shape[1],
        )
        rank = self.ranks[slot]
        used = self.page_ids[slot, address // size : -(-(address + rank * row) // size)].long()
        return self.pages[used].view(-1)[address % size :][: rank * row].view(rank, row)[:, :width]

    def multiply(self, layer: int, slots: int, y: torch.Tensor, x: torch.Tensor, order: Any, tiles: Any) -> None:
        """The call that is measured, for a server with room for `slots` adapters."""
        sgmv_triton.lora_linear(
            y,
            x,
            order,
            tiles,
            self.pages,
            self.page_ids[:slots],
            self.places[layer, :slots],
            self.scales[:slots],
            self.widths,
            self.chunk,
            self.most_rank,
        )


class Batch:
    """Inputs of `tokens` rows. Their adapters, the first `adapters` ones, take turns (decode) or follow one another
    (prefill)."""

    def __init__(self, weights: Adapters, tokens: int, adapters: int, dtype: torch.dtype, idle: bool = False) -> None:
        self.slots = np.arange(tokens) % adapters if tokens < PREFILL else np.arange(tokens) * adapters // tokens
        if idle:
            self.slots[::3] = -1
        order, tiles = plan_tiles(self.slots.astype(np.int64), tile_rows(tokens))
        tiles = np.concatenate([tiles, np.full((tokens + 1, 4), -1, np.int32)])
        self.order, self.tiles = torch.from_numpy(order).cuda(), torch.from_numpy(tiles).cuda()
        self.x = torch.randn(tokens, weights.inputs, device="cuda").to(dtype)
        self.y = torch.randn(tokens, sum(weights.widths), device="cuda").to(dtype)

    def nbytes(self, weights: Adapters) -> int:
        """What a call has to move: weights of the adapters there are, x once, y in and out."""
        row = len(weights.widths) * weights.inputs + sum(weights.widths)
        used = sum(weights.ranks[slot] for slot in set(self.slots.tolist()))
        return int(used * row * weights.pages.element_size() + self.x.nbytes + 2 * self.y.nbytes)


# -- right? ----------


def check() -> list[dict[str, Any]]:
    """Compare with float64. Raises AssertionError where an error is too large."""
    found = []
    dtypes = [(dtype, dtype) for dtype in TOLERANCE] + [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ]
    shapes = [  # tokens, inputs, widths, ranks, chunk, page elements
        (1, 4096, (4096, 1024, 1024), (16,), 256, 1 << 18),
        (100, 4096, (4096, 1024, 1024), (8, 256, 12, 64), 256, 4096),
        (100, 1000, (200, 333), (1, 100, 16), 48, 48 * 25),
        (700, 2880, (2880,), (8, 64, 32), 128, 1024),
        (4096, 4096, (14336, 14336), (16, 64), 256, 1 << 18),
        (9000, 512, (512,), (24,), 64, 1 << 14),
    ]
    for (kind, dtype), (tokens, inputs, widths, ranks, chunk, page_elements) in itertools.product(dtypes, shapes):
        weights = Adapters(5, ranks, inputs, widths, kind, chunk, page_elements, most_layers=2)
        batch = Batch(weights, tokens, min(5, tokens), dtype, idle=tokens > 1)
        want, y = batch.y.double(), batch.y.clone()
        for slot in range(5):
            rows = torch.from_numpy(np.flatnonzero(batch.slots == slot)).cuda()
            left = 0
            for number, width in enumerate(widths):
                a, b = (weights.matrix(1, slot, number, field).double() for field in (A_ADDRESS, B_ADDRESS))
                added = weights.scales[slot, number].double() * (batch.x[rows].double() @ a.t() @ b)
                want[rows, left : left + width] += added
                left += width
        weights.multiply(1, 5, y, batch.x, batch.order, batch.tiles)
        error = float((y.double() - want).abs().max() / want.abs().max())
        case = {
            "weights": str(kind),
            "x": str(dtype),
            "tokens": tokens,
            "inputs": inputs,
            "widths": widths,
            "ranks": ranks,
        }
        found.append({**case, "error": error})
        assert error <= max(TOLERANCE[kind], TOLERANCE[dtype]), found[-1]
        again = batch.y.clone()
        weights.multiply(1, 5, again, batch.x, batch.order, batch.tiles)
        assert torch.equal(y, again), f"another result the second time: {case}"
    return found


# -- how fast? ----------


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Median time of one of the `calls` that `call` makes."""
    for _ in range(WARM_UPS):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(SAMPLES)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return float(1e3 * statistics.median(start.elapsed_time(end) for start, end in events) / calls)


def in_graph(call: Callable[[], object], calls: int) -> float:
    """As `microseconds`, with `call` captured in a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return microseconds(graph.replay, calls)


def vllm_call(weights: Adapters, slots: int, batch: Batch) -> Callable[[], object]:
    """All layers with vLLM's kernels on the same batch."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink, utils

    for known in (utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT):
        known.clear()  # by address, and addresses come again
    rank, tokens, dtype = weights.most_rank, len(batch.x), batch.x.dtype
    meta = LoRAKernelMeta.make(slots, tokens, device="cuda")
    meta.prepare_tensors(torch.from_numpy(batch.slots).int().cuda())
    named = meta.meta_args(tokens, False)
    hidden = torch.empty(len(weights.widths), tokens, rank, dtype=torch.float32, device="cuda")

    def padded(*shape: int) -> torch.Tensor:
        return torch.empty(slots, 1, *shape, dtype=dtype, device="cuda").normal_(std=weights.inputs**-0.5)

    nbytes = slots * rank * dtype.itemsize * (len(weights.widths) * weights.inputs + sum(weights.widths))
    most = max(1, min(weights.layers, POOL_BYTES // nbytes))
    pairs = [
        ([padded(rank, weights.inputs) for _ in weights.widths], [padded(width, rank) for width in weights.widths])
        for _ in range(most)
    ]

    def call() -> None:
        for layer in range(weights.layers):
            a, b = pairs[layer % most]
            lora_shrink(batch.x, a, hidden, *named, 1.0)
            lora_expand(hidden, b, batch.y, *named, offset_start=0, add_inputs=True)

    return call


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written ones together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return float(2e6 * source.nbytes / microseconds(lambda: target.copy_(source), 1))


def batches(quick: bool) -> Iterator[tuple[int, int]]:
    """(tokens, adapters)"""
    for tokens in (1, 32, 256) if quick else DECODE:
        yield from ((tokens, each) for each in sorted({1, min(tokens, 8), min(tokens, 64), tokens}))
    yield from ((PREFILL, each) for each in ((1, 64) if quick else (1, 8, 64, 256)))


def measure(bandwidth: float, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each shape, mix of ranks and batch."""
    rival = importlib.util.find_spec("vllm") is not None
    for (shape, (inputs, widths)), (mix, ranks) in itertools.product(SHAPES.items(), RANKS.items()):
        weights = Adapters(MOST_ADAPTERS, ranks, inputs, widths, torch.bfloat16)
        for tokens, adapters in batches(quick):
            batch = Batch(weights, tokens, adapters, torch.bfloat16)
            slots = max(adapters, LEAST_SLOTS)

            def call(weights: Adapters = weights, batch: Batch = batch, slots: int = slots) -> None:
                for layer in range(weights.layers):
                    weights.multiply(layer, slots, batch.y, batch.x, batch.order, batch.tiles)

            row = {
                "shape": shape, "ranks": mix, "tokens": tokens, "adapters": adapters, "layers": weights.layers,
                "floor_us": 1e6 * batch.nbytes(weights) / bandwidth, "graph_us": in_graph(call, weights.layers),
                "eager_us": microseconds(call, weights.layers),
            }  # fmt: skip
            if rival:
                row["vllm_us"] = in_graph(vllm_call(weights, slots, batch), weights.layers)
            print(*(f"{each:.4g}" if isinstance(each, float) else each for each in row.values()), file=sys.stderr)
            yield {name: round(each, 2) if isinstance(each, float) else each for name, each in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks and measures the LoRA kernels on a GPU.")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--check-only", action="store_true", help="compare with float64 and leave it at that")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "chunk": CHUNK, "page_elements": PAGE_ELEMENTS, "checks": check(),
    }  # fmt: skip
    print(f"{len(found['checks'])} shapes are right", file=sys.stderr)
    if not options.check_only:
        bandwidth = copy_bandwidth()
        found["copy_gb_s"] = round(bandwidth / 1e9)
        found["rows"] = list(measure(bandwidth, options.quick))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
