# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as objects: the digest that names one, and the payload that the tiers hold.

A payload is a function of what the digest covers and of nothing else, so that two machines that store the same adapter
store the same bytes: a header (settings that scale the weights, names, dtypes and shapes) and every tensor behind it,
rank-major: A as it is, (rank, in), B transposed to (rank, out), so that a rank is one row of each. Dtypes are kept and
scaling is folded into nothing; `export` gives equal tensors back.

Blocking file reads: called on a thread of its own, never on the cache's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loracache.adapters.peft import (
    CONFIG,
    DTYPE_BYTES,
    WEIGHTS,
    PeftFolder,
    Settings,
    module_of,
    unusable_settings,
)
from loracache.errors import UsageError

__all__ = [
    "AdapterDigests", "Identity", "ModuleSize", "ModuleWeights", "Packed", "Packing", "StoredTensor", "adapter_digest",
    "export", "folder_identity", "payload_header",
]  # fmt: skip

Identity = tuple[int, ...]

_SETTLED_S = 2.0
_MOST_KNOWN = 4096
_MAGIC = b"LoRA\0\0\0\1"
_ALIGNMENT = 64
_MOST_HEADER = 64 << 20
_SAFETENSORS_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def folder_identity(path: str) -> Identity:
    """Device, inode, size and times (ns) of the adapter's two files. Raises UsageError naming the missing file."""
    parts: list[int] = []
    for name in (CONFIG, WEIGHTS):
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
    with PeftFolder(path) as folder:
        state = _digest_of_settings(folder)
        for tensor in folder.tensors:
            state.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            for data in folder.chunks(tensor):
                state.update(data)
        return state.hexdigest()


class AdapterDigests:
    """Digests remembered by the identity of the files, so that a request costs two stats; the oldest are forgotten.
    Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
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
            with self._lock:
                self._known[identity] = digest
                if len(self._known) > _MOST_KNOWN:
                    del self._known[next(iter(self._known))]
        return digest, identity


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a payload. shape: as PEFT has it. offset, nbytes: of its rank-major bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def transposed(self) -> bool:
        """Whether PEFT's rows are columns here: B is (out, rank) there and (rank, out) here."""
        return module_of(self.name)[1] == "B"


@dataclass(frozen=True, slots=True)
class ModuleSize:
    """The shapes of a module's two matrices as PEFT has them: A is (rank, inputs), B is (outputs, rank)."""

    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """The two matrices of a module, stored as (rank, in) and (rank, out)."""

    rank: int
    scaling: float
    a: StoredTensor
    b: StoredTensor

    @property
    def size(self) -> ModuleSize:
        """Its shapes, as the payload's header has them."""
        return ModuleSize(self.rank, self.a.shape[1], self.b.shape[0])


class Packing:
    """A checked PEFT folder on its way into a payload of `size` bytes. Raises UsageError as `PeftFolder.check`."""

    def __init__(self, folder: PeftFolder) -> None:
        folder.check()
        self._folder = folder
        tensors = [[tensor.name, tensor.dtype, tensor.shape] for tensor in folder.tensors]
        header = {"settings": folder.canonical, "tensors": tensors}
        text = json.dumps(header, separators=(",", ":")).encode()
        self._head = _MAGIC + len(text).to_bytes(8, "little") + text
        self._stored = list(_places(tensors, len(self._head)))
        self.size = self._stored[-1].offset + self._stored[-1].nbytes

    def sizes(self) -> dict[str, ModuleSize]:
        """The shapes of every module, by PEFT's name without "base_model.model."."""
        named = {module_of(tensor.name): tensor.shape for tensor in self._stored}
        return {
            module: ModuleSize(shape[0], shape[1], named[module, "B"][0])
            for (module, part), shape in named.items()
            if part == "A"
        }

    def write(self, buffers: Sequence[memoryview]) -> str:
        """Write the payload into `buffers` (together `size` bytes); answers the digest of what was written. Raises
        UsageError naming a tensor with an infinity or a NaN in it."""
        folder = self._folder
        _write_at(buffers, 0, self._head)
        end = len(self._head)
        state = _digest_of_settings(folder)
        for tensor, stored in zip(folder.tensors, self._stored, strict=True):
            data = folder.data(tensor)
            state.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
            state.update(data)
            _write_at(buffers, end, bytes(stored.offset - end))
            _write_at(buffers, stored.offset, _to_rank_major(data, stored))
            end = stored.offset + stored.nbytes
        return state.hexdigest()


