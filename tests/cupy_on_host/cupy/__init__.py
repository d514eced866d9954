"""A CuPy of host memory, for running the GPU's code paths on a machine without a GPU.

Put the folder above this one on PYTHONPATH: ``import cupy`` then finds this stand-in. It is NumPy
behind CuPy's names. There is no GPU in it, no device memory, and nothing asynchronous. It shows
that the code calls CuPy as CuPy wants to be called, and that the numbers come out right:

- Arrays do not mix with NumPy's, are converted by ``get`` alone, and belong to one of several GPUs.
  A reduction returns an array of no dimension, not a number.
- The texts of ElementwiseKernel, ReductionKernel and RawKernel are compiled by g++ and run, with
  CUDA's rules for types: ``half`` is declared by ``<cuda_fp16.h>`` alone.
- NCCL's collectives go over MPI. A sum is rounded after each addition, from rank to rank.
- Only what CuPy 14 has exists (names_of_cupy_14.txt). What exists there and is not needed here
  raises NotImplementedError when it is called.
- host_calls.py lists each launch and each wait of the host. What CuPy does in several launches,
  such as ``var``, counts as one.

It cannot show a missing synchronization, the device's own arithmetic (order of sums, fused
operations, cuBLAS, cuDNN), races between threads, the size of its memory, or any speed. The
promotion of dtypes is that of the NumPy below it.

There are eight GPUs: CUDA_VISIBLE_DEVICES hides some. HOST_NCCL_VERSION sets NCCL's version, and
HOST_KERNELS the folder of what was compiled.
"""

import functools
import sys

import numpy as np
from host_calls import record

from cupy import cuda
from cupy._array import ndarray, operation, unwrap, wrap
from cupy._kernels import ElementwiseKernel, RawKernel, ReductionKernel  # noqa: F401
from cupy._names import complete

__version__ = '14.2.0'


def array(a, dtype=None, copy=True, order='K', subok=False, ndmin=0, *, blocking=False):
    if isinstance(a, ndarray):
        wanted = np.array(a._host, dtype=dtype, order=order, ndmin=ndmin)
        if not copy and wanted.dtype == a.dtype and wanted.strides == a.strides:
            return a
        record('launch copy')
        return wrap(wanted)
    if isinstance(a, (list, tuple)) and any(isinstance(item, ndarray) for item in a):
        record('launch stack')
        return wrap(np.array([unwrap(item) for item in a], dtype=dtype, order=order, ndmin=ndmin))
    record('copy from the host')
    return wrap(np.array(a, dtype=dtype, order=order, ndmin=ndmin))


def asarray(a, dtype=None, order=None, *, blocking=False):
    return array(a, dtype, False, order or 'K', blocking=blocking)


def ascontiguousarray(a, dtype=None):
    return array(a, dtype, False, 'C', ndmin=1)


def asnumpy(a, stream=None, order='C', out=None, *, blocking=True):
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    return np.asarray(a, order=order)


def copyto(dst, src, casting='same_kind', where=None):
    record('launch copyto')
    np.copyto(unwrap(dst), unwrap(src), casting, True if where is None else unwrap(where))


def get_array_module(*args):
    return sys.modules['cupy'] if any(isinstance(a, ndarray) for a in args) else np


def memoize(for_each_device=False):
    def decorator(function):
        memo = {}

        @functools.wraps(function)
        def memoized(*args, **kwargs):
            key = (cuda.Device().id if for_each_device else -1, args, frozenset(kwargs.items()))
            if key not in memo:
                memo[key] = function(*args, **kwargs)
            return memo[key]

        return memoized

    return decorator


def fuse(*args, **kwargs):
    return args[0] if args else lambda function: function


def get_default_memory_pool():
    return cuda.MemoryPool()


get_default_pinned_memory_pool = get_default_memory_pool

complete(sys.modules['cupy'], 'cupy', operation)
