# SPDX-License-Identifier: Apache-2.0
"""The GPU path on a GPU: whether copies are right there, and how fast. Needs torch and cuda-bindings, no vLLM.

    python benchmarks/gpu/run.py --out FOLDER       everything (some minutes, 2 GB of pinned and of GPU memory)
    python benchmarks/gpu/run.py --out FOLDER --dry on a recording device in host memory, to see that it runs

Writes FOLDER/page_copy.json and FOLDER/page_copy.png, where matplotlib is, and prints a table. Every figure stands
beside its floor: one large copy of as many bytes between pinned memory and the device, measured in the same run. `busy`
is how much longer a product of two 8192 x 8192 matrices of bfloat16 takes while copies run. The LoRA kernels have a
benchmark of their own, bench_sgmv_gpu.py, which this runs last (`--quick`) into FOLDER/sgmv.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
from loracache.kernels.page_copy import Move, PageCopier
from loracache.kernels.page_copy.device import Device, Direction, SourceOrder
from loracache.kernels.page_copy.fragments import fragments_of, rows_of, split_by_pinned
from loracache.kernels.page_copy.recording import RecordingDevice


@dataclass(frozen=True, slots=True)
class Shape:
    """A KV cache: bytes of a layer's row of a block; `of` blocks make a chunk of at least 1 MiB."""

    name: str
    layers: int
    row: int
    of: int


SHAPES = (
    Shape("Llama 8B", 32, 64 << 10, 1),
    Shape("Llama 70B, TP 8", 80, 8 << 10, 2),
    Shape("MLA", 61, 18 << 10, 1),
)
WAYS = {"straight": 0, "through slots": 1 << 40}
BYTES, ROUNDS = 1 << 30, 7


@dataclass(frozen=True, slots=True)
class Figure:
    """gb_s: of the copy, floor_gb_s: of one large one. submit_ms: of the processor's time until all was submitted."""

    shape: str
    outermost: str
    direction: str
    way: str
    mean_fragment: int
    gb_s: float
    floor_gb_s: float
    submit_ms: float
    busy: float | None

    @property
    def share(self) -> float:
        """Of the floor's speed."""
        return self.gb_s / self.floor_gb_s


