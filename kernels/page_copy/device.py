# SPDX-License-Identifier: Apache-2.0
"""What copies need of a GPU. cuda.py is one; recording.py emulates one in host memory, as late and as disorderly as
CUDA allows.

Every method may be called from any thread and raises CopyError where the device refuses it. None waits for the device
but `synchronize`. Streams and events are the device's own kinds of objects.
"""

from __future__ import annotations

import enum
from typing import Any, Protocol

import numpy as np

from loracache.kernels.page_copy.fragments import Integers

__all__ = ["FRAGMENT", "Device", "Direction", "Memory", "SourceOrder"]

FRAGMENT = np.dtype([("device", "<u8"), ("offset", "<u4"), ("length", "<u4")])
"""What the kernels read of a fragment: where it lies in the KV cache, and its place in the slot and its length in units
of 16 bytes."""


class Direction(enum.Enum):
    """Which way bytes go."""

    LOAD = "loads"  # host to device, scattered
    STORE = "stores"  # device to host, gathered


class SourceOrder(enum.Enum):
    """When a copy may read its source. ANY: from the call on, for what nothing before it in the stream writes."""

    STREAM = 1
    ANY = 3


class Memory(Protocol):
    """Memory that is its holder's until nobody holds it."""

    @property
    def address(self) -> int:
        """Of its first byte."""
        ...


class Device(Protocol):
    """See the module."""

    @property
    def identity(self) -> str:
        """What measurements of it are kept under."""
        ...

    @property
    def has_kernels(self) -> bool:
        """Whether it can launch."""
        ...

    def stream(self, direction: Direction) -> Any:
        """A stream of one's own. Those of loads go before others, those of stores after."""
        ...

    def event(self) -> Any:
        """An event; until it is recorded it counts as happened."""
        ...

    def record(self, event: Any, stream: Any) -> None:
        """`event` happens when all that was submitted to `stream` until now has ended."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """What is submitted to `stream` from now on begins once `event`, as recorded last, has happened."""
        ...

    def happened(self, event: Any) -> bool:
        """Whether it has, as recorded last."""
        ...

    def synchronize(self, event: Any) -> None:
        """Return when it has happened, as recorded last."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Device memory; its address is a multiple of 256."""
        ...

    def allocate_host(self, nbytes: int) -> Memory:
        """Pinned host memory."""
        ...

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers, stream: Any, order: SourceOrder) -> None:
        """Copy runs of bytes between addresses, in any order. Host memory is pinned, each run in one piece."""
        ...

    def launch(self, direction: Direction, table: int, count: int, slot: int, stream: Any) -> None:
        """Copy `count` fragments of the `table` (FRAGMENT) out of the slot for loads, into it for stores. All three are
        in device memory; the fragments' addresses are multiples of 16.
        """
        ...
