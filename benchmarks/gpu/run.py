# SPDX-License-Identifier: Apache-2.0
"""The GPU path on a GPU: whether copies are right there, and how fast. Needs torch and cuda-bindings, no vLLM.

    python benchmarks/gpu/run.py --out FOLDER       everything (some minutes, 20 GB of pinned and of GPU memory)
    python benchmarks/gpu/run.py --out FOLDER --dry on a recording device in host memory, to see that it runs
    python benchmarks/gpu/run.py --out FOLDER --only transfers
    python benchmarks/gpu/run.py --out FOLDER --checks 100    no timing: are all copies right, each time?
    compute-sanitizer python benchmarks/gpu/run.py --out FOLDER --checks 1

Writes FOLDER/page_copy.json and FOLDER/page_copy.png, where matplotlib is, and prints a table. Every figure stands
beside its floor: one large copy of as many bytes between pinned memory and the device, measured in the same run. `busy`
is how much longer a product of two 8192 x 8192 matrices of bfloat16 takes while copies run. FOLDER/transfers.json has
the worker's Loader and Storer with a real daemon (transfers.py). The LoRA kernels have a benchmark of their own,
bench_sgmv_gpu.py, which this runs last (`--quick`) into FOLDER/sgmv.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed
from gpu import transfers
from gpu.rig import ROUNDS, SHAPES, Compute, Rig, median

from loracache.kernels.page_copy import PageCopier
from loracache.kernels.page_copy.device import Device, Direction
from loracache.kernels.page_copy.fragments import fragments_of, rows_of, split_by_pinned
from loracache.kernels.page_copy.recording import RecordingDevice

BENCHMARKS = Path(__file__).resolve().parents[1]
WAYS = {"straight": 0, "through slots": 1 << 40}
BYTES, CHECKED_BYTES = 1 << 30, 64 << 20
PARTS = ("page_copy", "transfers", "sgmv")


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


def check(device: Device, where: str, nbytes: int, times: int) -> int:
    """Check every shape, layout and way so many times, with new content each time; answers how many copies there were.
    Raises RuntimeError where one is wrong."""
    copies = 0
    for shape in SHAPES:
        for outermost in ("layer", "block"):
            rig = Rig(device, where, shape, outermost, nbytes)
            for below in WAYS.values():
                copier = PageCopier(rig.layers, pieces=rig, device=device, bounce_below=below)
                for _ in range(times):
                    rig.whole.random_(-(1 << 62), 1 << 62)
                    rig.check(copier)
                    copies += len(Direction)
    return copies


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
    """How many times longer products take beside copies."""
    compute = Compute("cuda")
    alone, beside = [], []
    for _ in range(ROUNDS):
        alone.append(compute.products())
        copies = [submit() for _ in range(2)]
        beside.append(compute.products())
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


def _device(dry: bool) -> Device:
    if dry:
        return RecordingDevice()
    from loracache.kernels.page_copy.cuda import cuda_device

    return cuda_device(0)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Checks and measures the GPU path on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="without a GPU, on a recording device")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--checks", type=int, metavar="N", help="no timing: copy everything N times and compare")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = [os.environ.get("PYTHONPATH"), str(BENCHMARKS.parent)]  # for the daemon, too
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if arguments.dry:
        name, where, nbytes = "dry run, no GPU: these figures mean nothing", "cpu", 4 << 20
    else:
        name, where, nbytes = torch.cuda.get_device_name(0), "cuda:0", BYTES
    parts = [arguments.only] if arguments.only else PARTS
    print(name, flush=True)
    if arguments.checks:
        copies = check(_device(arguments.dry), where, min(nbytes, CHECKED_BYTES), arguments.checks)
        print(f"{copies} copies are right", flush=True)
        return
    if "page_copy" in parts:
        device = _device(arguments.dry)
        figures = measure(device, where, nbytes)
        content = {"device": name, "identity": device.identity, "figures": [asdict(each) for each in figures]}
        (arguments.out / "page_copy.json").write_text(json.dumps(content, indent=1) + "\n")
        plot(figures, name, arguments.out / "page_copy.png")
        print(*map(line, figures), sep="\n", flush=True)
    if "transfers" in parts:
        device = _device(arguments.dry)
        found = transfers.measure(device, where, nbytes)
        content = {"device": name, "identity": device.identity, **found.as_json()}
        (arguments.out / "transfers.json").write_text(json.dumps(content, indent=1) + "\n")
        print(*found.lines(), sep="\n", flush=True)
    if "sgmv" in parts:
        with (arguments.out / "sgmv.json").open("w") as file:
            script = BENCHMARKS / "bench_sgmv_gpu.py"
            subprocess.run(
                [sys.executable, str(script), "--dry" if arguments.dry else "--quick"], stdout=file, check=True
            )


if __name__ == "__main__":
    main()
