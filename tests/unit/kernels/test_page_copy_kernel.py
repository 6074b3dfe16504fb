# SPDX-License-Identifier: Apache-2.0
"""The kernel without a GPU: its body, compiled for this processor, against numpy in any order of its threads; and what
CUDA's compilers make of it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loracache.kernels.page_copy import cubin as cubins
from loracache.kernels.page_copy.device import FRAGMENT, Direction

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda-13.0/bin/nvcc")
ARCHS = (80, 90, 100)
RED = 0xCD


@pytest.fixture(scope="module")
def host_build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernel's body as a library for this processor."""
    path = tmp_path_factory.mktemp("kernel") / "page_copy.so"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-std=c++17", "-DPAGE_COPY_HOST"]
    compiler = shutil.which("g++") or pytest.skip("no g++ here")
    subprocess.run([compiler, *flags, "-x", "c++", "-o", path, cubins.SOURCE], check=True, timeout=60)
    return ctypes.CDLL(str(path))


def guarded(nbytes: int) -> tuple[np.ndarray[Any, Any], int]:
    """Memory with a red zone on either side, and where its own bytes begin, a multiple of 16."""
    memory = np.full(nbytes + 8192 + 16, RED, np.uint8)
    return memory, -memory.ctypes.data % 16 + 4096


def run(library: Any, direction: Direction, table: Any, slot: int, rng: np.random.Generator) -> None:
    blocks, threads = int(rng.integers(1, 5)), 32 * int(rng.integers(1, 5))
    order = np.arange(blocks * threads, dtype=np.uint32)
    shuffled = rng.permutation(order) if rng.random() < 0.5 else order[:: int(rng.choice([-1, 1]))].copy()
    library.run(
        int(direction is Direction.LOAD),
        ctypes.c_void_p(table.ctypes.data),
        len(table),
        ctypes.c_void_p(slot),
        blocks,
        threads,
        ctypes.c_void_p(shuffled.ctypes.data),
    )


@pytest.mark.parametrize("direction", Direction)
def test_the_kernel_moves_what_numpy_moves_in_any_order_of_its_threads(host_build: Any, direction: Direction) -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        layers, blocks, words = int(rng.integers(1, 5)), int(rng.integers(1, 9)), int(rng.integers(1, 300))
        outermost = rng.random() < 0.5
        row, gap = 16 * words, 16 * int(rng.integers(0, 3))
        kv, kv_at = guarded(layers * blocks * (row + gap))
        places = np.array(
            [
                kv_at + (block * layers + layer if outermost else layer * blocks + block) * (row + gap)
                for layer in range(layers)
                for block in range(blocks)
            ]
        )
        chosen = rng.permutation(places)[: int(rng.integers(1, len(places) + 1))]
        lengths = 16 * rng.integers(1, words + 1, len(chosen))  # rows cut where a payload's extents end
        slot, slot_at = guarded(int(lengths.sum()) + 64)
        offsets = np.cumsum(lengths) - lengths + 16 * int(rng.integers(0, 4))
        table = np.zeros(len(chosen), FRAGMENT)
        table["device"] = kv.ctypes.data + chosen
        table["offset"], table["length"] = offsets // 16, lengths // 16
        source = slot if direction is Direction.LOAD else kv
        source[:] = rng.integers(0, 255, len(source), np.uint8)
        before_kv, before_slot = kv.copy(), slot.copy()
        run(host_build, direction, table, slot.ctypes.data + slot_at, rng)
        for place, offset, nbytes in zip(chosen, offsets + slot_at, lengths, strict=True):
            if direction is Direction.LOAD:
                before_kv[place : place + nbytes] = before_slot[offset : offset + nbytes]
            else:
                before_slot[offset : offset + nbytes] = before_kv[place : place + nbytes]
        assert (kv == before_kv).all()
        assert (slot == before_slot).all()


# -- compilers of CUDA ----------


def memory_accesses(cubin: Path) -> set[str]:
    """Instructions that touch memory, where a disassembler is here: "LDG.E.EF.128"."""
    found = importlib.util.find_spec("nvidia")
    folders = (
        [Path(each) / "cu13" / "bin" / "nvdisasm" for each in found.submodule_search_locations or []] if found else []
    )
    tool = shutil.which("nvdisasm") or next((str(path) for path in folders if path.exists()), None)
    if tool is None:
        pytest.skip("compiled without a spill; no nvdisasm here to look at its accesses")
    code = subprocess.run([tool, "-c", cubin], check=True, capture_output=True, text=True, timeout=60).stdout
    return set(re.findall(r"\b(?:LD|ST|ATOM|RED)[A-Z]*(?:\.[A-Z0-9]+)+", code)) - set(
        re.findall(r"\bLDC[.A-Z0-9]*", code)
    )


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_spills_nothing_and_accesses_16_bytes_at_a_time(arch: int, tmp_path: Path) -> None:
    cubin = tmp_path / "page_copy.cubin"
    command = [
        str(NVCC),
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-std=c++17",
        "-Werror=all-warnings",
        "-cubin",
    ]
    done = subprocess.run(
        [*command, "-Xptxas=-v", "-o", cubin, cubins.SOURCE], check=True, capture_output=True, text=True, timeout=60
    )
    said = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert said == [("0", "0", "0")] * 2
    accesses = memory_accesses(cubin)
    assert accesses
    assert all(each.endswith(".128") for each in accesses), accesses


@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_it_to_accesses_of_16_bytes_and_its_code_is_kept(
    arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="no cuda-bindings here")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        pytest.skip("no NVRTC here")
    code = cubins.cubin(f"sm_{arch}")
    assert code.startswith(b"\x7fELF")
    assert b"page_scatter" in code
    assert b"page_gather" in code
    monkeypatch.setattr(cubins, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert cubins.cubin(f"sm_{arch}") == code
    (tmp_path / "page_copy.cubin").write_bytes(code)
    accesses = memory_accesses(tmp_path / "page_copy.cubin")  # what is spilled would be among them: LDL, STL
    assert accesses
    assert all(each.endswith(".128") for each in accesses), accesses


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled, with a compiler that takes no time."""
    found: list[str] = []
    package = types.ModuleType("cuda.bindings")
    package.nvrtc = types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def compile_now(nvrtc: Any, source: bytes, arch: str) -> bytes:
        found.append(arch)
        return f"{arch} of {source!r}".encode()

    monkeypatch.setattr(cubins, "_compile", compile_now)
    return found


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "a folder"])
def test_damaged_code_is_compiled_anew(compiled: list[str], tmp_path: Path, damage: str) -> None:
    code = cubins.cubin("sm_90")
    (path,) = (tmp_path / "loracache").iterdir()
    content = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": content[:-1], "flipped": content[:-1] + b"?", "empty": b""}[damage])
    assert cubins.cubin("sm_90") == code
    assert compiled == ["sm_90"] * 2
    if damage != "a folder":
        assert path.read_bytes() == content
    assert not list((tmp_path / "loracache").glob("tmp*"))


def test_other_code_is_not_taken_for_it(compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins.cubin("sm_90")
    cubins.cubin("sm_100")
    source = tmp_path / "page_copy.cu"
    source.write_text("other")
    monkeypatch.setattr(cubins, "SOURCE", source)
    cubins.cubin("sm_90")
    assert compiled == ["sm_90", "sm_100", "sm_90"]


def test_without_a_folder_it_is_compiled_each_time(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert cubins.cubin("sm_90") == cubins.cubin("sm_90")
    assert len(compiled) == 2
