"""Devices, streams, events and memory. All work is done when a call returns."""

import ctypes
import sys
import time

import numpy as np
from host_calls import record

from cupy import _names
from cupy.cuda import cublas, nccl, runtime  # noqa: F401


class Device:
    def __init__(self, device=None):
        self.id = runtime.getDevice() if device is None else int(device)
        self._before = []

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None

    def __enter__(self):
        self._before.append(runtime.getDevice())
        runtime.setDevice(self.id)
        return self

    def __exit__(self, *error):
        runtime.setDevice(self._before.pop())

    def use(self):
        record('use GPU', self.id)
        runtime.setDevice(self.id)

    def synchronize(self):
        record('wait Device.synchronize')


class Event:
    done = True

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self._time = None

    def record(self, stream=None):
        self._time = time.perf_counter()

    def synchronize(self):
        record('wait Event.synchronize')


class Stream:
    done = True

    def __init__(self, null=False, non_blocking=False):
        self.ptr = 0 if null else id(self)

    def __eq__(self, other):
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self):
        return hash(self.ptr)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def use(self):
        return self

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        pass

    def synchronize(self):
        record('wait Stream.synchronize')


Stream.null = Stream(null=True)


class MemoryPointer:
    def __init__(self, ptr, mem):
        self.ptr, self.mem = ptr, mem  # mem keeps the memory alive

    def __add__(self, offset):
        return MemoryPointer(self.ptr + int(offset), self.mem)

    def __int__(self):
        return self.ptr

    def copy_from_device(self, src, size):
        record('launch memcpy')
        ctypes.memmove(self.ptr, src.ptr, int(size))

    def copy_from_device_async(self, src, size, stream=None):
        self.copy_from_device(src, size)


class MemoryPool:
    def free_all_blocks(self, stream=None):
        pass

    def total_bytes(self):
        return 1 << 20

    used_bytes = total_bytes


def alloc(size):
    memory = np.empty(int(size), np.uint8)
    return MemoryPointer(memory.ctypes.data, memory)


def get_current_stream(device_id=-1):
    return Stream.null


def get_elapsed_time(start_event, end_event):
    return 1000 * (end_event._time - start_event._time)


def is_available():
    try:
        return runtime.getDeviceCount() > 0
    except runtime.CUDARuntimeError:
        return False


for _target in (Device, Event, MemoryPointer, Stream):
    _names.complete(_target, f'cupy.cuda.{_target.__name__}')
_names.complete(sys.modules['cupy.cuda'], 'cupy.cuda')
