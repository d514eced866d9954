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
- Results of elementwise functions are in C order. The dtype of an array of no dimension, or of
  NumPy's number, counts as much as that of any other array.
- host_calls.py lists each launch and each wait of the host. What CuPy does in several launches,
  such as ``var``, counts as one. It also tells what CuPy would compile: the kernels of trainings
  (kernels_of_trainings.jsonl) are what tests/extensions_tests/test_cuda.py gives to NVRTC.

It cannot show a missing synchronization, the device's own arithmetic (order of sums, fused
operations, cuBLAS, cuDNN), races between threads, the size of its memory, or any speed. Other
rules of dtypes are those of the NumPy below it.

There are eight GPUs: CUDA_VISIBLE_DEVICES hides some. HOST_NCCL_VERSION sets NCCL's version, and
HOST_KERNELS the folder of what was compiled.
"""

import sys

from cupy import _array, _names, cuda  # noqa: F401
from cupy._array import ndarray  # noqa: F401
from cupy._functions import *  # no function here: any, all and max are CuPy's
from cupy._kernels import ElementwiseKernel, RawKernel, ReductionKernel  # noqa: F401

__version__ = '14.2.0'
_names.complete(sys.modules['cupy'], 'cupy', _array.operation)
