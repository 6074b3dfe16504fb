# SPDX-License-Identifier: Apache-2.0
"""A CUDA device, by the driver's own interface (cuda.bindings, which torch's CUDA wheel brings).

The driver's calls leave no error behind for torch to stumble over, as the runtime's do. Copies are handed over as
arrays: the bindings would make a Python object of every address, which takes longer than the copy, so those two
functions are called by their addresses.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import uuid
import weakref
from typing import Any

import numpy as np

from loracache.kernels.page_copy.choice import FEW
from loracache.kernels.page_copy.cubin import cubin
from loracache.kernels.page_copy.device import Direction, SourceOrder
from loracache.kernels.page_copy.fragments import Integers
from loracache.kernels.page_copy.moves import CopyError

__all__ = ["CudaDevice", "cuda_device"]

_log = logging.getLogger(__name__)
_BLOCKS, _THREADS = 32, 256  # of a launch: enough for the link, few beside an engine's own
_BATCH_SINCE, _BATCH_SINCE_13 = 12080, 13000  # versions of cuMemcpyBatchAsync; the older one names the copy that failed
_KERNELS = {Direction.LOAD: b"page_scatter", Direction.STORE: b"page_gather"}


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", ctypes.c_int * 2),
        ("target", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class _Event:
    def __init__(self, device: CudaDevice, flags: int) -> None:
        self.handle = device.call("cuEventCreate", flags)
        weakref.finalize(self, device.driver.cuEventDestroy, self.handle).atexit = False


class _Memory:
    def __init__(self, device: CudaDevice, allocate: str, free: str, *arguments: int) -> None:
        self.address = int(device.call(allocate, *arguments))
        weakref.finalize(self, device.call, free, self.address).atexit = False


class CudaDevice:
    """See Device. Raises CopyError where there is no such device, or none that CUDA's bindings reach."""

    def __init__(self, index: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise CopyError(
                "KV cannot be copied from and to this GPU: the Python package cuda-bindings is missing. Torch for CUDA "
                "12.8 and later brings it; else `pip install cuda-bindings`. Other GPUs than NVIDIA's are not served"
            ) from error
        self.driver = driver
        self._check("cuInit", driver.cuInit(0))
        device = self._check("cuDeviceGet", driver.cuDeviceGet(index))
        self._context = self._check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(device))
        self._lowest, self._highest = self.call("cuCtxGetStreamPriorityRange")
        self.identity = f"gpu-{uuid.UUID(bytes=bytes(self.call('cuDeviceGetUuid', device).bytes))}"
        version = self.call("cuDriverGetVersion")
        self._each = self._function(b"cuMemcpyAsync", 4000, 4)
        self._names_failure = version < _BATCH_SINCE_13
        since = _BATCH_SINCE if self._names_failure else _BATCH_SINCE_13
        self._batch = self._function(b"cuMemcpyBatchAsync", since, 9 if self._names_failure else 8)
        if version < _BATCH_SINCE:
            self._batch = None
        self._functions = self._load_kernels(device)

    @property
    def has_kernels(self) -> bool:
        """See Device. They may not have compiled."""
        return bool(self._functions)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver with this device's context current; answers what it answers."""
        self._use()
        return self._check(name, getattr(self.driver, name)(*arguments))

    # -- Device ----------

    def stream(self, direction: Direction) -> Any:
        """See Device."""
        priority = self._highest if direction is Direction.LOAD else self._lowest
        return self.call("cuStreamCreateWithPriority", int(self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING), priority)

    def event(self) -> _Event:
        """See Device."""
        flags = self.driver.CUevent_flags
        return _Event(self, int(flags.CU_EVENT_BLOCKING_SYNC) | int(flags.CU_EVENT_DISABLE_TIMING))

    def record(self, event: _Event, stream: Any) -> None:
        """See Device."""
        self.call("cuEventRecord", event.handle, stream)

    def wait(self, stream: Any, event: Any) -> None:
        """See Device. Takes torch's events, too."""
        handle = event.handle if isinstance(event, _Event) else event.cuda_event
        self.call("cuStreamWaitEvent", stream, handle, 0)

    def happened(self, event: _Event) -> bool:
        """See Device."""
        self._use()
        (result,) = self.driver.cuEventQuery(event.handle)
        if result == self.driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._check("cuEventQuery", (result,))
        return True

    def synchronize(self, event: _Event) -> None:
        """See Device."""
        self.call("cuEventSynchronize", event.handle)

    def allocate(self, nbytes: int) -> _Memory:
        """See Device."""
        return _Memory(self, "cuMemAlloc", "cuMemFree", nbytes)

    def allocate_host(self, nbytes: int) -> _Memory:
        """See Device."""
        return _Memory(self, "cuMemHostAlloc", "cuMemFreeHost", nbytes, 0)

    def copy(self, targets: Integers, sources: Integers, nbytes: Integers, stream: Any, order: SourceOrder) -> None:
        """See Device."""
        self._use()
        count = len(nbytes)
        if self._batch is None or count < FEW:
            for target, source, size in zip(targets.tolist(), sources.tolist(), nbytes.tolist(), strict=True):
                self._result("cuMemcpyAsync", self._each(target, source, size, int(stream)))
            return
        targets, sources, nbytes = (np.ascontiguousarray(each, np.int64) for each in (targets, sources, nbytes))
        attributes, first, failed = _Attributes(order=order.value), ctypes.c_size_t(0), ctypes.c_size_t(0)
        pointers = [each.ctypes.data for each in (targets, sources, nbytes)]
        arguments = [*pointers, count, ctypes.addressof(attributes), ctypes.addressof(first), 1]
        if self._names_failure:
            arguments.append(ctypes.addressof(failed))
        self._result("cuMemcpyBatchAsync", self._batch(*arguments, int(stream)))

    def launch(self, direction: Direction, table: int, count: int, slot: int, stream: Any) -> None:
        """See Device."""
        arguments = (table, count, slot), (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p)
        blocks = min(_BLOCKS, -(-count * 32 // _THREADS))
        self.call("cuLaunchKernel", self._functions[direction], blocks, 1, 1, _THREADS, 1, 1, 0, stream, arguments, 0)

    # -- the driver ----------

    def _use(self) -> None:
        """A thread has no context of its own until it is given one."""
        self._check("cuCtxSetCurrent", self.driver.cuCtxSetCurrent(self._context))

    def _check(self, name: str, answer: tuple[Any, ...]) -> Any:
        result, *values = answer
        if int(result):
            self._result(name, int(result))
        return values[0] if len(values) == 1 else values

    def _result(self, name: str, result: int) -> None:
        if result:
            try:
                text = self.driver.CUresult(result).name
            except ValueError:
                text = f"error {result}"
            raise CopyError(f"{name}: {text}")

    def _function(self, name: bytes, version: int, arguments: int) -> Any:
        """A function by its address, each of its arguments as wide as a pointer: x86-64 and AArch64 pass integers in
        registers of that width."""
        result, address, *_ = self.driver.cuGetProcAddress(name, version, 0)
        if int(result) or not address:
            return None
        return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_size_t] * arguments)(int(address))

    def _load_kernels(self, device: Any) -> dict[Direction, Any]:
        attribute = self.driver.CUdevice_attribute
        major, minor = (
            self.call("cuDeviceGetAttribute", which, device)
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        try:
            module = self.call("cuModuleLoadData", cubin(f"sm_{major}{minor}"))
            return {which: self.call("cuModuleGetFunction", module, name) for which, name in _KERNELS.items()}
        except CopyError as error:
            _log.warning("small rows are copied one by one, which is slow: %s", error)
            return {}


_making = threading.Lock()


@functools.cache
def _made(index: int) -> CudaDevice:
    return CudaDevice(index)


def cuda_device(index: int) -> CudaDevice:
    """The device of this number among those that the process sees; one for all copiers."""
    with _making:
        return _made(index)
