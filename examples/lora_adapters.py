# SPDX-License-Identifier: Apache-2.0
"""The adapters of the LoRA benchmark and of the demo: made once, kept in the temporary folder."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import make_model

__all__ = ["ADAPTERS", "RANKS", "SLOT_BYTES", "adapters_folder", "zipf"]

ADAPTERS = 200
RANKS = (8, 16, 32, 64)
SPEC = make_model.PRESETS["190m"]
SLOT_BYTES = 64 * 2 * SPEC.layers * sum(sum(shape) for shape in make_model.linear_shapes(SPEC).values())


def adapters_folder(count: int = ADAPTERS) -> Path:
    """model/ and a0, a1, ...: rank by rank, every one with a seed of its own."""
    folder = Path(tempfile.gettempdir()) / f"loracache-adapters-{os.getuid()}"
    if not (folder / "model" / "config.json").exists():
        make_model.make_model(folder / "model", SPEC)
    for number in range(count):
        if not (folder / f"a{number}" / "adapter_config.json").exists():
            rank = RANKS[number % len(RANKS)]
            make_model.make_adapter(folder / f"a{number}", SPEC, rank=rank, seed=1000 + number, strength=0.2)
    return folder


def zipf(rng: random.Random, count: int, prompt: int, output: int, adapters: int = ADAPTERS) -> list[list[Any]]:
    """Requests by Zipf's law (exponent 1) over adapters whose popularity has nothing to do with their rank: [adapter,
    prompt tokens, output tokens, at]."""
    popularity = random.Random("popularity").sample(range(adapters), adapters)
    weights = [1 / (place + 1) for place in range(adapters)]
    return [[adapter, prompt, output, 0.0] for adapter in rng.choices(popularity, weights, k=count)]