class Packed:
    """A payload, read from the buffers that hold it. header_bytes: what `payload_header` answered before, to be
    believed rather than what stands there now. Raises UsageError where they hold none.
    """

    def __init__(self, buffers: Sequence[memoryview], header_bytes: bytes | None = None) -> None:
        self._buffers = buffers
        head = payload_header(buffers) if header_bytes is None else header_bytes
        try:
            if head[:8] != _MAGIC or len(head) != 16 + int.from_bytes(head[8:16], "little"):
                raise ValueError("it does not begin as one")
            header = json.loads(head[16:])
            self.canonical: dict[str, Any] = header["settings"]
            problem = unusable_settings(self.canonical)
            if problem:
                raise ValueError(problem)
            self.settings = Settings.of(self.canonical)
            self.tensors = tuple(_places(header["tensors"], len(head)))
            if self.tensors[-1].offset + self.tensors[-1].nbytes != sum(map(len, buffers)):
                raise ValueError("its length is not what its header says")
            self._modules = self._paired()
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise UsageError(f"the object is not an adapter: {error}") from None

    def modules(self) -> dict[str, ModuleWeights]:
        """The LoRA modules by PEFT's name without "base_model.model."; copies of base weights are left out."""
        return self._modules

    def _paired(self) -> dict[str, ModuleWeights]:
        parts: dict[str, dict[str, StoredTensor]] = {}
        for tensor in self.tensors:
            module, part = module_of(tensor.name)
            if part:
                parts.setdefault(module, {})[part] = tensor
        modules = {}
        for module, pair in parts.items():
            a, b, rank = pair["A"], pair["B"], self.settings.rank_of(module)
            if (len(a.shape), a.shape[:1], b.shape[1:]) != (2, (rank,), (rank,)):
                raise ValueError(f"{module!r} has not the shapes of rank {rank}")
            modules[module] = ModuleWeights(rank, self.settings.scaling_of(module, rank), a, b)
        return modules

    def rows(self, tensor: StoredTensor) -> list[memoryview]:
        """The tensor's rank-major bytes, as views of the payload's buffers."""
        return _cut(self._buffers, tensor.offset, tensor.nbytes)

    def original(self, tensor: StoredTensor) -> bytes:
        """The tensor's bytes as the file had them."""
        data = b"".join(self.rows(tensor))
        return _turned(data, tensor.dtype, tensor.shape[::-1]) if tensor.transposed else data


def payload_header(buffers: Sequence[memoryview]) -> bytes:
    """What precedes the tensors of a payload: equal for adapters that differ in their numbers only. Not checked."""
    length = int.from_bytes(_read_at(buffers, 8, 8), "little")
    return _read_at(buffers, 0, min(16 + length, _MOST_HEADER))


def export(packed: Packed, folder: Path, config_text: str = "") -> None:
    """Write a PEFT folder with equal tensors and configuration. config_text: the configuration as it was given; else
    the settings that scale the weights. Raises UsageError where `folder` is there already or cannot be written.
    """
    from safetensors import SafetensorError, TensorSpec, serialize_file

    if not config_text:
        modules = {module.rpartition(".")[2] for module in packed.modules()}
        config = packed.canonical | {"peft_type": "LORA", "target_modules": sorted(modules)}
        config_text = json.dumps(config, indent=2)
    held, specs = [], {}
    for tensor in packed.tensors:
        data = np.frombuffer(packed.original(tensor), dtype=np.uint8)
        held.append(data)
        specs[tensor.name] = TensorSpec(
            dtype=_SAFETENSORS_NAMES.get(tensor.dtype, tensor.dtype),
            shape=list(tensor.shape),
            data_ptr=data.ctypes.data,
            data_len=data.nbytes,
        )
    try:
        if os.path.lexists(folder):  # a rename would replace an empty folder
            raise ValueError("it exists")
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        try:
            serialize_file(specs, str(partial / WEIGHTS), metadata={"format": "pt"})
            (partial / CONFIG).write_bytes(config_text.encode())
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"{folder} cannot be written: {error}; give a folder that is not there") from None


def _digest_of_settings(folder: PeftFolder) -> hashlib._Hash:
    settings = json.dumps(folder.canonical, separators=(",", ":"))
    return hashlib.sha256(b"loracache/adapter\0" + settings.encode())


def _places(tensors: Sequence[Sequence[Any]], end: int) -> Iterator[StoredTensor]:
    for name, dtype, shape in tensors:
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name!r} has the shape {shape!r}")
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        nbytes = DTYPE_BYTES[dtype] * math.prod(shape)
        yield StoredTensor(str(name), str(dtype), tuple(shape), offset, nbytes)
        end = offset + nbytes


def _to_rank_major(data: bytes, tensor: StoredTensor) -> bytes:
    return _turned(data, tensor.dtype, tensor.shape) if tensor.transposed else data


def _turned(data: bytes, dtype: str, shape: tuple[int, ...]) -> bytes:
    """The bytes of a matrix of `shape`, rows and columns exchanged."""
    numbers: npt.NDArray[Any] = np.frombuffer(data, dtype=f"<u{DTYPE_BYTES[dtype]}")
    return np.ascontiguousarray(numbers.reshape(shape).T).tobytes()  # tobytes alone keeps the interpreter's lock


def _cut(buffers: Sequence[memoryview], offset: int, nbytes: int) -> list[memoryview]:
    parts = []
    for buffer in buffers:
        if not nbytes:
            break
        if offset < len(buffer):
            part = buffer[offset : offset + nbytes]
            parts.append(part)
            nbytes -= len(part)
        offset = max(0, offset - len(buffer))
    return parts


def _read_at(buffers: Sequence[memoryview], offset: int, nbytes: int) -> bytes:
    return b"".join(_cut(buffers, offset, nbytes))


def _write_at(buffers: Sequence[memoryview], offset: int, data: bytes) -> None:
    at = 0
    for part in _cut(buffers, offset, len(data)):
        part[:] = data[at : at + len(part)]
        at += len(part)
