"""LoRA adapters by content: the digest of a PEFT folder.

Blocking file reads: called on a thread of its own, never on the cache's.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loracache.errors import UsageError

__all__ = ["AdapterDigests", "Identity", "adapter_digest", "folder_identity"]

Identity = tuple[int, ...]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What changes the effect of the same tensors, and what PEFT takes where it is left out. Names, paths and training
# leftovers change nothing.
_SCALING: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
    "bias": "none", "modules_to_save": None,
}  # fmt: skip
_SETTLED_S = 2.0


def folder_identity(path: str) -> Identity:
    """Device, inode, size and times (ns) of the adapter's two files. Raises UsageError naming the missing file."""
    parts: list[int] = []
    for name in (_CONFIG, _WEIGHTS):
        try:
            stat = os.stat(os.path.join(path, name))
        except (OSError, ValueError) as error:  # ValueError: no path at all, with a zero byte in it
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"{os.path.join(path, name)!a} cannot be read: {reason}") from None
        parts += [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return tuple(parts)


def adapter_digest(path: str) -> str:
    """Hex sha256 over the canonical PEFT content: what scales the weights, then every tensor's name, dtype, shape and
    bytes in the order of names. The layout of the file does not matter. Raises UsageError naming file and reason.
    """
    folder = Path(path)
    state = hashlib.sha256(b"loracache/adapter\0")
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_bytes())
        scaling = {key: default if config.get(key) is None else config[key] for key, default in _SCALING.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder / _CONFIG} is not a PEFT configuration: {error}") from None
    state.update(json.dumps(scaling, sort_keys=True, separators=(",", ":")).encode())
    try:
        header, start = _tensor_header(folder / _WEIGHTS)
        with open(folder / _WEIGHTS, "rb", buffering=0) as file:
            for name, entry in sorted(header.items()):
                first, end = entry["data_offsets"]
                state.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
                _hash_range(state, file.fileno(), start + first, end - first)
    except (OSError, ValueError, SafetensorError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder / _WEIGHTS} is not a safetensors file: {error}") from None
    return state.hexdigest()


class AdapterDigests:
    """Digests remembered by the identity of the files, so that a request costs two stats. Safe from any thread."""

    def __init__(self) -> None:
        self._known: dict[Identity, str] = {}

    def digest(self, path: str) -> tuple[str, Identity]:
        """(hex digest, identity of the files it belongs to). Raises UsageError."""
        identity = folder_identity(path)
        known = self._known.get(identity)
        if known is not None:
            return known, identity
        digest = adapter_digest(path)
        if folder_identity(path) != identity:
            raise UsageError(f"{path} changed while it was read; try again")
        newest = max(identity[3], identity[4], identity[8], identity[9]) / 1e9
        if time.time() - newest > _SETTLED_S:  # a younger file may change again without its times moving
            self._known[identity] = digest
        return digest, identity


def _tensor_header(path: Path) -> tuple[dict[str, Any], int]:
    with safe_open(path, framework="numpy"):  # checks offsets, sizes and overlaps
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _hash_range(state: hashlib._Hash, fd: int, offset: int, length: int) -> None:
    while length:
        data = os.pread(fd, min(length, 8 << 20), offset)
        if not data:
            raise ValueError("the file ends early")
        state.update(data)
        offset, length = offset + len(data), length - len(data)
