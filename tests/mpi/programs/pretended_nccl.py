"""Runs another program with the communicator pure_nccl on ranks that have no GPU.

pretended_nccl.py LOG PROGRAM ARGUMENTS... puts host memory, NumPy and MPI in the places of device
memory, CuPy's kernels and NCCL. ChainerMN's PureNcclCommunicator, and what is built on it, run as
they are; every call that would have reached NCCL or a kernel is written to LOG.RANK.
"""

import ctypes
import re
import runpy
import sys
import types

import extensions  # isort: skip
import numpy as np
from chainer.backends import cuda
from chainermn import nccl
from chainermn.communicators import _memory_utility
from mpi4py import MPI

calls = []
DTYPES = {6: np.float16, 7: np.float32, 8: np.float64}


class Stream:
    ptr = 12345

    def __init__(self, non_blocking=False):
        pass

    def synchronize(self):
        calls.append('synchronize')


STREAM = Stream.null = Stream()


def host_array(pointer, count, dtype):
    size = count * np.dtype(dtype).itemsize
    buffer = (ctypes.c_ubyte * size).from_address(pointer)
    return np.frombuffer(buffer, dtype)


def as_it_lies(array):
    """The memory of an array from its address on, as one dimension: what CUDA's kernels see."""
    return host_array(array.__array_interface__['data'][0], array.size, array.dtype)


class Nccl:
    """The sum goes from rank to rank, and is rounded after every addition."""

    def __init__(self, size, unique_id, rank):
        assert unique_id == 'unique' and (size, rank) == (MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank)
        calls.append('init')

    def allReduce(self, source, target, count, dtype, operation, stream):
        assert (operation, stream) == (nccl.NCCL_SUM, STREAM.ptr)
        calls.append(f'allReduce {count} {DTYPES[dtype].__name__}')
        total, *others = MPI.COMM_WORLD.allgather(host_array(source, count, DTYPES[dtype]).copy())
        with np.errstate(over='ignore'):
            for other in others:
                total += other
        host_array(target, count, DTYPES[dtype])[...] = total

    def bcast(self, pointer, count, dtype, root, stream):
        assert stream == STREAM.ptr
        calls.append(f'bcast {count} {DTYPES[dtype].__name__} from {root}')
        array = host_array(pointer, count, DTYPES[dtype])
        array[...] = MPI.COMM_WORLD.bcast(array.copy(), root)


class HostMemory:
    """DeviceMemory, but on the host."""

    def __init__(self):
        self.size, self.memory = 0, np.empty(0, np.uint8)

    def assign(self, size):
        if size > self.size:
            self.size, self.memory = size, np.empty(size, np.uint8)

    def ptr(self):
        return self.memory.ctypes.data

    def array(self, count, offset=0, dtype=np.float32):
        return host_array(self.ptr() + offset, count, dtype)

    def from_device(self, source, size, offset=0, stream=None):
        assert isinstance(stream, Stream)
        self.memory[offset : offset + size] = as_it_lies(source).view('u1')

    def to_device(self, target, size, offset=0, stream=None):
        assert isinstance(stream, Stream)
        as_it_lies(target)[...] = self.array(target.size, offset, target.dtype)


class ParamsData:
    def __init__(self, params, attribute, zero_fill):
        assert attribute == 'grad'
        for param in params:
            if param.grad is None and zero_fill:
                param.grad = np.zeros_like(param.data)
        self.grads = [param.grad for param in params]


def pack(params_data, buffer, dtype, stream=None):
    assert isinstance(stream, Stream)
    calls.append(f'pack {np.dtype(dtype)}')
    with np.errstate(over='ignore'):
        flat = [as_it_lies(grad).astype(dtype) for grad in params_data.grads]
    buffer.array(sum(part.size for part in flat), dtype=dtype)[...] = np.concatenate(flat)


def unpack(params_data, buffer, dtype, stream=None):
    assert isinstance(stream, Stream)
    calls.append('unpack')
    flat = buffer.array(sum(grad.size for grad in params_data.grads), dtype=dtype)
    for grad in params_data.grads:
        part, flat = flat[: grad.size], flat[grad.size :]
        as_it_lies(grad)[...] = part


def elementwise(in_params, out_params, operation, name):
    kernel = re.fullmatch(r'(float\d\d) x; x \*= \(1\.0/(\d+)\)', f'{out_params}; {operation}')
    dtype, size = kernel.groups()

    def divide(array, stream):
        assert (
            isinstance(stream, Stream) and array.dtype == dtype and int(size) == MPI.COMM_WORLD.size
        )
        calls.append(f'divide by {size}')
        array[...] = (array.astype(np.float64) * (1.0 / int(size))).astype(dtype)

    return divide


nccl._available = True
nccl.get_build_version = nccl.get_version = lambda: 22304
nccl.get_unique_id = lambda: 'unique'
nccl.NcclCommunicator = Nccl
nccl.NCCL_FLOAT16, nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64, nccl.NCCL_SUM = 6, 7, 8, 0
_memory_utility.DeviceMemory = HostMemory
_memory_utility.ParamsData = ParamsData
_memory_utility._batched_pack_params = pack
_memory_utility._batched_unpack_params = unpack
cuda.elementwise = elementwise
cuda.Stream = Stream
cuda.get_device_from_id = lambda number: types.SimpleNamespace(
    use=lambda: calls.append(f'use GPU {number}')
)
extensions.nccl.inspect = lambda rank: extensions.nccl.Gpus(rank, 'host', tuple('01234567'), 22304)
extensions.device_of = extensions.nccl.device_of = lambda comm: extensions.nccl.chainer.get_device(
    '@numpy'
)

log, program = sys.argv[1:3]
sys.argv[:] = sys.argv[2:]
try:
    runpy.run_path(program, run_name='__main__')
finally:
    with open(f'{log}.{MPI.COMM_WORLD.rank}', 'w') as file:
        file.write('\n'.join(calls))
