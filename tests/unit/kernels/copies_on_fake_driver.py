# SPDX-License-Identifier: Apache-2.0
"""Run by test_page_copy_cuda.py where libcuda.so.1 is fake_driver.cpp: copies both ways, by every path, as the driver's
versions have them."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import numpy as np
import torch

import loracache.kernels.page_copy.cuda as cuda
from loracache.kernels.page_copy import CopyError, Move, PageCopier
from loracache.kernels.page_copy.device import Direction

LAYERS, BLOCKS, WORDS = 4, 64, 32


class AllPinned:
    def __init__(self, arena: np.ndarray[Any, Any]) -> None:
        self._edges = np.array([arena.ctypes.data, arena.ctypes.data + len(arena)])

    def steps(self) -> tuple[Any, Any]:
        return self._edges, np.array([True, False])


def copies(device: cuda.CudaDevice, pinned: bool, below: int) -> None:
    whole = torch.randint(-(1 << 62), 1 << 62, (LAYERS, BLOCKS, WORDS))
    before, arena = whole.clone(), np.zeros(whole.nbytes, np.uint8)
    copier = PageCopier(whole.unbind(0), pieces=AllPinned(arena) if pinned else None, device=device, bounce_below=below)
    order, size = np.random.permutation(BLOCKS).tolist(), len(arena) // BLOCKS
    moves = [Move([block], [arena.data[at * size :][:size]], 0, 1) for at, block in enumerate(order)]
    copy = copier.gather(moves)
    while not copy.done():
        pass
    copy.wait()
    assert arena.tobytes() == b"".join(layer[block].numpy().tobytes() for block in order for layer in whole)
    whole.zero_()
    copier.scatter(moves, device.event()).wait()
    assert torch.equal(whole, before)


def refused(device: cuda.CudaDevice) -> str:
    os.environ["FAKE_REFUSES"] = "1"
    try:
        copies(device, True, 0)
    except CopyError as error:
        return str(error)
    finally:
        del os.environ["FAKE_REFUSES"]
    return "nothing"


def main() -> None:
    setattr(cuda, "cubin", lambda arch: b"\x7fELF" + arch.encode())  # noqa: B010 - it is not the module's own
    for version in sys.argv[1:]:
        os.environ["FAKE_VERSION"] = version
        device = cuda.CudaDevice(0)
        assert device.has_kernels
        assert device.identity == "gpu-00010203-0405-0607-0809-0a0b0c0d0e0f"
        loads, stores = (int(device.stream(direction)) for direction in (Direction.LOAD, Direction.STORE))
        assert loads - stores == 5  # the fake driver's streams are their priorities, from 0 up to 5 for the first to go
        errors: list[BaseException] = []

        def on_a_fresh_thread(device: cuda.CudaDevice = device, errors: list[BaseException] = errors) -> None:
            try:
                for pinned in (True, False):
                    for below in (0, 1 << 40):
                        copies(device, pinned, below)
            except BaseException as error:  # noqa: BLE001 - shown by the thread that waits
                errors.append(error)

        thread = threading.Thread(target=on_a_fresh_thread)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        if int(version) >= 12080:
            sys.stdout.write(f"{version} refused: {refused(device)}\n")
    try:
        cuda.CudaDevice(1)
    except CopyError as error:
        sys.stdout.write(f"device 1: {error}\n")


if __name__ == "__main__":
    main()
