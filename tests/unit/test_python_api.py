# SPDX-License-Identifier: Apache-2.0
"""docs/python-api.md is true and complete: its examples run against a real daemon, and nothing public is left out."""

from __future__ import annotations

import doctest
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loracache
from loracache import CacheClient

PAGE = Path(__file__).parents[2] / "docs" / "python-api.md"


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    name = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
    weights = {name.format("A"): np.ones((2, 16), np.float32), name.format("B"): np.ones((16, 2), np.float32)}
    (tmp_path / "adapter").mkdir()
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    return tmp_path / "adapter"


def test_the_examples_say_what_happens(daemon: Callable[..., Any], peft: Path, tmp_path: Path) -> None:
    running = daemon(memory="16MiB", disk_path=tmp_path / "disk")
    examples = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S))
    known = {"server": running.url, "folder": str(peft)}
    test = doctest.DocTestParser().get_doctest(examples, known, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 50
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(test, out=said.append).failed == 0, "".join(said)


def test_everything_public_is_on_the_page() -> None:
    text = PAGE.read_text()
    calls = [name for name, _ in inspect.getmembers(CacheClient, inspect.isfunction) if not name.startswith("_")]
    assert len(calls) > 25
    assert not [name for name in calls if f".{name}(" not in text]
    assert not [name for name in loracache.__all__ if name != "__version__" and f"`{name}" not in text]
