# SPDX-License-Identifier: Apache-2.0
"""The CUDA device without a GPU: what it hands to cuda.bindings and to the driver's functions fits their prototypes, on
a driver that does everything in host memory. What a real one does with it, only a real one can show."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
INCLUDE = Path("/usr/local/cuda-13.0/include")


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("no cuda-bindings here")
    if not (INCLUDE / "cuda.h").exists():
        pytest.skip(f"no {INCLUDE}/cuda.h here")
    compiler = shutil.which("g++") or pytest.skip("no g++ here")
    folder = tmp_path_factory.mktemp("driver")
    flags = ["-O1", "-shared", "-fPIC", "-std=c++17", "-Wl,-soname,libcuda.so.1"]
    paths = [f"-I{INCLUDE}", f"-I{ROOT / 'kernels' / 'page_copy'}"]
    command: list[str | Path] = [compiler, *flags, *paths, "-o", folder / "libcuda.so.1", HERE / "fake_driver.cpp"]
    subprocess.run(command, check=True, timeout=60)
    return folder


def test_copies_of_every_kind_arrive_through_every_version_of_the_driver(fake_driver: Path) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "copies_on_fake_driver.py", "13000", "12080", "12040"],
        env=os.environ | {"LD_LIBRARY_PATH": str(fake_driver)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]
    said = [line.removeprefix("driver: ") for line in done.stderr.splitlines()]
    assert said.count("batch, any order") == said.count("batch, stream order") >= 4
    assert said.count("launch") >= 12
    assert not [line for line in said if re.search("Error|Exception|Warning", line)]
    assert done.stdout.splitlines() == [
        "13000 refused: cuMemcpyBatchAsync: CUDA_ERROR_ILLEGAL_STATE",
        "12080 refused: cuMemcpyBatchAsync: CUDA_ERROR_ILLEGAL_STATE",
        "device 1: cuDeviceGet: CUDA_ERROR_INVALID_DEVICE",
    ]
