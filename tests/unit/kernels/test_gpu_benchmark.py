# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the GPU path runs without a GPU, and says that its figures then mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(180)

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu" / "run.py"


def test_a_dry_run_checks_every_shape_both_ways_and_writes_what_it_found(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry", "--out", tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert not done.returncode, done.stderr[-2000:]
    assert done.stdout.startswith("dry run, no GPU: these figures mean nothing\n")
    content = json.loads((tmp_path / "page_copy.json").read_text())
    assert content["device"].startswith("dry run")
    kinds = {tuple(each[name] for name in ("shape", "outermost", "direction", "way")) for each in content["figures"]}
    assert len(kinds) == 3 * 2 * 2 * 2
    fragments = {(each["shape"], each["outermost"]): each["mean_fragment"] for each in content["figures"]}
    assert fragments["Llama 8B", "layer"] == 64 << 10
    assert fragments["Llama 8B", "block"] == 2 << 20
    assert (tmp_path / "page_copy.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "transfers.json").read_text())
    kinds = {tuple(each[name] for name in ("shape", "outermost", "direction")) for each in content["figures"]}
    assert len(kinds) == len(content["figures"]) == 3 * 2 * 2
    assert all(each["tokens"] == 64 and each["gb_s"] > 0 and each["floor_gb_s"] > 0 for each in content["figures"])
    assert json.loads((tmp_path / "sgmv.json").read_text())["rows"]
    assert "Llama 8B         layer  loads        64 tokens      8 MiB" in done.stdout


def test_checks_alone_copy_everything_so_many_times_and_time_nothing(tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, SCRIPT, "--dry", "--out", tmp_path, "--checks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not done.returncode, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "48 copies are right"  # three shapes, two layouts, two ways, both directions
    assert list(tmp_path.iterdir()) == []