class Rig:
    """Blocks on a device, and pinned memory for as many bytes."""

    def __init__(self, device: Device, where: str, shape: Shape, outermost: str, nbytes: int) -> None:
        self.device = device
        blocks = max(2 * shape.of, nbytes // (shape.layers * shape.row) // shape.of * shape.of)
        self.nbytes = blocks * shape.layers * shape.row
        size = (shape.layers, blocks, shape.row // 8)
        if outermost == "block":
            size = (blocks, shape.layers, shape.row // 8)
        self.whole = torch.randint(-(1 << 62), 1 << 62, size, device=where)
        self.layers = self.whole.unbind(0 if outermost == "layer" else 1)
        self.host = device.allocate_host(self.nbytes)
        self.bytes = np.frombuffer(memoryview((ctypes.c_uint8 * self.nbytes).from_address(self.host.address)), np.uint8)
        order = np.random.default_rng(1).permutation(blocks).tolist()  # blocks of an engine lie anywhere
        chunk = self.nbytes // blocks * shape.of
        self.moves = [
            Move(order[at : at + shape.of], [self.bytes.data[at // shape.of * chunk :][:chunk]], 0, shape.of)
            for at in range(0, blocks, shape.of)
        ]

    def steps(self) -> tuple[Any, Any]:
        """All of it is pinned, in one piece."""
        return np.array([self.host.address, self.host.address + self.nbytes]), np.array([True, False])

    def settle(self) -> None:
        """Wait for what torch computes: copies have streams of their own."""
        if self.whole.is_cuda:
            torch.cuda.synchronize()

    def check(self, copier: PageCopier) -> None:
        """Raises RuntimeError where what comes back is not what went."""
        before = self.whole.clone()
        self.settle()
        copier.gather(self.moves).wait()
        expected = b"".join(
            layer[block].cpu().numpy().tobytes()
            for move in self.moves[:2]
            for layer in self.layers
            for block in move.blocks
        )
        self.whole.zero_()
        self.settle()
        copier.scatter(self.moves).wait()
        if not torch.equal(self.whole, before) or self.bytes[: len(expected)].tobytes() != expected:
            raise RuntimeError("copies are not right")

    def floor(self, direction: Direction) -> float:
        """Seconds of one copy of all bytes."""
        stream = self.device.stream(direction)
        ends = [np.array([each]) for each in (self.whole.data_ptr(), self.host.address)]
        target, source = ends if direction is Direction.LOAD else reversed(ends)

        def copy() -> None:
            event = self.device.event()
            self.device.copy(target, source, np.array([self.nbytes]), stream, SourceOrder.STREAM)
            self.device.record(event, stream)
            self.device.synchronize(event)

        return median(copy)


def median(call: Callable[[], None]) -> float:
    """Seconds, of a few rounds after one."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(device: Device, where: str, nbytes: int) -> list[Figure]:
    """Check and time every shape, layout, way and direction."""
    found = []
    for shape in SHAPES:
        for outermost in ("layer", "block"):
            rig = Rig(device, where, shape, outermost, nbytes)
            floors = {direction: rig.floor(direction) for direction in Direction}
            for way, below in WAYS.items():
                copier = PageCopier(rig.layers, pieces=rig, device=device, bounce_below=below)
                rig.check(copier)
                for direction in Direction:
                    found.append(_figure(rig, copier, (shape.name, outermost), direction, way, floors[direction]))
                    print(line(found[-1]), file=sys.stderr, flush=True)
    return found


def _figure(
    rig: Rig, copier: PageCopier, what: tuple[str, str], direction: Direction, way: str, floor: float
) -> Figure:
    run = copier.scatter if direction is Direction.LOAD else copier.gather
    submits: list[float] = []

    def copy() -> None:
        began = time.thread_time()
        submitted = run(rig.moves)
        submits.append(time.thread_time() - began)
        submitted.wait()

    spent = median(copy)
    rows, near = rows_of(rig.layers), split_by_pinned(rig.moves, *rig.steps())[0]
    fragments = sum(len(each) for each in fragments_of(rows, rows.bands(), near))
    return Figure(
        *what,
        direction.value,
        way,
        rig.nbytes // fragments,
        rig.nbytes / spent / 1e9,
        rig.nbytes / floor / 1e9,
        statistics.median(submits) * 1e3,
        _busy(lambda: run(rig.moves)) if rig.whole.is_cuda else None,
    )


def _busy(submit: Callable[[], Any]) -> float:
    """How many times longer a product takes beside copies."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def product() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            torch.mm(left, right)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    product()
    alone, beside = [], []
    for _ in range(ROUNDS):
        alone.append(product())
        copies = [submit() for _ in range(2)]
        beside.append(product())
        for copy in copies:
            copy.wait()
    return statistics.median(beside) / statistics.median(alone)


def line(figure: Figure) -> str:
    """A row of the table."""
    busy = "" if figure.busy is None else f"  busy {figure.busy:.3f}"
    return (
        f"{figure.shape:16} {figure.outermost:6} {figure.direction:7} {figure.way:14} "
        f"{figure.mean_fragment >> 10:6} KiB "
        f"{figure.gb_s:8.2f} of {figure.floor_gb_s:8.2f} GB/s ({figure.share:4.0%})  {figure.submit_ms:7.2f} ms{busy}"
    )


def plot(figures: list[Figure], title: str, path: Path) -> None:
    """Share of the floor by fragment, a line for each way and direction."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return
    canvas = Canvas(figsize=(7, 4.5), layout="constrained")
    axes = canvas.subplots()
    for direction in Direction:
        for way in WAYS:
            chosen = [each for each in figures if (each.direction, each.way) == (direction.value, way)]
            points = sorted((each.mean_fragment / 1024, each.share) for each in chosen)
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{direction.value} {way}")
    axes.set(xscale="log", xlabel="fragment, KiB", ylabel="share of one large copy", ylim=(0, None), title=title)
    axes.legend()
    canvas.savefig(path, dpi=120)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Checks and measures the GPU path on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="without a GPU, on a recording device")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.dry:
        device: Device = RecordingDevice()
        name, where, nbytes = "dry run, no GPU: these figures mean nothing", "cpu", 4 << 20
    else:
        from loracache.kernels.page_copy.cuda import cuda_device

        device, name, where, nbytes = cuda_device(0), torch.cuda.get_device_name(0), "cuda:0", BYTES
    figures = measure(device, where, nbytes)
    content = {"device": name, "identity": device.identity, "figures": [asdict(each) for each in figures]}
    (arguments.out / "page_copy.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(figures, name, arguments.out / "page_copy.png")
    print(name, *map(line, figures), sep="\n")
    if not arguments.dry:
        with (arguments.out / "sgmv.json").open("w") as file:
            script = Path(__file__).resolve().parents[1] / "bench_sgmv_gpu.py"
            subprocess.run([sys.executable, str(script), "--quick"], stdout=file, check=True)


if __name__ == "__main__":
    main()
