# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the LoRA kernels, which GPUs are seldom there for: that it works, and measures what is served."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[3] / "benchmarks" / "bench_sgmv_gpu.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("bench_sgmv_gpu", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_goes_through_all_of_it_without_a_gpu_or_triton(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "loracache.kernels.sgmv_triton", None)
    threads = torch.get_num_threads()
    bench.main(["--dry"])
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert len(found["checks"]) == 5 * len(bench.DRY.checked)
    assert {row["what"] for row in found["rows"]} == {"warm", "first", "idle", "batch"}
    assert all(row["floor_us"] == 0 for row in found["rows"] if row["what"] == "idle")
    assert {row["adapters"] for row in found["rows"] if row["what"] == "batch"} == {1, 4, 8}
    assert all(value > 0 for row in found["rows"] for name, value in row.items() if name.endswith("graph_us"))


def test_a_wrong_result_ends_it(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = bench.Adapters.multiply
    monkeypatch.setattr(bench.Adapters, "multiply", lambda self, layer, *rest: original(self, 0, *rest))
    with pytest.raises(AssertionError, match="error"):
        bench.check(bench.DRY)


def test_chunks_and_pages_are_those_that_are_served(bench: Any) -> None:
    assert bench.sizes(bench.LLAMA_8B, 32, torch.bfloat16) == (1024, 32 << 10)
    assert bench.sizes(bench.LLAMA_70B_TP8, 80, torch.bfloat16) == (128, 32 << 10)
    for plan in (bench.FULL, bench.QUICK):
        assert set(plan.models) == {"8b", "70b/tp8"}
        assert any(len(ranks) > 1 and most == 256 for ranks, most in plan.ranks.values())
