# SPDX-License-Identifier: Apache-2.0
"""What the workload stores: everything follows from a key, so that every read proves itself.

A chain is named by who owns it and a number that is never used twice; its keys, their sizes and their bytes follow from
that. Adapters are a few PEFT folders whose payloads are looked at once, in a cache that nothing disturbs. Pure
functions.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from loracache import Namespace, chunk_keys

__all__ = ["ADAPTERS", "CHUNK", "Chain", "adapter_folder", "namespace", "payload_of", "size_of"]

CHUNK = 16
ADAPTERS = 6
_MOST_CHUNKS = 8
_MODULE = "base_model.model.model.layers.0.q_proj"


@dataclass(frozen=True, slots=True)
class Chain:
    """One prompt of an owner."""

    owner: int
    serial: int

    @property
    def keys(self) -> list[bytes]:
        """1 to 8 keys, each the parent of the next."""
        numbers = random.Random(f"{self.owner}.{self.serial}")
        count = CHUNK * numbers.randint(1, _MOST_CHUNKS)
        return chunk_keys(namespace(self.owner).digest(), [numbers.randrange(1 << 20) for _ in range(count)], CHUNK)


def namespace(owner: int) -> Namespace:
    """Of all chains of one owner."""
    return Namespace(f"chaos-{owner}", "float32", "layout", CHUNK)


def size_of(key: bytes) -> int:
    """Bytes of the object: most are small, some take many pages."""
    most = (300, 5_000, 20_000, 100_000)[key[0] & 3]
    return 1 + int.from_bytes(key[1:5], "little") % most


def payload_of(key: bytes) -> bytes:
    """The object."""
    return hashlib.shake_128(key).digest(size_of(key))


def adapter_folder(folder: Path, number: int) -> Path:
    """Makes the PEFT folder with that number."""
    numbers = np.random.default_rng(number)
    width = 256 << (number % 3)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"{_MODULE}.lora_A.weight": numbers.standard_normal((4, width), dtype=np.float32),
        f"{_MODULE}.lora_B.weight": numbers.standard_normal((width, 4), dtype=np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
