# SPDX-License-Identifier: Apache-2.0
"""Machine code of the kernels: compiled by NVRTC when it is first needed, then kept in $XDG_CACHE_HOME/loracache.

A file's name is a digest of all that the code follows from, and its first 32 bytes one of the rest: what is damaged, or
was written by something else, is compiled anew. A folder that cannot be used costs a second at each start.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from loracache.kernels.page_copy.moves import CopyError

__all__ = ["SOURCE", "cache_folder", "cubin", "write_whole"]

SOURCE = Path(__file__).with_name("page_copy.cu")
_OPTIONS = ("-std=c++17",)


def cubin(arch: str) -> bytes:
    """The kernels for `arch` ("sm_90"). Raises CopyError where they cannot be compiled."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CopyError("the Python package cuda-bindings is missing") from error
    source = SOURCE.read_bytes()
    try:
        version = _check(nvrtc, "nvrtcVersion", nvrtc.nvrtcVersion())
    except RuntimeError as error:  # it is loaded when it is first called
        raise CopyError(f"no NVRTC: {error}") from error
    known = hashlib.sha256(repr((arch, version, _OPTIONS, source)).encode()).hexdigest()[:32]
    path = cache_folder() / f"page_copy-{arch}-{known}.cubin"
    kept = _read(path)
    if kept is None:
        kept = _compile(nvrtc, source, arch)
        write_whole(path, hashlib.sha256(kept).digest() + kept)
    return kept


def cache_folder() -> Path:
    """Where this machine's own facts and code are kept between starts."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loracache"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all; where it cannot be written, not at all."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=path.parent, delete=False)  # noqa: SIM115 - closed before it is moved
        try:
            with file:
                file.write(content)
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _compile(nvrtc: Any, source: bytes, arch: str) -> bytes:
    program = _check(nvrtc, "nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), 0, [], []))
    try:
        options = [f"--gpu-architecture={arch}".encode(), *(each.encode() for each in _OPTIONS)]
        try:
            _check(nvrtc, "nvrtcCompileProgram", nvrtc.nvrtcCompileProgram(program, len(options), options))
        except CopyError as error:
            log = bytearray(_check(nvrtc, "nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CopyError(f"{error}: {log.rstrip(bytes(1)).decode(errors='replace').strip()}") from None
        code = bytearray(_check(nvrtc, "nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc, "nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _check(nvrtc: Any, name: str, answer: tuple[Any, ...]) -> Any:
    result, *values = answer
    if int(result):
        raise CopyError(f"{name}: {nvrtc.nvrtcResult(int(result)).name}")
    return values[0] if len(values) == 1 else tuple(values)
