"""The GPU's paths on tests/cupy_on_host, without a GPU, and how strict that CuPy is."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.mpi
PROGRAMS = Path(__file__).resolve().parent / 'programs'
TRAIN = PROGRAMS / 'shallow.py'
SMOKE = '--preset smoke --width 4 --epochs 1 --local-batch-size 90'.split()


@pytest.fixture
def python(cupy_on_host, root):
    """``python(*words, **variables)`` runs Python where it finds that CuPy."""

    def run(*words, timeout=120, **variables):
        return subprocess.run(
            [sys.executable, *words],
            check=False,
            cwd=root,
            env={**os.environ, **cupy_on_host, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    return run


# --- It refuses what CuPy refuses -----------------------------------------------------------------

REFUSED = {
    'a + host': 'TypeError: Unsupported type',
    'host + a': 'TypeError: Unsupported type',
    'a += host': 'TypeError: Unsupported type',
    'a[:] = host': 'ValueError: non-scalar numpy.ndarray cannot be used for fill',
    'cupy.add(a, host)': 'TypeError: Unsupported type',
    'numpy.asarray(a)': 'TypeError: Implicit conversion to a NumPy array is not allowed',
    'numpy.concatenate([a, a])': 'TypeError: no implementation found',
    'a.set(host.astype("f8"))': 'TypeError',
    'a.get(out=numpy.empty(3))': 'TypeError',
    'a.flags.writeable': 'AttributeError',
    'a.tofile_of_none': 'AttributeError',
    'cupy.nonesuch': 'AttributeError',
    'cupy.cuda.cudnn': 'AttributeError',
    'cupy.linalg.svd(a)': 'AttributeError',
    'cupy.cuda.Graph()': 'NotImplementedError: the CuPy of host memory lacks cupy.cuda.Graph',
    'hash(a)': 'TypeError',
    'bool(a)': 'ValueError: The truth value',
    'cupy.cuda.Device(8).use()': 'CUDARuntimeError: cudaErrorInvalidDevice',
    'with cupy.cuda.Device(1): a + a': 'ValueError: array device must be same as the current',
    'twice(host)': 'TypeError: Unsupported type',
    'twice(a.astype("f8"))': 'TypeError: Type is mismatched',
    'twice(a, cupy.empty(1, "f4"))': 'ValueError: Out shape is mismatched',
    'raw((1,), (4,), (a, numpy.int32(3), a))': 'TypeError: raw takes 2 arguments, not 3',
    'raw((1,), (4,), (host, 3))': 'TypeError: Unsupported type',
    'raw((1,), (4,), (a, numpy.int16(3)))': 'TypeError: raw: argument 2 is smaller than',
    'raw((0,), (4,), (a, 3))': 'CUDARuntimeError: CUDA_ERROR_INVALID_VALUE',
    'raw((1,), (2048,), (a, 3))': 'CUDARuntimeError: CUDA_ERROR_INVALID_VALUE',
    'compiled("<cupy/carray.cuh>", "half")': 'error: ‘half’ was not declared',
    'compiled("<cuda_fp16.h>", "float32")': 'error: ‘float32’ was not declared',
    'in_child(lambda: a + a)': 'CUDARuntimeError: cudaErrorInitializationError',
}
SETUP = """
import multiprocessing
import cupy, numpy
host = numpy.arange(3, dtype='f4')
a = cupy.asarray(host)
twice = cupy.ElementwiseKernel('float32 x', 'float32 y', 'y = 2 * x', 'twice')
raw = cupy.RawKernel('''extern "C" __global__ void raw(float *a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) a[i] *= 10;
}''', 'raw')
def compiled(header, kind):
    code = f'#include {header}\\nextern "C" __global__ void f(float *a) {{ {kind} x(a[0]); }}'
    return cupy.RawKernel(code, 'f')
def in_child(function):
    def call(queue):
        try:
            function()
        except Exception as error:
            queue.put(error)
    fork = multiprocessing.get_context('fork')
    queue = fork.Queue()
    fork.Process(target=call, args=(queue,)).start()
    raise queue.get(timeout=20)
"""
ALLOWED = """
assert (a + 1).get().tolist() == [1, 2, 3] and (numpy.float32(2) * a).get().tolist() == [0, 2, 4]
assert isinstance(a.sum(), cupy.ndarray) and a.sum().shape == () and float(a.max()) == 2
assert isinstance(a[1], cupy.ndarray) and cupy.allclose(a, a).shape == ()
a[1] = numpy.float32(7)
a[a > 5] = 5
assert twice(a).get().tolist() == [0, 10, 4] and twice(a[::-1]).get().tolist() == [4, 10, 0]
raw((2,), (2,), (a, 3))
assert a.get().tolist() == [0, 50, 20]
compiled('<cuda_fp16.h>', 'half')
values = numpy.random.RandomState(0).randint(0, 1 << 32, 20000, numpy.uint32).view('f4')
edges = [65519, 65520, 6e-8, 2.9e-8, 3e-8, -0.0, 1 + 2**-11]
values = numpy.concatenate([values, edges], dtype='f4')
with numpy.errstate(all='ignore'):
    expected = values.astype('f2').view('u2')
cast = cupy.ElementwiseKernel('T x', 'float16 y', 'y = x', 'cast')
for kind in ('f4', 'f8'):
    found = cast(cupy.asarray(values.astype(kind))).get()
    numpy.testing.assert_array_equal(found.view('u2')[~numpy.isnan(values)],
                                     expected[~numpy.isnan(values)])
back = cupy.ElementwiseKernel('float16 x', 'float32 y', 'y = x', 'back')
every = numpy.arange(1 << 16).astype('u2').view('f2')
numpy.testing.assert_array_equal(back(cupy.asarray(every)).get(), every.astype('f4'))
reduce = cupy.ReductionKernel('T x, float32 f', 'T y', 'x * f', 'a * b', 'y = a + 1', '1')
assert reduce(cupy.asarray(host) + 1, 2).get() == 2 * 4 * 6 + 1
import host_calls
before = len(host_calls.calls)
float((a.reshape(3, 1) + a[None])[0, 0])
a.get()
assert host_calls.calls[before:] == ['launch add', 'wait get', 'wait get']
"""


def test_it_refuses_what_cupy_refuses(python):
    program = f'{SETUP}\nimport traceback\nfor line in {list(REFUSED)}:\n'
    program += '    try:\n        exec(line)\n        print(line, "=> accepted")\n'
    program += '    except Exception as e: print(line, "=>", f"{type(e).__name__}: {e}"[:3000])\n'
    done = python('-c', program, LC_ALL='C.UTF-8')
    assert done.returncode == 0, done.stdout
    for line, message in REFUSED.items():
        found = done.stdout.split(f'{line} => ')[1].split(' => ')[0]
        assert message in found, (line, found)


def test_what_it_accepts_is_right(python):
    done = python('-c', SETUP + ALLOWED)
    assert done.returncode == 0, done.stdout


NAMES = """
import types
import cupy, cupyx
from cupy._names import NAMES
for owner, names in NAMES.items():
    own = {
        name
        for name, value in vars(eval(owner)).items()
        if not name.startswith('_')
        and not isinstance(value, types.ModuleType)
        and getattr(value, '__module__', 'cupy').startswith('cupy')
    }
    print(owner, len(own) > 2, sorted(own - set(names)))
"""


def test_it_has_no_name_that_cupy_14_lacks(python):
    done = python('-c', NAMES)
    assert done.returncode == 0, done.stdout
    rows = done.stdout.splitlines()
    assert len(rows) == 10 and all(row.endswith(' True []') for row in rows), done.stdout
