# SPDX-License-Identifier: Apache-2.0
"""The LoRA kernels on a GPU: whether they are right there, and how long they take. Needs torch and triton only.

    python benchmarks/bench_sgmv_gpu.py > sgmv.json     everything (some minutes, up to 30 GB of GPU memory)
    python benchmarks/bench_sgmv_gpu.py --quick         few batches and ranks
    python benchmarks/bench_sgmv_gpu.py --check-only    no timing
    python benchmarks/bench_sgmv_gpu.py --dry           tiny, on the CPU: does the script work?

Stands beside run.py, which measures on the CPU. Chunks and pages are those that a pool for the model has. Times are
microseconds a call, medians of timings by CUDA events: `eager_us` with Python launching, `graph_us` in a CUDA graph of
one call for each layer of a model, so that a call finds other weights than the one before. Layers are 32, fewer where
they would take more than 8 GB; for few adapters of low rank all of them fit in L2, which nothing else empties here.
`floor_us` is the time to move what a call has to read and write once, at the speed of a large copy. Where vLLM is
installed, its shrink and expand run on the same batches, every weight padded to the highest rank: `vllm_us`, in a graph
too. Beside that: a step of a batch without adapters (`idle`), which should take nothing, and what the first batch of a
new size waits for (`first`) once the kernels are warm.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from loracache.connectors.vllm.lora.layout import choose_chunk, choose_page
from loracache.kernels import sgmv
from loracache.kernels.sgmv_launch import warm_sizes
from loracache.kernels.tables import A_ADDRESS, B_ADDRESS, PLACE_FIELDS, RANK, plan_tiles, round_up, tile_rows

Shapes = Mapping[str, tuple[int, tuple[int, ...]]]  # inputs and widths, by module
LLAMA_8B: Shapes = {
    "qkv": (4096, (4096, 1024, 1024)), "o": (4096, (4096,)), "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}  # fmt: skip
LLAMA_70B_TP8: Shapes = {
    "qkv": (8192, (1024, 128, 128)),
    "o": (1024, (8192,)),
    "gate_up": (8192, (3584, 3584)),
    "down": (3584, (8192,)),
}
CHECKED = [  # tokens, inputs, widths, ranks, chunk, page elements
    (1, 4096, (4096, 1024, 1024), (16,), 1024, 1 << 15),
    (100, 4096, (4096, 1024, 1024), (8, 256, 12, 64), 256, 4096),
    (100, 1000, (200, 333), (1, 100, 16), 48, 48 * 25),
    (700, 2880, (2880,), (8, 64, 32), 128, 1024),
    (4096, 4096, (14336, 14336), (16, 64), 1024, 1 << 15),
    (9000, 512, (512,), (24,), 64, 1 << 14),
]
LEAST_SLOTS = 8  # an engine has room for more adapters than a batch may have
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # largest error over largest value


@dataclass(frozen=True)
class Plan:
    """What is run. models: by name, shapes and layers. ranks: by name, those of the adapters in turn, and the highest
    that the engine allows. firsts: tokens of batches of new sizes."""

    device: str
    models: Mapping[str, tuple[Shapes, int]]
    ranks: Mapping[str, tuple[tuple[int, ...], int]]
    checked: Sequence[Any]
    decode: Sequence[int]
    prefill: int
    prefill_adapters: Sequence[int]
    firsts: Sequence[int]
    most_adapters: int = 256
    most_layers: int = 32
    pool_bytes: int = 8 << 30
    samples: int = 30

    def batches(self) -> Iterator[tuple[int, int]]:
        """(tokens, adapters)"""
        for tokens in self.decode:
            yield from ((tokens, each) for each in sorted({1, min(tokens, 8), min(tokens, 64), tokens}))
        yield from ((self.prefill, each) for each in self.prefill_adapters)


_MODELS = {"8b": (LLAMA_8B, 32), "70b/tp8": (LLAMA_70B_TP8, 80)}
_RANKS = {
    "16": ((16,), 16),
    "64": ((64,), 64),
    "8..64": ((8, 16, 32, 64), 64),
    "8..64 of 256": ((8, 16, 32, 64), 256),
}
_FIRSTS = (2, 40, 500, 700, 1100, 1500, 3000, 8000)
FULL = Plan("cuda", _MODELS, _RANKS, CHECKED, (1, 8, 32, 64, 128, 256), 4096, (1, 8, 64, 256), _FIRSTS)
_FEW = {mix: _RANKS[mix] for mix in ("64", "8..64 of 256")}
QUICK = Plan("cuda", _MODELS, _FEW, CHECKED, (1, 32, 256), 4096, (1, 64), _FIRSTS)
DRY = Plan(
    "cpu", {"tiny": ({"qkv": (64, (64, 32, 32)), "down": (96, (64,))}, 2)}, {"4, 8": ((4, 8), 16)},
    [(3, 64, (48, 16), (1, 8), 16, 256), (40, 96, (96,), (4,), 32, 512)], (1, 8), 40, (1, 4), (2, 9),
    most_adapters=8, most_layers=2, pool_bytes=1 << 20, samples=2,
)  # fmt: skip


def sizes(shapes: Shapes, layers: int, dtype: torch.dtype) -> tuple[int, int]:
    """Elements of a chunk and of a page, as a pool for such a model has them."""
    chunk = choose_chunk({width for inputs, widths in shapes.values() for width in (inputs, *widths)})
    rank_elements = layers * sum(len(widths) * inputs + sum(widths) for inputs, widths in shapes.values())
    return chunk, choose_page(chunk, rank_elements, dtype.itemsize)


class Adapters:
    """Adapters of random weights in scattered pages, `layers` layers of one shape each. places[layer] is what a call
    takes; ranks: of the first, the second, ... adapter, and from the start again.
    """

    def __init__(
        self,
        plan: Plan,
        count: int,
        ranks: Sequence[int],
        shape: tuple[int, Sequence[int]],
        dtype: torch.dtype,
        chunk: int,
        page_elements: int,
        most_rank: int = 0,
        most_layers: int = 0,
    ) -> None:
        inputs, widths = shape
        self.inputs, self.widths, self.chunk, self.most_rank = inputs, list(widths), chunk, most_rank or max(ranks)
        self.ranks = [ranks[slot % len(ranks)] for slot in range(count)]
        row = len(widths) * round_up(inputs, chunk) + sum(round_up(width, chunk) for width in widths)
        room = plan.pool_bytes // (sum(self.ranks) * row * dtype.itemsize)
        self.layers = max(1, min(most_layers or plan.most_layers, room))
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
        numbers = torch.randperm(sum(needed), device=plan.device, dtype=torch.int32)
        self.page_ids = torch.zeros(count, max(needed), dtype=torch.int32, device=plan.device)
        for slot, (end, pages) in enumerate(zip(itertools.accumulate(needed), needed, strict=True)):
            self.page_ids[slot, :pages] = numbers[end - pages : end]
        self.pages = torch.empty(sum(needed), page_elements, dtype=dtype, device=plan.device).normal_(std=inputs**-0.5)
        self.places = torch.from_numpy(places).to(plan.device)
        self.scales = torch.rand(count, len(widths), device=plan.device) + 0.5

    def matrix(self, layer: int, slot: int, number: int, field: int) -> torch.Tensor:
        """A or B of a slice, (rank, width), copied."""
        width = self.inputs if field == A_ADDRESS else self.widths[number]
        address, row = int(self.places[layer, slot, number, field]), round_up(width, self.chunk)
        rank, size = self.ranks[slot], self.pages.shape[1]
        used = self.page_ids[slot, address // size : -(-(address + rank * row) // size)].long()
        return self.pages[used].view(-1)[address % size :][: rank * row].view(rank, row)[:, :width]

    def multiply(self, layer: int, slots: int, y: torch.Tensor, batch: Batch) -> None:
        """The call that is measured, for a server with room for `slots` adapters."""
        tables = self.pages, self.page_ids[:slots], self.places[layer, :slots], self.scales[:slots]
        sgmv.lora_linear(
            y, batch.x, batch.order, batch.tiles, *tables, self.widths, self.chunk, self.most_rank, batch.idle
        )


class Batch:
    """Inputs of `tokens` rows. Their adapters, the first `adapters` ones, take turns (decode) or follow one another
    (prefill). mixed: every third row has none. Without any adapter the batch is idle."""

    def __init__(
        self, plan: Plan, weights: Adapters, tokens: int, adapters: int, dtype: torch.dtype, mixed: bool = False
    ) -> None:
        rows = np.arange(tokens)
        self.slots = rows * 0 - 1
        if adapters:
            self.slots = rows % adapters if tokens < plan.prefill else rows * adapters // tokens
        if mixed:
            self.slots[::3] = -1
        order, tiles = plan_tiles(self.slots.astype(np.int64), tile_rows(tokens))
        tiles = np.concatenate([tiles, np.full((tokens + 1, 4), -1, np.int32)])
        self.order, self.tiles = torch.from_numpy(order).to(plan.device), torch.from_numpy(tiles).to(plan.device)
        self.idle = torch.tensor([not len(order)])
        self.x = torch.randn(tokens, weights.inputs, device=plan.device).to(dtype)
        self.y = torch.randn(tokens, sum(weights.widths), device=plan.device).to(dtype)

    def nbytes(self, weights: Adapters) -> int:
        """What a call has to move: weights of the adapters there are, x once, y in and out."""
        row = len(weights.widths) * weights.inputs + sum(weights.widths)
        used = sum(weights.ranks[slot] for slot in set(self.slots.tolist()) if slot >= 0)
        return int(used * row * weights.pages.element_size() + self.x.nbytes + 2 * self.y.nbytes)


# -- right? ----------


def check(plan: Plan) -> list[dict[str, Any]]:
    """Compare with float64. Raises AssertionError where an error is too large."""
    found = []
    dtypes = [(dtype, dtype) for dtype in TOLERANCE]
    dtypes += [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
    for (kind, dtype), (tokens, *shape, ranks, chunk, page) in itertools.product(dtypes, plan.checked):
        inputs, widths = shape
        weights = Adapters(plan, 5, ranks, (inputs, widths), kind, chunk, page, most_layers=2)
        batch = Batch(plan, weights, tokens, min(5, tokens), dtype, mixed=tokens > 1)
        want, y, layer = batch.y.double(), batch.y.clone(), weights.layers - 1
        for slot in range(5):
            rows = torch.from_numpy(np.flatnonzero(batch.slots == slot)).to(plan.device)
            left = 0
            for number, width in enumerate(widths):
                a, b = (weights.matrix(layer, slot, number, field).double() for field in (A_ADDRESS, B_ADDRESS))
                added = weights.scales[slot, number].double() * (batch.x[rows].double() @ a.t() @ b)
                want[rows, left : left + width] += added
                left += width
        weights.multiply(layer, 5, y, batch)
        error = float((y.double() - want).abs().max() / want.abs().max())
        case = {"weights": str(kind), "x": str(dtype), "tokens": tokens, "inputs": inputs, "widths": widths}
        found.append({**case, "ranks": ranks, "error": error})
        assert error <= max(TOLERANCE[kind], TOLERANCE[dtype]), found[-1]
        again = batch.y.clone()
        weights.multiply(layer, 5, again, batch)
        assert torch.equal(y, again), f"another result the second time: {case}"
    return found


# -- how fast? ----------


class Clock:
    """Microseconds on the plan's device."""

    def __init__(self, plan: Plan) -> None:
        self._samples, self._cuda = plan.samples, plan.device == "cuda"

    def wait(self) -> None:
        """For all that was launched."""
        if self._cuda:
            torch.cuda.synchronize()

    def eager(self, call: Callable[[], object], calls: int) -> float:
        """Median time of one of the `calls` that `call` makes."""
        for _ in range(3):
            call()
        if not self._cuda:
            return 1e6 * statistics.median(self.once(call) for _ in range(self._samples)) / calls
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self._samples)]
        for start, end in events:
            start.record()
            call()
            end.record()
        self.wait()
        return float(1e3 * statistics.median(start.elapsed_time(end) for start, end in events) / calls)

    def graph(self, call: Callable[[], object], calls: int) -> float:
        """The same, with `call` captured in a CUDA graph."""
        if not self._cuda:
            return self.eager(call, calls)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.eager(graph.replay, calls)

    def once(self, call: Callable[[], object]) -> float:
        """Seconds until one call has happened."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start


def vllm_call(plan: Plan, weights: Adapters, slots: int, batch: Batch) -> Callable[[], object]:
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
    most = max(1, min(weights.layers, plan.pool_bytes // nbytes))
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


def measure(plan: Plan, clock: Clock) -> Iterator[dict[str, Any]]:
    """A row for each shape, mix of ranks and batch."""
    source = torch.zeros(plan.pool_bytes // 8, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    bandwidth = 2e6 * source.nbytes / clock.eager(lambda: target.copy_(source), 1)  # bytes a second, both ways together
    rival = plan.device == "cuda" and importlib.util.find_spec("vllm") is not None
    for (model, (shapes, layers)), (mix, (ranks, most_rank)) in itertools.product(
        plan.models.items(), plan.ranks.items()
    ):
        layout = sizes(shapes, layers, torch.bfloat16)
        for module, shape in shapes.items():
            weights = Adapters(plan, plan.most_adapters, ranks, shape, torch.bfloat16, *layout, most_rank=most_rank)
            kind = {"model": model, "chunk": layout[0], "page": layout[1], "module": module, "ranks": mix}
            yield from firsts(plan, clock, weights, kind)
            for tokens, adapters in ((1, 0), (plan.decode[-1], 0), *plan.batches()):
                batch, slots = Batch(plan, weights, tokens, adapters, torch.bfloat16), max(adapters, LEAST_SLOTS)

                def call(weights: Adapters = weights, batch: Batch = batch, slots: int = slots) -> None:
                    for layer in range(weights.layers):
                        weights.multiply(layer, slots, batch.y, batch)

                row = {**kind, "what": "batch" if adapters else "idle", "tokens": tokens, "adapters": adapters}
                row |= {"layers": weights.layers, "floor_us": 1e6 * batch.nbytes(weights) / bandwidth * bool(adapters)}
                row |= {"graph_us": clock.graph(call, weights.layers), "eager_us": clock.eager(call, weights.layers)}
                if rival:
                    row["vllm_us"] = clock.graph(vllm_call(plan, weights, slots, batch), weights.layers)
                yield row


def firsts(plan: Plan, clock: Clock, weights: Adapters, kind: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the first batch of a new size waits for, after those of `warm_sizes`; the second shows what is its own."""
    for tokens in (*warm_sizes(max(plan.firsts)), *plan.firsts):
        batch = Batch(plan, weights, tokens, 1, torch.bfloat16)
        first, second = (
            1e6 * clock.once(lambda batch=batch: weights.multiply(0, 1, batch.y, batch))  # type: ignore[misc]
            for _ in range(2)
        )
        what = "first" if tokens in plan.firsts else "warm"
        yield {**kind, "what": what, "tokens": tokens, "first_us": first, "again_us": second}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Checks and measures the LoRA kernels on a GPU.")
    parser.add_argument("--quick", action="store_true", help="few batches and ranks")
    parser.add_argument("--check-only", action="store_true", help="compare with float64 and leave it at that")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: whether this script works")
    options = parser.parse_args(arguments)
    plan = DRY if options.dry else QUICK if options.quick else FULL
    if options.dry:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cpu, dry" if options.dry else torch.cuda.get_device_name()
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "checks": check(plan)}
    if not options.dry:
        import triton

        found["triton"] = triton.__version__
    print(f"{len(found['checks'])} shapes are right", file=sys.stderr)
    if not options.check_only:
        found["rows"] = []
        for row in measure(plan, Clock(plan)):
            print(*(f"{each:.4g}" if isinstance(each, float) else each for each in row.values()), file=sys.stderr)
            found["rows"].append(
                {name: round(each, 2) if isinstance(each, float) else each for name, each in row.items()}
            )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
