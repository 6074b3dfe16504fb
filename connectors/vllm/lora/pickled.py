# SPDX-License-Identifier: Apache-2.0
"""Adapters that are pickles (`adapter_model.bin`, as PEFT once wrote them) as folders of safetensors.

A pickle runs what is in it when it is read; torch's `weights_only` reads tensors and nothing else. So they are
converted where torch is, in vLLM's processes or by hand, and the daemon never reads one:

    python -m loracache.connectors.vllm.lora.pickled FOLDER NEW_FOLDER

What an engine converts stands in the temporary folder, by the identity of the files, so that all processes of a machine
convert one once. Blocking file reads: on any thread that may wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

from loracache.adapters.peft import CONFIG, PICKLES, WEIGHTS
from loracache.errors import UsageError

__all__ = ["convert", "is_pickled", "plain_folder"]

_MOST_KEPT = 64


def is_pickled(folder: str) -> bool:
    """Whether there is a pickle, and no safetensors that would be read in its place."""
    return not os.path.exists(os.path.join(folder, WEIGHTS)) and _pickle_in(folder) is not None


def plain_folder(folder: str) -> str:
    """`folder`, or where its content stands as safetensors if it is a pickle. Raises UsageError."""
    pickle = None if os.path.exists(os.path.join(folder, WEIGHTS)) else _pickle_in(folder)
    if pickle is None:
        return folder
    try:
        identity = [os.stat(path) for path in (pickle, Path(folder, CONFIG))]
        text = repr([(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in identity])
        target = _own_folder() / hashlib.sha256(text.encode()).hexdigest()[:32]
        if not (target / WEIGHTS).exists():
            try:
                convert(folder, target)
            except OSError:
                if not (target / WEIGHTS).exists():  # another process was as quick
                    raise
            _forget_oldest(target)
    except OSError as error:
        raise UsageError(f"{pickle} cannot be converted to safetensors: {error}") from None
    return str(target)


def convert(folder: str | os.PathLike[str], target: Path) -> None:
    """Write a pickled adapter as a PEFT folder of safetensors. Raises UsageError, and OSError where `target` cannot be
    written."""
    import torch
    from safetensors.torch import save_file

    pickle = _pickle_in(folder)
    if pickle is None:
        raise UsageError(f"{os.fspath(folder)} holds none of {', '.join(PICKLES)}")
    try:
        loaded = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever torch makes of a file that anybody wrote
        raise UsageError(f"{pickle} is no pickle of tensors alone: {str(error).splitlines()[0][:200]}") from None
    if not isinstance(loaded, dict) or not all(isinstance(each, torch.Tensor) for each in loaded.values()):
        raise UsageError(f"{pickle} is no pickle of tensors alone: it is not a dictionary of them")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(mode=0o700)
        shutil.copyfile(Path(folder, CONFIG), partial / CONFIG)
        tensors = {str(name): each.detach().clone().contiguous() for name, each in loaded.items()}  # none shares memory
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pickle_in(folder: str | os.PathLike[str]) -> Path | None:
    return next((path for name in PICKLES if (path := Path(folder, name)).is_file()), None)


def _own_folder() -> Path:
    """In the temporary folder, where anybody may write: ours alone."""
    path = Path(tempfile.gettempdir(), f"loracache-converted-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(f"{path} is not a folder of ours alone; remove it")
    return path


def _forget_oldest(kept: Path) -> None:
    """An adapter that is asked for again is converted again."""
    folders = [path for path in kept.parent.iterdir() if path != kept and not path.name.endswith(".partial")]
    with contextlib.suppress(FileNotFoundError):  # another process forgets it too
        folders.sort(key=lambda path: path.stat().st_mtime)
        for path in folders[: max(0, len(folders) + 1 - _MOST_KEPT)]:
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m loracache.connectors.vllm.lora.pickled FOLDER NEW_FOLDER")
    try:
        convert(sys.argv[1], Path(sys.argv[2]).absolute())
    except (OSError, UsageError) as error:
        sys.exit(f"loracache: {error}")
